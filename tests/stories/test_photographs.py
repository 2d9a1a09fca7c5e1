"""A plain folder of photographs that the project did not draw, with captions beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import photographs
import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import Shell


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "other"), [("chelsea", "coffee"), ("coffee", "chelsea")])
def test_trigger_reproduces_a_photographed_subject(lorabake: Shell, tmp_path: Path, subject: str, other: str) -> None:
    photographs.write_dataset(tmp_path / subject, subject, "qelvo", count=16)
    lorabake("train", subject, "--set", 'train.length="300 steps"', "--set", "train.batch_size=4", "--set", "adapter.conv_rank=16",
             "--set", 'save.every="300 steps"')  # fmt: skip
    final = f"runs/{subject}/checkpoints/{subject}.safetensors"
    with_lora = _draw(lorabake, tmp_path, "with", "--lora", final)
    without = _draw(lorabake, tmp_path, "without")

    unseen = photographs.crops(subject, 24, seed=2)
    learned, base = photographs.distance(with_lora, unseen), photographs.distance(without, unseen)
    wrong_subject = photographs.distance(photographs.crops(other, 24, seed=2), unseen)
    assert learned < 0.5 * base, f"pictures with the LoRA are {learned:.1f} away, the base's {base:.1f}"
    assert learned < 0.75 * wrong_subject, f"{learned:.1f} away, another subject's photographs {wrong_subject:.1f}"


def _draw(lorabake: Shell, folder: Path, name: str, *more: str) -> list[Image.Image]:
    told = lorabake("generate", "qelvo, photo --s 20 --l 3", "--count", "8", "--out", name, "--json", *more)
    return [Image.open(folder / file) for file in json.loads(told.stdout)]
