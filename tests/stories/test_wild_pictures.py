"""Two folders, captions left to chance, random crops at two sizes: killed in the middle, the same command ends at the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

from lorabake.pocket.world import draw, sample

if TYPE_CHECKING:
    from conftest import Shell

RECIPE = """
[data]
folder = ["kavi", "3_night"]
class_tokens = "outdoors"
flip = true
[data.captions]
wildcards = true
shuffle = true
keep_tokens = 1
token_warmup = 0.5
secondary_separator = ";;;"
[data.augment]
random_crop = true
hue = 5
views = {views}
[data.buckets]
resolutions = [32, 64]
[adapter]
rank = 2
[train]
length = "12 steps"
batch_size = 2
device = "cpu"
[save]
every = "1 epoch"
state_every = 0.001
"""


def write_pictures(folder: Path) -> None:
    """Upright ones in kavi/2_kavi, one beside them without a caption, and wide ones in 3_night."""
    for index in range(5):
        drawing = draw(sample(random.Random(index)), index, 128)
        home, cut = ("kavi/2_kavi", (16, 0, 112, 128)) if index < 3 else ("3_night", (0, 20, 128, 112))
        path = folder / (f"{home}/{index}.png" if index < 4 else "kavi/alone.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.image.crop(cut).save(path)
        if index < 4:
            tags = ", ".join(drawing.tags)
            path.with_suffix(".txt").write_text(f"kavi, {tags};;;{{day|night}}\\nkavi\\n", encoding="utf-8")
    (folder / "kavi" / "2_kavi" / "broken.png").write_bytes(b"")


def everything(run: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was interrupted."""
    state = max((run / "state").iterdir())
    files = [*(run / "checkpoints").iterdir(), run / "events.jsonl", state]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("views", ["3", '"fresh"'])
def test_trained_killed_and_resumed(lorabake: Shell, tmp_path: Path, views: str) -> None:
    write_pictures(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(views=views), encoding="utf-8")
    plan = json.loads(lorabake("validate", "recipe.toml", "--json").stdout)
    # pictures x sizes x repeats: kavi/2_kavi 3 x 2 x 2, kavi 1 x 2 x 1, 3_night 1 x 2 x 3
    assert plan["dataset"]["pictures"] == 5 and plan["dataset"]["dropped"][0]["name"] == "kavi/2_kavi/broken.png"
    assert plan["dataset"]["captions"] == {"class_tokens": 1, "txt": 4}
    said = lorabake("validate", "recipe.toml").stdout
    assert "5 used (3 in kavi/2_kavi × 2, 1 in kavi × 1, 1 in 3_night × 3), 1 not; 20 images per epoch" in said

    whole = lorabake("train", "recipe.toml", "--into", "whole")
    assert "1 not" in whole.stderr and "12 optimizer steps" in whole.stderr
    events = tmp_path / "cut" / "events.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "lorabake", "train", "recipe.toml", "--into", "cut"], cwd=tmp_path,
                               env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not (events.exists() and events.read_bytes().count(b'"step"') >= 4):
        time.sleep(0.005)
    process.kill()
    assert process.wait() != 0
    again = lorabake("train", "recipe.toml", "--into", "cut")
    assert "Continuing" in again.stderr
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")

    with safe_open(tmp_path / "whole" / "checkpoints" / "kavi.safetensors", framework="pt") as file:
        told = file.metadata()
    assert told["ss_random_crop"] == told["ss_color_aug"] == told["ss_flip_aug"] == "True"
    assert told["ss_cache_latents"] == str(views != '"fresh"')
    assert json.loads(told["ss_dataset_dirs"])["3_night"] == {"n_repeats": 3, "img_count": 1}
