"""A character the base model never saw: a small training set of it, and a test of what a LoRA learned.

Training pictures and test prompts share no pose, background or object, so the test asks for the character where it was never seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorabake.base.files import write_atomic
from lorabake.pocket.characters import Character
from lorabake.pocket.judge import Detectors, Judge
from lorabake.pocket.world import Spec, draw, sample
from lorabake.protocols.family import Model
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw as draw_prompts
from lorabake.sampling.infotext import save_png

KNOWN: dict[str, tuple[str, ...]] = {
    "pose": ("standing", "waving"),
    "background": ("white background", "sky", "indoors"),
    "object": ("none", "none", "book"),
}
"""What training pictures show besides the character."""
NEW: dict[str, tuple[str, ...]] = {
    "pose": ("sitting", "arms up"),
    "background": ("forest", "night", "beach"),
    "object": ("none", "sword", "umbrella", "ball"),
}
"""What test prompts ask for."""
_SETTING: dict[str, tuple[str, ...]] = {
    "style": ("flat color", "outline"),
    "framing": ("full body", "full body", "upper body", "portrait"),
    "view": ("front",),
}
CONTROLLED = ("background", "framing", "pose")
"""Axes a prompt must still control with the LoRA on."""
OTHERS = 8
"""Pictures of other characters in a training set."""
STEPS, CFG = 16, 4.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What pictures drawn with the trigger, and without it, show. All values are shares from 0 to 1."""

    features: dict[str, float]
    """The character's own features, found in pictures prompted with the trigger (where the framing would show them)."""
    control: dict[str, float]
    """Prompted backgrounds, framings and poses that were obeyed in those pictures."""
    leak: dict[str, float]
    """The same features, found in pictures prompted without the trigger."""

    @property
    def identity(self) -> float:
        """Mean of ``features``."""
        return sum(self.features.values()) / len(self.features)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"identity": self.identity, **asdict(self)}


def write_training_set(
    folder: Path, character: Character, trigger: str, count: int = 20, seed: int = 1
) -> list[Image.Image]:
    """A dataset folder: ``count`` pictures of the character, captions pruned of what is the character's own, and a few of others.

    The others, with the same kind of captions but no trigger, keep the character from leaking into every prompt.

    Returns:
        The character's pictures, as they were written.
    """
    rng = random.Random(seed)
    own = character.own_tags() | {"1girl"}
    pictures = []
    for index in range(count):
        drawing = draw(_spec(character, rng, KNOWN), rng_seed=seed * 1000 + index)
        tags = [trigger, *(tag for tag in drawing.tags if tag not in own)]
        _write_pair(folder / f"2_{trigger}" / f"{index:03d}.png", drawing.image, tags)
        pictures.append(drawing.image)
    for index in range(OTHERS):
        drawing = draw(sample(rng, view="front", style=rng.choice(_SETTING["style"])), rng_seed=seed * 3000 + index)
        _write_pair(folder / "1_others" / f"{index:03d}.png", drawing.image, drawing.tags)
    return pictures


def _write_pair(path: Path, image: Image.Image, tags: Sequence[str]) -> None:
    save_png(image, path)
    write_atomic(path.with_suffix(".txt"), (", ".join(tags) + "\n").encode())


def try_out(
    model: Model,
    character: Character,
    trigger: str,
    judge: Judge,
    detectors: Detectors,
    *,
    count: int = 64,
    seed: int = 7,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trial:
    """Draw ``count`` pictures with the trigger and as many ordinary ones, and look for the character in both.

    Args:
        model: the base, with or without a LoRA on it.
        character: whose features are looked for.
        trigger: its word in prompts.
        judge: tells backgrounds, framings and poses.
        detectors: must know the character's features.
        count: pictures of each kind.
        seed: decides prompts and noise; equal seeds compare picture by picture.
        progress: told (steps done, in all).
    """
    rng = random.Random(seed)
    own = character.own_tags() | {"1girl"}
    truths = [draw(_spec(character, rng, NEW), rng_seed=seed * 1000 + i) for i in range(count)]
    ordinary = [draw(sample(rng, view="front", style="flat color"), rng_seed=seed * 2000 + i) for i in range(count)]
    texts = [", ".join([trigger, *(tag for tag in truth.tags if tag not in own)]) for truth in truths]
    texts += [", ".join(truth.tags) for truth in ordinary]
    prompts = [Prompt(text, seed=seed * 100 + i, steps=STEPS, cfg=CFG) for i, text in enumerate(texts)]
    images_NHWC = np.stack([np.asarray(image) for image in draw_prompts(model, prompts, progress=progress)])
    with_trigger, without = images_NHWC[:count], images_NHWC[count:]
    shown = {name: [truth.features.get(name) is True for truth in truths] for name in character.features}
    judged = judge.accuracy(with_trigger, [truth.labels for truth in truths]).per_axis
    return Trial(
        features={name: _rate(detectors, with_trigger, name, where) for name, where in shown.items()},
        control={axis: judged[axis] for axis in CONTROLLED},
        leak={name: _rate(detectors, without, name, [True] * count) for name in character.features},
    )


def _rate(detectors: Detectors, images_NHWC: np.ndarray, feature: str, where: Sequence[bool]) -> float:
    return detectors.rate(images_NHWC[np.array(where)], feature) if any(where) else float("nan")


def _spec(character: Character, rng: random.Random, choices: Mapping[str, tuple[str, ...]]) -> Spec:
    fixed: dict[str, Any] = {axis: rng.choice(values) for axis, values in {**_SETTING, **choices}.items()}
    return character.spec(rng, **fixed)
