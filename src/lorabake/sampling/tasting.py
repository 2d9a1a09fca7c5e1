"""Tasting: the same prompts drawn by the base model and by every checkpoint at every weight, as one labelled picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorabake.protocols.family import Model
from lorabake.recipe.prompts import Prompt, shortened
from lorabake.sampling.apply import apply_lora
from lorabake.sampling.axes import Axis
from lorabake.sampling.draw import draw
from lorabake.sampling.grid import compose


@dataclass(frozen=True, slots=True)
class Tasting:
    """Pictures by row (the base first, then checkpoint by checkpoint, weight by weight) and column (prompt by prompt, seed by seed)."""

    rows: tuple[tuple[Path | None, float], ...]
    columns: tuple[Prompt, ...]
    pictures: tuple[tuple[Image.Image, ...], ...]

    def picture(self, title: str = "", footer: str = "") -> Image.Image:
        """All of it as one labelled picture."""
        labels = tuple("base" if path is None else f"{path.stem}\nweight {weight:g}" for path, weight in self.rows)
        breaks = frozenset(i for i in range(1, len(self.rows)) if self.rows[i][0] != self.rows[i - 1][0])
        several = len({prompt.seed for prompt in self.columns}) > 1
        columns = tuple(
            shortened(prompt.text, 64) + (f"\nseed {prompt.seed}" if several else "") for prompt in self.columns
        )
        cells = {(r, c): image for r, row in enumerate(self.pictures) for c, image in enumerate(row)}
        return compose(cells, Axis("checkpoint", labels, breaks), Axis("prompt", columns), title=title, footer=footer)


def taste(
    model: Model,
    checkpoints: Sequence[Path],
    weights: Sequence[float],
    prompts: Sequence[Prompt],
    seeds: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tasting:
    """Draw every prompt and seed with the base, and with each checkpoint at each weight. The model is left as it came.

    Args:
        model: the base.
        checkpoints: LoRA files.
        weights: strengths for each of them.
        prompts: what to draw.
        seeds: draw each prompt with each of these; empty keeps the prompts' own.
        progress: told (pictures done, pictures in all).
    """
    columns = (
        tuple(dataclasses.replace(prompt, seed=seed) for prompt in prompts for seed in seeds)
        if seeds
        else tuple(prompts)
    )
    rows: list[tuple[Path | None, float]] = [
        (None, 0.0),
        *((path, weight) for path in checkpoints for weight in weights),
    ]
    pictures: list[tuple[Image.Image, ...]] = []
    for path, weight in rows:
        graft = apply_lora(model, path, weight) if path else None
        try:
            pictures.append(tuple(draw(model, columns)))
        finally:
            if graft:
                graft.remove()
        progress(len(pictures) * len(columns), len(rows) * len(columns))
    return Tasting(tuple(rows), columns, tuple(pictures))
