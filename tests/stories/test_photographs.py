"""A plain folder of photographs that the project did not draw, with captions beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import skimage.data
from PIL import Image

if TYPE_CHECKING:
    from conftest import Shell

SUBJECTS = {
    # centre (x, y) of the subject and the side of the closest useful square, in pixels of the photograph
    "chelsea": (skimage.data.chelsea, (215, 140), 225),
    "coffee": (skimage.data.coffee, (310, 190), 230),
}
"""A tabby cat's face, and a cup of coffee on a wooden table seen from above. Both are in the public domain (CC0)."""


def crops(name: str, count: int, seed: int) -> list[Image.Image]:
    """Square crops around the subject, close and wide, off-centre by a little, at the size a camera would give them."""
    load, (x, y), side = SUBJECTS[name]
    photo = Image.fromarray(load())
    rng = random.Random(f"{name} {seed}")
    found = []
    for _ in range(count):
        size = min(round(side * rng.uniform(1.0, 1.3)), *photo.size)
        left = min(max(0, x - size // 2 + rng.randint(-side // 9, side // 9)), photo.width - size)
        top = min(max(0, y - size // 2 + rng.randint(-side // 9, side // 9)), photo.height - size)
        found.append(photo.crop((left, top, left + size, top + size)))
    return found


def write_dataset(folder: Path, name: str, trigger: str, count: int) -> None:
    """A plain folder: JPEGs with captions beside them."""
    folder.mkdir(parents=True)
    for index, crop in enumerate(crops(name, count, seed=1)):
        crop.save(folder / f"{index:02d}.jpg", quality=92)
        (folder / f"{index:02d}.txt").write_text(f"{trigger}, photo\n", encoding="utf-8")


def distance(pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Mean over pictures of the RMS difference to the nearest reference, both as 16 × 16 thumbnails; values from 0 to 255."""
    thumbs, targets = _thumbnails(pictures), _thumbnails(references)
    differences = np.sqrt(((thumbs[:, None] - targets[None]) ** 2).mean(axis=(2, 3, 4)))
    return float(differences.min(axis=1).mean())


def _thumbnails(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p.convert("RGB").resize((16, 16), Image.Resampling.BOX), np.float64) for p in pictures])


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "other", "steps"), [("chelsea", "coffee", 200), ("coffee", "chelsea", 300)])
def test_trigger_reproduces_a_photographed_subject(
    lorabake: Shell, tmp_path: Path, subject: str, other: str, steps: int
) -> None:
    """As many steps as leave room below the limits: a face is learned sooner than a cup."""
    write_dataset(tmp_path / subject, subject, "qelvo", count=16)
    lorabake("train", subject, "--set", f'train.length="{steps} steps"', "--set", "train.batch_size=4", "--set", "adapter.conv_rank=16",
             "--set", f'save.every="{steps} steps"')  # fmt: skip
    final = f"runs/{subject}/checkpoints/{subject}.safetensors"
    with_lora = _draw(lorabake, tmp_path, "with", "--lora", final)
    without = _draw(lorabake, tmp_path, "without")

    unseen = crops(subject, 24, seed=2)
    learned, base = distance(with_lora, unseen), distance(without, unseen)
    wrong_subject = distance(crops(other, 24, seed=2), unseen)
    assert learned < 0.5 * base, f"pictures with the LoRA are {learned:.1f} away, the base's {base:.1f}"
    assert learned < 0.75 * wrong_subject, f"{learned:.1f} away, another subject's photographs {wrong_subject:.1f}"


def _draw(lorabake: Shell, folder: Path, name: str, *more: str) -> list[Image.Image]:
    told = lorabake("generate", "qelvo, photo --s 20 --l 3", "--count", "8", "--out", name, "--json", *more)
    return [Image.open(folder / file) for file in json.loads(told.stdout)]
