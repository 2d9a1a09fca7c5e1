"""One folder or several in a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabake.base.errors import Problems
from lorabake.recipe import check, check_values
from lorabake.recipe.toml import to_toml


@pytest.fixture
def two(dataset: Path) -> tuple[Path, Path]:
    """The four pictures in two folders: two in mira/2_mira, two in 3_kavi beside it."""
    other = dataset.parent / "3_kavi"
    other.mkdir()
    for path in sorted((dataset / "2_mira").iterdir())[4:]:
        path.rename(other / path.name)
    return dataset, other


def test_a_list_counts_from_the_recipes_folder(two: tuple[Path, Path], recipe_file: Callable[[str], Path]) -> None:
    checked = check(recipe_file('[data]\nfolder = [".", "../3_kavi"]'))
    assert [(sample.name, sample.repeats) for sample in checked.dataset.samples] == [
        ("mira/2_mira/000.png", 2),
        ("mira/2_mira/001.png", 2),
        ("3_kavi/002.png", 3),
        ("3_kavi/003.png", 3),
    ]
    assert checked.recipe.data.folders == two
    assert (checked.recipe.output.name, checked.length.images_per_epoch) == ("mira", 10)
    assert "first dataset folder" in checked.recipe.why("output.name")


def test_the_frozen_recipe_says_the_same(two: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in (str(two[0]), [os.fspath(path) for path in two]):
        checked = check_values({"data": {"folder": folder}})
        frozen = tmp_path / "frozen.toml"
        frozen.write_text(to_toml(checked.recipe), encoding="utf-8")
        again = check(frozen)
        assert again.recipe == checked.recipe and again.recipe.to_dict()["data"]["folder"] == folder


def test_what_is_no_folder_is_refused(two: tuple[Path, Path]) -> None:
    for folder, what in (([], "an empty list"), ([str(two[0]), str(two[0])], "given twice"), (5, "5:")):
        with pytest.raises(Problems) as caught:
            check_values({"data": {"folder": folder}})
        (problem,) = caught.value.problems
        assert problem.where == "data.folder" and what in problem.what


def test_several_resolutions(two: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(two[1] / "003.png") as picture:
        picture.resize((60, 60)).save(two[1] / "003.png")
    raw = {"data": {"folder": [str(folder) for folder in two], "buckets": {"resolutions": [32, 64]}}}
    checked = check_values(raw)
    assert [(sample.name[-7:], place.bucket_wh[0]) for sample, place in zip(checked.samples, checked.placements, strict=True)] == [
        ("000.png", 32), ("000.png", 64), ("001.png", 32), ("001.png", 64), ("002.png", 32), ("002.png", 64), ("003.png", 32)
    ]  # fmt: skip
    assert checked.recipe.data.buckets.resolution == 64
    assert checked.length.images_per_epoch == 2 * 2 * 2 + 2 * 3 + 3
    (told,) = [text for text in checked.warnings if text.startswith("data.buckets.resolutions")]
    assert (
        "1 of 4 pictures are too small for resolution 64, and are trained on at smaller ones only: 3_kavi/003.png"
        in told
    )
    frozen = tmp_path / "frozen.toml"
    frozen.write_text(to_toml(checked.recipe), encoding="utf-8")
    assert check(frozen).recipe == checked.recipe


def test_class_tokens(two: tuple[Path, Path]) -> None:
    for path in two[1].glob("*.txt"):
        path.unlink()
    (two[1].rename(two[1].with_name("kavi")))
    folders = [str(two[0]), str(two[1].with_name("kavi"))]
    checked = check_values({"data": {"folder": folders, "class_tokens": "a girl"}})
    assert [caption.text for caption in checked.captions[2:]] == ["a girl"] * 2
    assert not any("class_tokens does" in warning for warning in checked.warnings)
    idle = check_values({"data": {"folder": folders[0], "class_tokens": "a girl"}})
    assert any(warning.startswith("data.class_tokens does nothing") for warning in idle.warnings)
