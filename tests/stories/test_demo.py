"""The main job: one command, and a picture that shows a LoRA learning a character the base never knew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import Shell


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
    assert (folder / "run" / "checkpoints" / "zorbi.safetensors").is_file()
    with Image.open(folder / "grid.png") as grid:
        assert min(grid.size) > 500
    assert len(list((folder / "dataset").rglob("*.txt"))) == 28

    again = json.loads(lorabake("demo", "--json", "--pictures", "32").stdout)
    assert (again["before"], again["after"]) == (before, after), "the same demo must tell the same twice"
