"""Reading recipes: every problem at once, and nothing guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problem, UserError
from lorabake.recipe.load import changed, parse_sections, read_raw

Write = Callable[[str], Path]


def problems(**raw: Any) -> dict[str, str]:
    """What is wrong with sections, by place."""
    found: list[Problem] = []
    parse_sections({"data": {"folder": "x"}, **raw}, found)
    assert len({problem.where for problem in found}) == len(found), "one problem a place"
    return {problem.where: problem.what for problem in found}


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("a misspelt setting", {"adapter": {"rnak": 3}}, "adapter.rnak", "not a setting of 'lora'. Did you mean 'rank'?"),
    ("of another part", {"adapter": {"name": "full", "rank": 3}}, "adapter.rank", "not a setting of 'full'. It has none."),
    ("a misspelt rate", {"optimizer": {"lrr": 1}}, "optimizer.lrr", "not a setting of 'adamw'. Did you mean 'lr'?"),
    ("nested", {"data": {"folder": "x", "buckets": {"resolutoin": 64}}}, "data.buckets.resolutoin",
     "not a setting of 'data.buckets'. Did you mean 'resolution'?"),
    ("a section", {"adaptor": {}}, "adaptor", "not a section of a recipe. Did you mean 'adapter'?"),
    ("a part", {"adapter": {"name": "lorra"}}, "adapter.name", "'lorra' is not a known adapter. Did you mean 'lora'?"),
    ("a part that is no name", {"adapter": {"name": 3}}, "adapter.name", "'3' is not a known adapter."),
    ("a rule", {"objective": {"weighting": "min-snrr"}}, "objective.weighting", "'min-snrr' is not known. Did you mean 'min-snr'?"),
    ("rank 0", {"adapter": {"rank": 0}}, "adapter.rank", "0: should be greater than or equal to 1."),
    ("text for a number", {"adapter": {"rank": "16"}}, "adapter.rank", "'16': should be a valid integer."),
    ("true for a number", {"adapter": {"rank": True}}, "adapter.rank", "True: should be a valid integer."),
    ("a broken number", {"adapter": {"rank": 1.5}}, "adapter.rank", "1.5: should be a valid integer."),
    ("a number for true", {"data": {"folder": "x", "flip": 1}}, "data.flip", "1: should be a valid boolean."),
    ("no number", {"optimizer": {"lr": float("nan")}}, "optimizer.lr", "nan: should be a finite number."),
    ("infinity", {"train": {"max_grad_norm": float("inf")}}, "train.max_grad_norm", "inf: should be a finite number."),
    ("a length without unit", {"train": {"length": 2400}}, "train.length",
     "'2400' needs a number and a unit, such as \"8 epochs\" or \"2400 steps\"."),
    ("no length", {"save": {"every": "0 epochs"}}, "save.every", "'0 epochs' is not a length: it must be at least 1."),
    ("one of a few", {"save": {"dtype": "fp8"}}, "save.dtype", "'fp8': should be 'fp16', 'bf16' or 'fp32'."),
    ("several types", {"data": {"folder": "x", "buckets": {"resolution": "x"}}}, "data.buckets.resolution",
     "'x': should be a valid integer or a list."),
    ("inside a list", {"optimizer": {"betas": [0.9, 2]}}, "optimizer.betas", "2: should be less than 1."),
    ("too short a list", {"optimizer": {"name": "came", "betas": [0.9, 0.99]}}, "optimizer.betas",
     "[0.9, 0.99]: has too few values, there must be 3 or more."),
    ("too long a list", {"optimizer": {"betas": [0.9, 0.9, 0.9]}}, "optimizer.betas", "Tuple should have at most 2 items"),
    ("a rule of two settings", {"objective": {"min_timestep": 500, "max_timestep": 100}}, "objective",
     "min_timestep 500 must be below max_timestep 100: nothing lies between."),
    ("a nested rule", {"data": {"folder": "x", "captions": {"separator": "|"}}}, "data.captions", "must not share a character."),
    ("a value for a section", {"adapter": "lora"}, "adapter", "is a section, such as [adapter], not a single value."),
    ("a value for a nested one", {"data": {"folder": "x", "buckets": 3}}, "data.buckets", "3: "),
    ("a value for settings", {"train": 3}, "train", "is a section, such as [train], not a single value."),
    ("a folder in a name", {"output": {"name": "../x"}}, "output.name", "'../x' cannot be a file name everywhere."),
    ("a hidden name", {"output": {"name": ".."}}, "output.name", "'..' cannot be a file name everywhere."),
    ("no folder", {"data": {}}, "data.folder", "is needed and not given."),
    ("a name that is no text", {"data": {"folder": "\udcff"}}, "data", "not valid Unicode text."),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "where", "what"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_wrong_is_said(raw: dict[str, Any], where: str, what: str) -> None:
    found = problems(**raw)
    assert list(found) == [where]
    assert what in found[where]
    assert found[where].endswith((".", "?"))


def test_everything_at_once() -> None:
    raw: dict[str, Any] = {}
    for name, sections, _, _ in WRONG:
        if name in (
            "a misspelt setting",
            "a misspelt rate",
            "nested",
            "a section",
            "a rule",
            "a length without unit",
            "one of a few",
        ):
            for section, values in sections.items():
                raw[section] = {**raw.get(section, {}), **values}
    assert problems(**raw).keys() == {
        "adaptor", "data.buckets.resolutoin", "train.length", "save.dtype", "adapter.rnak", "objective.weighting", "optimizer.lrr"
    }  # fmt: skip


def test_whole_numbers_are_numbers() -> None:
    assert problems(optimizer={"lr": 1, "eps": 1}, data={"folder": "x", "buckets": {"resolution": [64, 128]}}) == {}


# ---- files


def test_a_folder_is_a_recipe_of_its_own(dataset: Path) -> None:
    assert read_raw(dataset) == {"data": {"folder": str(dataset)}}


def test_relative_paths_count_from_the_recipe(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file('[data]\nfolder = "2_mira"\n[model]\nbase = "../models/sd15"')
    (tmp_path / "elsewhere").mkdir()
    for here in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(here)
        raw = read_raw(Path(os.path.relpath(path)))
        assert raw["data"]["folder"] == str(path.parent / "2_mira")
        assert raw["model"]["base"] == str(tmp_path / "models" / "sd15")


def test_absolute_paths_home_and_pocket_stay(recipe_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/mira")
    monkeypatch.setenv("USERPROFILE", "/home/mira")
    raw = read_raw(recipe_file('[data]\nfolder = "/abs/x"\n[model]\nbase = "pocket"'))
    assert raw == {"data": {"folder": os.path.abspath("/abs/x")}, "model": {"base": "pocket"}}
    raw = read_raw(recipe_file('[data]\nfolder = "~/x"\n[model]\nbase = "~/models/pocket"'))
    assert raw["data"]["folder"] == os.path.abspath("/home/mira/x")
    assert raw["model"]["base"] == os.path.abspath("/home/mira/models/pocket")


def test_a_dataset_may_be_called_pocket(recipe_file: Write) -> None:
    path = recipe_file('[data]\nfolder = "pocket"')
    assert read_raw(path)["data"]["folder"] == str(path.parent / "pocket")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[data\n", r"recipe\.toml is not valid TOML: .*line 1"),
        (b"a = 1\na = 2\n", r"is not valid TOML"),
        (b"\xff\xfe\x00", r"is not UTF-8 text"),
    ],
)
def test_files_that_are_no_recipes(dataset: Path, content: bytes, message: str) -> None:
    path = dataset / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_raw(path)


def test_a_byte_order_mark_is_no_trouble(recipe_file: Write) -> None:
    assert read_raw(recipe_file("\ufeff[adapter]\nrank = 2"))["adapter"] == {"rank": 2}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*nowhere' does not exist\. Give a recipe file"):
        read_raw(tmp_path / "nowhere")


# ---- --set


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("adapter.rank=32", "adapter", "rank", 32),
        (" adapter.rank = 32 ", "adapter", "rank", 32),
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("train.length=8 epochs", "train", "length", "8 epochs"),
        ('train.length="8 epochs"', "train", "length", "8 epochs"),
        ("data.flip=true", "data", "flip", True),
        ("data.flip=True", "data", "flip", "True"),
        ("data.buckets.resolution=[64, 96]", "data", "buckets", {"resolution": [64, 96]}),
        ("output.comment=a=b", "output", "comment", "a=b"),
        ("output.comment=", "output", "comment", ""),
        ("adapter.name=full", "adapter", "name", "full"),
    ],
)
def test_one_setting_on_the_command_line(dataset: Path, override: str, section: str, name: str, value: Any) -> None:
    assert read_raw(dataset, [override])[section][name] == value


def test_the_command_line_wins_and_the_last_wins(recipe_file: Write) -> None:
    path = recipe_file("[adapter]\nrank = 2\nalpha = 1.0")
    assert read_raw(path, ["adapter.rank=4", "adapter.rank=8"])["adapter"] == {"rank": 8, "alpha": 1.0}


@pytest.mark.parametrize("override", ["adapter.rank", "rank=3", "=3", ""])
def test_what_is_no_setting(dataset: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"is not a setting\. Write it as section\.name=value"):
        read_raw(dataset, [override])


def test_a_value_is_not_a_section(recipe_file: Write) -> None:
    with pytest.raises(UserError, match="'rank' is a value, not a section"):
        read_raw(recipe_file("[adapter]\nrank = 2"), ["adapter.rank.x=3"])


# ---- plain values


def test_dates_are_text_wherever_they_stand(recipe_file: Write) -> None:
    path = recipe_file("[output]\ncomment = 2026-01-01\n[data]\nmore = [{ at = 07:30:00 }, 2026-01-01T07:30:00]")
    raw = read_raw(path, ["output.author=2026-02-03"])
    assert raw["output"] == {"comment": "2026-01-01", "author": "2026-02-03"}
    assert raw["data"]["more"] == [{"at": "07:30:00"}, "2026-01-01 07:30:00"]
    assert json.loads(json.dumps(raw)) == raw


def test_changes_go_into_tables_and_leave_the_rest() -> None:
    raw: dict[str, Any] = {"data": {"folder": "x", "captions": {"shuffle": True, "keep_tokens": 1}}}
    after = changed(raw, {"data": {"captions": {"keep_tokens": 2}}, "adapter": {"rank": 2}, "train": {}})
    assert after == {"data": {"folder": "x", "captions": {"shuffle": True, "keep_tokens": 2}}, "adapter": {"rank": 2}}
    assert raw["data"]["captions"] == {"shuffle": True, "keep_tokens": 1}
