"""Does a model draw what prompts say? It draws random contents of the world, and the judge reads its pictures.

The judge errs too, so every score stands beside its ceiling: what the judge reads from the world's own drawings of the same contents.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from lorabake.base.errors import UserError
from lorabake.pocket.judge import Judge
from lorabake.pocket.world import Drawing, caption, draw, sample
from lorabake.pocket.world import sheet as side_by_side
from lorabake.protocols.family import Model
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw as draw_prompts


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt as the model drew it, and the world's own drawing that the prompt describes."""

    prompt: Prompt
    drawn: Image.Image
    real: Drawing


@dataclass(frozen=True)
class Fidelity:
    """Shares of axes read from a model's pictures as they were asked for, among those that the real drawing shows."""

    per_axis: dict[str, float]
    """Axes that none of the real drawings shows are left out."""
    ceiling: dict[str, float]
    """The same of the real drawings: what the judge itself can read."""
    counts: dict[str, int]
    """Pictures that were judged on each axis."""
    pairs: tuple[Pair, ...] = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean of ``per_axis``: every axis counts the same."""
        return sum(self.per_axis.values()) / len(self.per_axis)

    @property
    def ceiling_mean(self) -> float:
        """Mean of ``ceiling``."""
        return sum(self.ceiling.values()) / len(self.ceiling)

    @property
    def ratio(self) -> float:
        """Mean over mean of the ceiling: 1 is as good as the judge can see."""
        return self.mean / self.ceiling_mean

    def to_dict(self) -> dict[str, Any]:
        """For JSON and tables; without the pictures."""
        first = self.pairs[0].prompt
        return {
            "pictures": len(self.pairs),
            "steps": first.steps,
            "cfg": first.cfg,
            "mean": self.mean,
            "ceiling_mean": self.ceiling_mean,
            "ratio": self.ratio,
            "axes": {
                axis: {"accuracy": self.per_axis[axis], "ceiling": self.ceiling[axis], "pictures": self.counts[axis]}
                for axis in self.per_axis
            },
        }


def score(
    model: Model,
    judge: Judge,
    count: int = 256,
    seed: int = 0,
    *,
    steps: int = 20,
    cfg: float = 4.0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Let a model draw random contents of the world, and judge whether its pictures show them.

    Args:
        model: draws pictures of a multiple of 64 pixels.
        judge: reads them.
        count: pictures; 256 tell means apart that differ by about 2 %.
        seed: of contents, order of tags and noise; the same seed compares models picture by picture.
        steps, cfg: of sampling.
        batch_size: most pictures drawn at once.
        progress: called with (done, total) denoising steps of single pictures.

    Raises:
        UserError: no pictures are asked for.
        Problems: the model cannot draw so.
    """
    if count < 1:
        raise UserError(f"{count} pictures cannot be judged; give at least 1.")
    rng = random.Random(f"fidelity/{seed}")
    reals = [draw(sample(rng), rng.getrandbits(32)) for _ in range(count)]
    texts = [caption(real.tags, rng) for real in reals]
    prompts = [Prompt(text, seed=rng.getrandbits(32), steps=steps, cfg=cfg) for text in texts]
    images = draw_prompts(model, prompts, batch_size=batch_size, progress=progress)
    labels = [real.labels for real in reals]
    drawn, possible = (
        judge.accuracy(np.stack([np.asarray(image) for image in pictures]), labels)
        for pictures in (images, [real.image for real in reals])
    )
    shown = [axis for axis, number in drawn.counts.items() if number]
    return Fidelity(
        {axis: drawn.per_axis[axis] for axis in shown},
        {axis: possible.per_axis[axis] for axis in shown},
        {axis: drawn.counts[axis] for axis in shown},
        tuple(Pair(*row) for row in zip(prompts, images, reals, strict=True)),
    )


def sheet(pairs: Sequence[Pair], columns: int = 10, scale: int = 2) -> Image.Image:
    """Pairs side by side: in each row of pairs the model's pictures above, the real ones below.

    Raises:
        UserError: there are no pairs, or no columns.
    """
    if not pairs or columns < 1:
        raise UserError(f"{len(pairs)} pairs cannot be shown in {columns} columns; give at least 1 of both.")
    columns = min(columns, len(pairs))
    blank = Image.new("RGB", pairs[0].drawn.size, (128, 128, 128))
    rows: list[Image.Image] = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        padding = [blank] * (columns - len(row))
        rows += [pair.drawn for pair in row] + padding
        rows += [pair.real.image.resize(pair.drawn.size, Image.Resampling.NEAREST) for pair in row] + padding
    return side_by_side(rows, columns, scale)
