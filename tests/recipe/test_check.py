"""Everything that can be wrong before a run is found before it, and told at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems, UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.recipe import check, check_values

Write = Callable[[str], Path]


def wrong(raw: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(Problems) as caught:
        check_values(raw)
    return {problem.where: problem.what for problem in caught.value.problems}


def captions_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.txt"))


def test_a_folder_of_pictures_is_enough(dataset: Path) -> None:
    checked = check(dataset)
    recipe = checked.recipe
    assert recipe.output.name == "mira" and recipe.data.folder == dataset
    assert recipe.data.buckets.resolution == 64 and recipe.data.buckets.step == 32
    assert len(checked.placements) == len(checked.dataset.samples) == 4
    assert checked.warnings == ()


def test_the_whole_message(recipe_file: Write) -> None:
    path = recipe_file(
        '[data]\nfolder = "2_mira"\n[data.buckets]\nresolution = 100\n[adapter]\nrnak = 8\n[optimizer]\nname = "adamww"\n'
        '[model]\nbase = "nowhere"\n'
    )
    with pytest.raises(Problems) as caught:
        check(path)
    base = path.parent / "nowhere"
    assert str(caught.value) == (
        f"{path} has 3 problems.\n"
        "  adapter.rnak    not a setting of 'lora'. Did you mean 'rank'?\n"
        "  optimizer.name  'adamww' is not a known optimizer. Did you mean 'adamw'?\n"
        f"  model.base      '{base}' does not exist. Give a .safetensors file, a model folder in diffusers layout, or 'pocket' for the embedded model.\n"
        "Nothing was started. `lorabake explain SECTION` lists what a section accepts."
    )


def test_settings_model_dataset_and_sizes_at_once(dataset: Path) -> None:
    raw = {
        "data": {"folder": str(dataset), "buckets": {"resolution": 100}},
        "adapter": {"rank": 0},
        "optimizer": {"lr": 0},
    }
    assert wrong(raw) == {
        "adapter.rank": "0: should be greater than or equal to 1.",
        "data.buckets.resolution": "100x100 is not a multiple of step 32. Nearest: 96x96.",
        "optimizer.lr": "0 here and for the text encoder: nothing would be trained. Give one of them a value.",
    }


def test_a_step_the_model_cannot_take(dataset: Path) -> None:
    found = wrong({"data": {"folder": str(dataset), "buckets": {"resolution": 64, "step": 16}}})
    assert found == {"data.buckets.step": "16: pocket needs sides in multiples of 32 pixels."}


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "broken"])
def test_folders_that_are_no_datasets(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    if kind == "file":
        folder.write_text("x")
    elif kind != "absent":
        folder.mkdir()
    if kind == "broken":
        (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    found = wrong({"data": {"folder": str(folder)}})
    expected = {
        "absent": "no such folder",
        "empty": "no pictures",
        "file": "is a file",
        "broken": "none of the 1 pictures can be used",
    }
    assert list(found) == ["data.folder"] and expected[kind] in found["data.folder"]


@pytest.mark.parametrize("kind", ["empty", "no unet", "file"])
def test_folders_that_are_no_models(dataset: Path, tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    if kind == "no unet":
        shutil.copytree(POCKET_MODEL, base, ignore=shutil.ignore_patterns("unet"))
    elif kind == "file":
        base.write_text("x")
    else:
        base.mkdir()
    found = wrong({"data": {"folder": str(dataset)}, "model": {"base": str(base)}})
    assert list(found) == ["model.base"] and str(base) in found["model.base"]


# ---- captions


@pytest.fixture
def silent(dataset: Path) -> Path:
    """The pictures directly in a folder, without captions."""
    folder = dataset.parent / "silent"
    folder.mkdir()
    for path in dataset.rglob("*.png"):
        shutil.copy(path, folder)
    return folder


def test_no_captions_at_all_is_an_error_that_says_what_to_do(silent: Path) -> None:
    what = wrong({"data": {"folder": str(silent)}})["data.captions"]
    assert what.startswith("none of the 4 pictures has a caption. Write one beside each")
    assert all(word in what for word in ("10_name", "data.captions.prefix", "caption_dropout = 1"))


def test_empty_captions_are_none(silent: Path) -> None:
    for path in silent.glob("*.png"):
        path.with_suffix(".txt").write_text(" \n")
    assert "data.captions" in wrong({"data": {"folder": str(silent)}})


@pytest.mark.parametrize("captions", [{"prefix": "mira"}, {"suffix": "mira"}, {"caption_dropout": 1.0}])
def test_ways_to_train_without_caption_files(silent: Path, captions: dict[str, Any]) -> None:
    check_values({"data": {"folder": str(silent), "captions": captions}})


def test_the_folders_name_is_a_caption(dataset: Path) -> None:
    for path in captions_of(dataset):
        path.unlink()
    checked = check(dataset)
    assert {sample.caption for sample in checked.dataset.samples} == {"mira"}
    assert any("caption" in warning for warning in checked.warnings)


def test_one_caption_is_enough_and_the_others_are_told_of(dataset: Path) -> None:
    for path in captions_of(dataset)[1:]:
        path.unlink()
    assert any("3 of 4 pictures have no caption file" in warning for warning in check(dataset).warnings)


# ---- what is allowed and probably not meant


def test_settings_that_do_nothing_are_told_of(dataset: Path) -> None:
    data = {"folder": str(dataset), "captions": {"keep_tokens": 2}, "buckets": {"enabled": False, "min": 32}}
    warnings = check_values({"data": data}).warnings
    assert [warning.partition(" ")[0] for warning in warnings] == ["data.captions.keep_tokens", "data.buckets.min"]


def test_a_dropped_file_is_told_of_once(dataset: Path) -> None:
    (dataset / "2_mira" / "bad.png").write_bytes(b"no picture")
    warnings = check(dataset).warnings
    assert sum("bad.png" in warning for warning in warnings) == 1


def test_sixteen_bits_are_too_few_to_train_a_whole_model(dataset: Path) -> None:
    raw = {"data": {"folder": str(dataset)}, "adapter": {"name": "full"}}
    found = wrong({**raw, "train": {"precision": "bf16"}})
    assert list(found) == ["train.precision"] and "fp32" in found["train.precision"]
    assert check_values({**raw, "train": {"device": "cuda"}}).recipe.train.precision == "fp32"


# ---- where it is started from


def test_the_same_recipe_from_anywhere(recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_file('[data]\nfolder = "2_mira"')
    seen = []
    for here in (path.parent, tmp_path):
        monkeypatch.chdir(here)
        seen.append(check(Path(os.path.relpath(path))).recipe)
    assert seen[0] == seen[1] and seen[0].to_dict() == seen[1].to_dict()


def test_values_count_from_the_current_folder(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    assert check_values({"data": {"folder": "mira"}}).recipe.data.folder == dataset
    assert check(dataset, ["data.folder=mira/2_mira"]).recipe.data.folder == dataset / "2_mira"


def test_given_values_are_not_changed(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    raw = {"data": {"folder": "mira"}, "adapter": {"name": "lora", "rank": 2}, "optimizer": {"lr": 1e-3}}
    check_values(raw)
    assert raw == {"data": {"folder": "mira"}, "adapter": {"name": "lora", "rank": 2}, "optimizer": {"lr": 1e-3}}


def test_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        check(tmp_path / "nothing")


def test_what_is_for_lora_files_alone_is_told(dataset: Path) -> None:
    raw = {
        "data": {"folder": str(dataset)},
        "adapter": {"name": "full"},
        "save": {"dtype": "bf16"},
        "output": {"trigger": "mira"},
    }
    whole = "adapter 'full' saves model folders"
    told = check_values(raw).warnings
    assert f"save.dtype = bf16 does nothing: {whole}, always in fp32." in told
    assert f"output.trigger = mira does nothing: {whole}, which have no place for it." in told
    assert not any(whole in warning for warning in check_values(raw | {"adapter": {"name": "lora"}}).warnings)


def test_prompts_of_samples_are_read_before_a_run(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a girl --s 20\na boy --s many\n")
    prompts = ["fine --s 5", "a girl --zz 3", "a boy --ss dpm"]
    found = wrong(
        {
            "data": {"folder": str(dataset)},
            "sample": {"prompts": prompts, "prompts_file": str(tmp_path / "prompts.txt")},
        }
    )
    assert "--zz is not an option" in found["sample.prompts 2"]
    assert "'dpm' is not offered" in found["sample.prompts 3"]
    assert "many" in found["sample.prompts_file"]
    found = wrong({"data": {"folder": str(dataset)}, "sample": {"prompts": ["a girl --w 65 --ss flow-euler --g 3"]}})
    assert "65 is not a multiple of 32; use 64 or 96" in found["sample.prompts 1"]
    found = wrong({"data": {"folder": str(dataset)}, "sample": {"prompts_file": "nowhere.txt"}})
    assert "nowhere.txt" in found["sample.prompts_file"]
