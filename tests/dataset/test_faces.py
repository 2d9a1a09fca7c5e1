"""Faces in photographs, and what is said where they cannot be looked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from lorabake.base.errors import MissingExtra
from lorabake.dataset.faces import faces_in, find_faces, require_faces


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """A portrait of 512 x 512 pixels (NASA, public domain); the face is about at (173..272, 63..190)."""
    from skimage.data import astronaut

    return Image.fromarray(astronaut())


def test_the_largest_face_comes_first(astronaut: Image.Image) -> None:
    (left, top, width, height), *others = faces_in(astronaut)
    assert left < 224 < left + width and top < 120 < top + height
    assert 70 < width < 180 and width == height
    assert all(other[2] <= width for other in others)


def test_boxes_are_in_pixels_of_the_picture_whatever_its_size(astronaut: Image.Image) -> None:
    large = astronaut.resize((2048, 2048), Image.Resampling.LANCZOS)
    small_box, large_box = faces_in(astronaut)[0], faces_in(large)[0]
    assert large_box == pytest.approx([4 * side for side in small_box], rel=0.15)


def test_pictures_without_faces(tmp_path: Path) -> None:
    for index in range(3):
        Image.effect_noise((200, 150 + index), 20).convert("RGB").save(tmp_path / f"{index}.png")
    assert list(find_faces(sorted(tmp_path.iterdir()))) == [[], [], []]


def test_the_same_faces_every_time(astronaut: Image.Image, tmp_path: Path) -> None:
    astronaut.save(tmp_path / "a.png")
    once, *others = find_faces([tmp_path / "a.png"] * 6)
    assert once == faces_in(astronaut) and all(other == once for other in others)


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'lorabake\[faces\]'"):
        require_faces()
