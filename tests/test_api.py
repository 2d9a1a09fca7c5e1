"""The verbs, for Python."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorabake as lb
from lorabake.pocket.world import draw, sample
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.infotext import parse, save_png

SMALL: dict[str, Any] = {"adapter": {"rank": 1}, "train": {"length": "2 steps", "device": "cpu"}}
LINE = "1girl, red hair --d 3 --s 2"
LONG = ", ".join(["1girl, red hair"] * 40) + " --s 1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two drawings."""
    folder = tmp_path_factory.mktemp("api") / "mira"
    rng = random.Random(1)
    for index in range(2):
        drawing = draw(sample(rng), index, 64)
        save_png(drawing.image, folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(", ".join(drawing.tags))
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path) -> Any:
    """A finished run on it."""
    return lb.train(pictures, pictures.parent / "run", **SMALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


# ---- settings beside a recipe


def test_settings_change_what_they_name_and_nothing_else(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f'[data]\nfolder = {str(pictures)!r}\n[data.captions]\nshuffle = true\nkeep_tokens = 2\n[adapter]\nrank = 3\nalpha = 2.0')  # fmt: skip
    recipe = lb.validate(file, data={"captions": {"shuffle": False}}, adapter={"rank": 4}).recipe.to_dict()
    assert (recipe["data"]["captions"]["shuffle"], recipe["data"]["captions"]["keep_tokens"]) == (False, 2)
    assert (recipe["adapter"]["rank"], recipe["adapter"]["alpha"]) == (4, 2.0)


def test_the_callers_own_values_stay(pictures: Path) -> None:
    given: dict[str, Any] = {"data": {"folder": str(pictures), "captions": {"keep_tokens": 2}}}
    lb.validate(given, data={"captions": {"keep_tokens": 1}})
    assert given == {"data": {"folder": str(pictures), "captions": {"keep_tokens": 2}}}


def test_what_is_no_section_is_said(pictures: Path) -> None:
    wrong: Any = 8
    with pytest.raises(lb.UserError, match=r"adapter +is a section, such as \[adapter\], not a single value"):
        lb.validate(pictures, adapter=wrong)
    with pytest.raises(lb.UserError, match=r"'adapter\.rank': 'adapter' is a value, not a section"):
        lb.validate({"data": {"folder": str(pictures)}, "adapter": 8}, adapter={"rank": 2})


def test_settings_are_not_dropped_beside_what_is_checked(pictures: Path, tmp_path: Path) -> None:
    checked = lb.validate(pictures, **SMALL)
    with pytest.raises(lb.UserError, match=r"checked already, and adapter and train would change it.*validate\(\)"):
        lb.train(checked, tmp_path / "run", adapter={"rank": 2}, train={"length": "4 steps"})
    assert not (tmp_path / "run").exists()


# ---- training


def test_the_verb_can_be_called_when_its_room_is_imported(trained: Any) -> None:
    code = """
import lorabake as lb
from lorabake.train.run import Outcome
import lorabake.train.run as room
assert room.Outcome is Outcome
try:
    lb.train("nowhere")
except lb.UserError as error:
    assert "does not exist" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_stopped_and_goes_on_where_asked(pictures: Path, home: Path) -> None:
    outcome = lb.train(pictures, "~/runs/x", stop=lambda: True, **SMALL)
    assert outcome.steps == 1 and outcome.run.folder == home / "runs" / "x"
    longer = {**SMALL, "train": {**SMALL["train"], "length": "3 steps"}}
    told: list[Any] = []
    with pytest.raises(lb.UserError, match=r"train\.length"):
        lb.train(pictures, "~/runs/x", continue_changed=lambda changes: told.extend(changes) or False, **longer)
    assert [str(change).split()[0].rstrip(":") for change in told] == ["train.length"]
    assert lb.train(pictures, "~/runs/x", continue_changed=True, **longer).steps == 3
    assert not Path("~").exists()


# ---- drawing


def test_pictures_say_how_they_were_made(trained: Any) -> None:
    (picture,) = lb.generate(LINE, loras={trained.run.checkpoint_paths()[0]: 0.5})
    text, _, values = parse(picture.info["parameters"])
    assert (
        text == "1girl, red hair <lora:mira:0.5>"
        and values.items() >= {"Seed": "3", "Steps": "2", "Model": "pocket"}.items()
    )
    same = lb.generate([Prompt("1girl, red hair", seed=3, steps=2)], loras=[(trained.run.checkpoint_paths()[0], 0.5)])
    assert same[0].tobytes() == picture.tobytes() and same[0].info == picture.info


def test_what_is_probably_not_meant_is_told(trained: Any) -> None:
    with pytest.warns(UserWarning, match="tokens; 75 are read") as found:
        lb.generate(LONG)
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match="tokens; 75 are read") as found:
        lb.grid(trained.run, LONG)
    assert found[0].filename == __file__
    told: list[str] = []
    lb.grid(trained.run, [LONG], last=1, on_note=told.append)
    assert len(told) == 1


def test_running_averages_are_rows_of_their_own(pictures: Path, tmp_path: Path) -> None:
    done = lb.train(
        pictures, tmp_path / "run", adapter={"rank": 1}, save={"every": "1 steps"}, output={"name": "mira"},
        train={"length": "2 steps", "device": "cpu", "ema": [0.9]},
    )  # fmt: skip
    names = ["mira-step00000001-ema0.9", "mira-step00000001", "mira-ema0.9", "mira"]
    files = [done.run.checkpoints / f"{name}.safetensors" for name in names]
    assert lb.grid(done.run, LINE).tobytes() == lb.grid(files, LINE).tobytes()
    newest = lb.grid(done.run, LINE, last=1).tobytes()
    assert newest == lb.grid(files[2:], LINE).tobytes() == lb.grid(files, LINE, last=2).tobytes()
    assert newest != lb.grid(files[:2], LINE).tobytes()


def test_files_at_home_are_found(trained: Any, home: Path) -> None:
    home.mkdir()
    file = shutil.copy(trained.run.checkpoint_paths()[-1], home / "mira.safetensors")
    expected = lb.generate(LINE, loras=[file])[0].tobytes()
    assert lb.generate(LINE, loras=["~/mira.safetensors"])[0].tobytes() == expected
    shutil.copytree(trained.run.folder, home / "run")
    sizes = {lb.grid(run, LINE).size for run in ("~/run", ["~/run"], "~/mira.safetensors", ["~/mira.safetensors"])}
    assert len(sizes) == 1


@pytest.mark.parametrize("verb", [lambda **on: lb.generate(LINE, **on), lambda **on: lb.grid(["x"], LINE, **on)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(verb: Any, trained: Any, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copy(trained.run.checkpoint_paths()[-1], tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lb.UserError, match=r'^device is "cuda", and PyTorch finds no GPU here'):
        verb(device="cuda")


def test_models_draw_in_the_precision_that_is_asked_for() -> None:
    usual, fp32, bf16 = (
        lb.generate(LINE, device="cpu", precision=precision)[0].tobytes() for precision in (None, "fp32", "bf16")
    )
    assert usual == fp32 != bf16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_if_there_is_one() -> None:
    torch.cuda.reset_peak_memory_stats()
    lb.generate(LINE, device="cpu")
    assert torch.cuda.max_memory_allocated() == 0
    lb.generate(LINE)
    assert torch.cuda.max_memory_allocated() > 0
