"""The main job: one command, and a picture that shows a LoRA learning a character the base never knew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import Shell

FOOTER = 60
"""Pixels at the lower end of the grid, where the scores are told: of fewer pictures, the second time."""


def pixels(path: Path) -> np.ndarray:
    """Rows of pixels."""
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.slow
def test_demo_teaches_the_character_and_shows_it(lorabake: Shell, tmp_path: Path) -> None:
    told = json.loads(lorabake("demo", "--json", "--pictures", "32").stdout)

    before, after = told["before"], told["after"]
    assert before["identity"] <= 0.10
    assert after["identity"] >= 0.70
    assert min(after["features"].values()) >= 0.40
    for axis, lost in {"background": 0.10, "framing": 0.10, "pose": 0.20}.items():
        assert after["control"][axis] >= before["control"][axis] - lost, f"prompted {axis} is no longer obeyed"
    leak = [after["leak"][name] - before["leak"][name] for name in after["leak"]]
    assert sum(leak) / len(leak) <= 0.10

    folder = tmp_path / "lorabake-demo"
    checkpoint = folder / "run" / "checkpoints" / "zorbi.safetensors"
    grid, trained = pixels(folder / "grid.png"), (checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns)
    assert min(grid.shape[:2]) > 500
    assert len(list((folder / "dataset").rglob("*.txt"))) == 28

    lorabake("demo", "--json", "--pictures", "1")
    assert (checkpoint.read_bytes(), checkpoint.stat().st_mtime_ns) == trained, "nothing is trained again"
    different_rows = np.flatnonzero((pixels(folder / "grid.png") != grid).any(axis=(1, 2)))
    assert (different_rows > len(grid) - FOOTER).all(), "the same demo must draw the same twice"
