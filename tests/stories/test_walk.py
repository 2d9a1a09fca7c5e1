"""From a folder of pictures to a grid, word by word as the README says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lorabake.base.header import read_header
from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import infotext_of

if TYPE_CHECKING:
    from conftest import Shell


def _pictures(folder: Path) -> None:
    folder.mkdir()
    for index in range(4):
        drawing = draw(sample(random.Random(index)), index)
        drawing.image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(", ".join(["kavi", *drawing.tags]), encoding="utf-8")


def test_folder_to_grid(lorabake: Shell, tmp_path: Path) -> None:
    _pictures(tmp_path / "kavi")
    plan = json.loads(lorabake("validate", "kavi", "--json").stdout)
    assert plan["steps"] == 40 and plan["recipe"]["output"]["name"] == "kavi"

    settings = ["--set", "train.batch_size=2", "--set", 'train.length="2 epochs"', "--set", "adapter.rank=4"]
    trained = lorabake("train", "kavi", *settings, "--json")
    kinds = [json.loads(line)["kind"] for line in trained.stdout.splitlines()]
    assert kinds.count("step") == 4 and kinds.count("checkpoint") == 2 and kinds[-1] == "finished"

    lorabake(
        "generate",
        "kavi, portrait --d 5 --s 4",
        "--lora",
        "runs/kavi/checkpoints/kavi.safetensors:0.8",
        "--out",
        "one.png",
    )
    said = infotext_of(tmp_path / "one.png")
    assert "kavi, portrait" in said and "Seed: 5" in said and str(tmp_path) not in said
    weights = read_header(tmp_path / "runs/kavi/checkpoints/kavi.safetensors").metadata["sshs_model_hash"]
    assert f'Lora hashes: "kavi: {weights[:12]}"' in said

    lorabake("grid", "runs/kavi", "--prompt", "kavi --s 2", "--weights", "0.5,1", "--seeds", "1,2")
    with Image.open(tmp_path / "runs" / "kavi" / "grid.png") as grid:
        assert grid.height > grid.width  # five rows (base, two checkpoints at two weights), two columns


def test_running_again_says_so_and_changes_nothing(lorabake: Shell, tmp_path: Path) -> None:
    _pictures(tmp_path / "kavi")
    settings = ["--set", 'train.length="2 steps"', "--set", "adapter.rank=2"]
    lorabake("train", "kavi", *settings)
    files = {
        path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file() and path.name != ".lock"
    }
    again = lorabake("train", "kavi", *settings)
    assert "already finished" in again.stderr
    assert files == {path: path.read_bytes() for path in files}
    other = lorabake("train", "kavi", *settings, "--set", "train.seed=7", fails=True)
    assert other.returncode == 2 and "train.seed" in other.stderr
