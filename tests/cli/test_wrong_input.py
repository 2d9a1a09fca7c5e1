"""Wrong input: exit code 2, everything that is wrong in one message, nothing written, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.places import POCKET_MODEL

Look = Callable[[], dict[str, bytes]]


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return spoil


def break_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])


def recipe(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "recipe.toml").write_text(text)

    return write


def nothing(folder: Path) -> None:
    pass


CASES: list[tuple[str, Callable[[Path], None], list[str], list[str]]] = [
    ("missing folder", nothing, ["nowhere"], ["'nowhere' does not exist"]),
    ("no pictures", remove("*.png"), ["mira"], ["data.folder", "no pictures", "3 x .txt"]),
    ("no captions at all", remove("*.txt"), ["mira"], ["data.captions", "none of the 3 pictures has a caption", "data.captions.prefix"]),
    ("unreadable pictures only", break_pictures, ["mira"], ["data.folder", "none of the 3 pictures can be used", "000.png"]),
    ("unknown key", nothing, ["mira", "--set", "adapter.rnak=3"], ["adapter.rnak", "Did you mean 'rank'?"]),
    ("unknown section", nothing, ["mira", "--set", "adaptor.rank=3"], ["adaptor", "Did you mean 'adapter'?"]),
    ("wrong type", nothing, ["mira", "--set", "adapter.rank=many"], ["adapter.rank", "'many'", "valid integer"]),
    ("rank 0", nothing, ["mira", "--set", "adapter.rank=0"], ["adapter.rank", "greater than or equal to 1"]),
    ("not divisible", nothing, ["mira", "--set", "data.buckets.resolution=100"], ["data.buckets.resolution", "not a multiple of step 32", "96x96"]),
    ("no model", nothing, ["mira", "--base", "mira"], ["model.base", "is not a model folder", "model_index.json"]),
    ("no such model", nothing, ["mira", "--base", "nowhere"], ["model.base", "does not exist", "pocket"]),
    ("not a setting", nothing, ["mira", "--set", "rank"], ["'rank' is not a setting", "section.name=value"]),
    ("nothing to train", nothing, ["mira", "--set", "optimizer.lr=0"], ["optimizer.lr", "nothing would be trained"]),
    ("broken TOML", recipe("[adapter\n"), ["mira/recipe.toml"], ["recipe.toml is not valid TOML", "line 1"]),
    ("recipe without data", recipe("[adapter]\nrank = 4\n"), ["mira/recipe.toml"], ["data.folder", "is needed"]),
    ("a picture for a recipe", nothing, ["mira/000.png"], ["000.png is not UTF-8 text"]),
    ("several", remove("*.txt"), ["mira", "--set", "adapter.rank=0", "--set", "train.length=8", "--set", "save.dtype=fp8", "--base", "nowhere"],
     ["has 5 problems", "adapter.rank", "train.length", "save.dtype", "model.base", "data.captions"]),
]  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "validate"])
@pytest.mark.parametrize(("spoil", "words", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_it_is_refused(
    lorabake: Any,
    dataset: Path,
    everything: Look,
    verb: str,
    spoil: Callable[[Path], None],
    words: list[str],
    expected: list[str],
) -> None:
    spoil(dataset)
    before = everything()
    said = lorabake(verb, *words)
    assert said.code == 2 and said.out == ""
    assert [word for word in expected if word not in said.err] == []
    assert "Nothing was started." in said.err or "is not a setting" in said.err or "UTF-8" in said.err
    assert everything() == before


def test_for_programs_errors_are_json_too(lorabake: Any, dataset: Path) -> None:
    said = lorabake("validate", "mira", "--json", "--set", "adapter.rank=0")
    assert said.code == 2 and said.out == ""
    assert json.loads(said.err)["error"] == "Problems" and "adapter.rank" in json.loads(said.err)["message"]


@pytest.mark.parametrize("words", [[], ["tarin"], ["train"], ["train", "mira", "--nonsense"], ["list", "--jsno"]])
def test_what_is_no_command(lorabake: Any, dataset: Path, everything: Look, words: list[str]) -> None:
    before = everything()
    said = lorabake(*words)
    assert said.code == 2 and "usage: lorabake" in said.err
    assert everything() == before


def test_a_model_without_weights_starts_nothing(lorabake: Any, dataset: Path, everything: Look, tmp_path: Path) -> None:
    shutil.copytree(POCKET_MODEL, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    before = everything()
    said = lorabake("train", "mira", "--base", "base")
    assert said.code == 2 and ".safetensors" in said.err
    assert {name for name in everything() if not name.startswith("runs")} == set(before)
    assert not (tmp_path / "runs" / "mira" / "run.json").exists(), (
        "a run that never began stands in the way of the next"
    )


def test_more_clip_skip_than_layers(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    said = lorabake("train", "mira", "--set", "model.clip_skip=12", "--set", "train.device=cpu")
    assert said.code == 2 and "clip_skip" in said.err
    assert not (tmp_path / "runs" / "mira" / "run.json").exists()


def test_a_prompt_that_cannot_be_read(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    said = lorabake("train", "mira", "--set", 'sample.prompts=["mira --s many"]', "--set", "train.device=cpu")
    assert said.code == 2 and "many" in said.err
    assert not (tmp_path / "runs" / "mira" / "run.json").exists()


def test_a_prompt_that_cannot_be_drawn_never_ends_the_run(lorabake: Any, dataset: Path) -> None:
    said = lorabake("train", "mira", "--set", 'sample.prompts=["mira --w 65"]', "--set", "train.device=cpu", "--set", "train.length=1 steps",
                    "--set", "adapter.rank=1")  # fmt: skip
    assert said.code in (0, 2), "either it is refused before the start, or it is told of and training goes on"
    assert "65" in said.err
