"""Several folders as one dataset: repeats by name, nothing twice, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from lorabake.base.errors import Problems
from lorabake.dataset.folder import open_dataset
from lorabake.dataset.several import open_datasets


def captioned(path: Path, text: str | None = "a, b") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    return path


def test_folders_stand_as_folders_of_a_dataset_would(tmp_path: Path) -> None:
    captioned(tmp_path / "one" / "10_suzu" / "1.png", "suzu")
    captioned(tmp_path / "one" / "2.png", "plain")
    captioned(tmp_path / "elsewhere" / "5_style" / "3.png", None)
    captioned(tmp_path / "elsewhere" / "more" / "4.png", None)
    dataset = open_datasets(
        [tmp_path / "one", tmp_path / "elsewhere" / "5_style", tmp_path / "elsewhere" / "more"], class_tokens="a girl"
    )
    assert [(s.name, s.folder, s.repeats, s.caption, s.caption_source) for s in dataset.samples] == [
        ("one/10_suzu/1.png", "one/10_suzu", 10, "suzu", "txt"),
        ("one/2.png", "one", 1, "plain", "txt"),
        ("5_style/3.png", "5_style", 5, "style", "folder"),
        ("more/4.png", "more", 1, "a girl", "class_tokens"),
    ]
    assert (dataset.path, dataset.entries) == (tmp_path / "one", 17)
    assert dataset.account() == "4 used (1 in one/10_suzu × 10, 1 in one × 1, 1 in 5_style × 5, 1 in more × 1)"
    assert not any("Open the folder above" in note for note in dataset.notes)


def test_one_alone_is_opened_as_ever(tmp_path: Path) -> None:
    captioned(tmp_path / "10_suzu" / "1.png")
    assert open_datasets([tmp_path / "10_suzu"]) == open_dataset(tmp_path / "10_suzu")


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for above in "abc":
        captioned(tmp_path / above / "3_x" / "1.png")
    dataset = open_datasets([tmp_path / above / "3_x" for above in "abc"])
    assert [(sample.name, sample.repeats) for sample in dataset.samples] == [
        ("3_x/1.png", 3),
        ("3_x (2)/1.png", 3),
        ("3_x (3)/1.png", 3),
    ]


def test_what_is_not_used_is_told_with_its_folder(tmp_path: Path) -> None:
    captioned(tmp_path / "a" / "1.png")
    captioned(tmp_path / "b" / "2_x" / "1.png")
    (tmp_path / "b" / "2_x" / "broken.png").write_bytes(b"")
    dataset = open_datasets([tmp_path / "a", tmp_path / "b"])
    (dropped,) = dataset.summary()["dropped"]
    assert dropped["name"] == "b/2_x/broken.png" and "empty" in dropped["reason"]
    assert dataset.account().endswith(", 1 not")


def test_everything_wrong_in_any_of_them_comes_at_once(tmp_path: Path) -> None:
    captioned(tmp_path / "a" / "0_none" / "1.png")
    captioned(tmp_path / "0_b" / "1.png")
    with pytest.raises(Problems) as caught:
        open_datasets([tmp_path / "a", tmp_path / "0_b", tmp_path / "gone"])
    told = {problem.where: problem.what for problem in caught.value.problems}
    assert "asks for 0 repeats" in told["a/0_none"] and "asks for 0 repeats" in told["0_b/0_b"]
    assert "no such folder" in told["gone/folder"]


def test_no_picture_is_used_twice(tmp_path: Path) -> None:
    captioned(tmp_path / "a" / "2_x" / "1.png")
    os.symlink(tmp_path / "a", tmp_path / "link")
    for again, what in (
        (tmp_path / "a", "given twice"),
        (tmp_path / "link", "given twice"),
        (tmp_path / "a" / "2_x", "lies in another"),
    ):
        with pytest.raises(Problems, match=what):
            open_datasets([tmp_path / "a", again])
