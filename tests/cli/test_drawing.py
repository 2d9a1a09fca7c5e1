"""Pictures and grids from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.sampling.infotext import infotext_of

SMALL = ["--set", "train.length=1 steps", "--set", "train.device=cpu"]
QUICK = ["--device", "cpu"]


def test_pictures_are_never_written_over(lorabake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = lorabake("generate", "1girl, red hair --s 1", "1girl, sky --s 1", "--json", *QUICK).json
    assert first == [str(Path("pictures", name)) for name in ("0000_0.png", "0001_0.png")]
    Path("pictures", "notes_0007_0.png").touch()  # none of ours
    assert lorabake("generate", "1girl, beach --s 1", "--json", *QUICK).json == [str(Path("pictures", "0002_0.png"))]
    assert [infotext_of(path).partition("\n")[0] for path in sorted(Path("pictures").glob("0*.png"))] == [
        "1girl, red hair", "1girl, sky", "1girl, beach"
    ]  # fmt: skip
    (tmp_path / "pictures" / "0001_0.png").unlink()
    assert lorabake("generate", "1girl --s 1", "--json", *QUICK).json == [str(Path("pictures", "0003_0.png"))]


def test_one_picture_goes_where_it_is_told(lorabake: Any, tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    for prompt in ("1girl, red hair", "1girl, sky"):
        assert lorabake("generate", f"{prompt} --s 1", "--out", out, *QUICK).out == f"{out}\n"
        assert infotext_of(out).startswith(prompt)


def test_a_picture_is_drawn_again_from_what_it_says(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    line = "1girl, red hair --n blurry --d 7 --s 2 --l 3 --w 96 --h 64"
    assert lorabake("generate", line, "--out", first, *QUICK).code == 0
    assert lorabake("generate", "--prompts", first, "--out", again, *QUICK).code == 0
    assert again.read_bytes() == first.read_bytes()
    assert lorabake("train", "mira", "--set", "adapter.rank=1", *SMALL).code == 0
    for name, prompt in (("line", ["--prompt", line]), ("picture", ["--prompts", first])):
        assert lorabake("grid", "runs/mira", *prompt, "--out", tmp_path / f"{name}.png", *QUICK).code == 0
    assert (tmp_path / "picture.png").read_bytes() == (tmp_path / "line.png").read_bytes()
    said = lorabake("generate", "--prompts", tmp_path / "picture.png", *QUICK)
    assert said.code == 2 and "picture.png tells no prompt to draw. The text holds no generation parameters" in said.err
    said = lorabake("generate", "--prompts", tmp_path / "none.png", *QUICK)
    assert said.code == 2 and "none.png cannot be read as a picture" in said.err


def test_notes_are_told_once_and_beside_the_answer(lorabake: Any, dataset: Path) -> None:
    assert lorabake("train", "mira", "--set", "adapter.rank=1", *SMALL).code == 0
    long = ", ".join(["1girl, red hair"] * 40) + " --s 1"
    for words in (["generate", long, "--out", "x.png"], ["grid", "runs/mira", "--prompt", long, "--out", "x.png"]):
        said = lorabake(*words, *QUICK)
        assert said.code == 0 and said.out == "x.png\n" and said.err.count("note: ") == 1
        assert "75 are read" in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(lorabake: Any, dataset: Path) -> None:
    assert lorabake("train", "mira", "--set", "adapter.rank=1", *SMALL).code == 0
    for words in (["generate", "1girl"], ["grid", "runs/mira", "--prompt", "1girl"]):
        said = lorabake(*words, "--device", "cuda")
        assert said.code == 2 and 'device is "cuda", and PyTorch finds no GPU here' in said.err and not said.out


def test_precision_is_what_is_asked_for(lorabake: Any, tmp_path: Path) -> None:
    for name in ("fp32", "bf16"):
        words = ["generate", "1girl --s 1", "--precision", name, "--out", tmp_path / f"{name}.png", *QUICK]
        assert lorabake(*words).code == 0
    assert (tmp_path / "fp32.png").read_bytes() != (tmp_path / "bf16.png").read_bytes()


def test_blocks_that_wait_change_no_bit_of_a_picture(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    words = ["--set", "adapter.rank=2", "--set", "adapter.conv_rank=1", "--set", "optimizer.lr=0.05"]
    assert lorabake("train", "mira", *words, *SMALL).code == 0
    lora = Path("runs", "mira", "checkpoints", "mira.safetensors")
    verbs = {
        "generate": ["generate", "1girl, red hair --s 3 --l 4", "--lora", lora],
        "grid": ["grid", "runs/mira", "--prompt", "1girl, sky --s 2", "--weights", "0.5,1"],
    }
    for name, verb in verbs.items():
        whole, swapped = tmp_path / f"{name}.png", tmp_path / f"{name}-swapped.png"
        assert lorabake(*verb, "--out", whole, *QUICK).code == 0
        said = lorabake(*verb, "--out", swapped, "--blocks-to-swap", 4, *QUICK)
        assert said.code == 0 and said.out == f"{swapped}\n"
        assert said.err.count("note: blocks_to_swap: 4 of ") == 1 and "On a CPU that saves nothing." in said.err
        assert swapped.read_bytes() == whole.read_bytes(), name
        for count in (2, -1):
            said = lorabake(*verb, "--out", tmp_path / "no.png", "--blocks-to-swap", count, *QUICK)
            assert said.code == 2 and f"blocks_to_swap is {count}: two blocks are on the card" in said.err
    assert not (tmp_path / "no.png").exists()


def test_a_grid_of_whole_models_says_what_they_are(lorabake: Any, dataset: Path) -> None:
    assert lorabake("train", "mira", "--set", "adapter.name=full", *SMALL).code == 0
    said = lorabake("grid", "runs/mira", "--prompt", "1girl")
    folder = Path("runs", "mira", "checkpoints", "mira")
    assert said.code == 2 and f"--base {folder}" in said.err and "yet" not in said.err
    assert lorabake("generate", "1girl --s 1", "--base", folder, "--out", "x.png", *QUICK).code == 0
