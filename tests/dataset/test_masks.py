"""Masks: what is read of them, how they get into the bucket, and which are of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorabake.dataset.buckets import BucketConfig, Placement, fit, place
from lorabake.dataset.folder import Dataset, open_dataset
from lorabake.dataset.image import read_mask, read_opacity
from lorabake.dataset.masks import MaskConfig, Masks, idle_settings, latent_mask, read_masks

CELL = 8
FILES = MaskConfig(source="files")


def half(size: tuple[int, int], mode: str = "L") -> Image.Image:
    """Black on the left, white on the right."""
    image = Image.new(mode, size, "black")
    image.paste("white", (size[0] // 2, 0, *size))
    return image


def write(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def opened(folder: Path, masks: dict[str, Image.Image | None], size: tuple[int, int] = (64, 64)) -> Dataset:
    """A dataset of pictures with these masks."""
    for name, mask in masks.items():
        write(folder / f"{name}.png", Image.new("RGB", size, "red"))
        if mask is not None:
            write(folder / "masks" / f"{name}.png", mask)
    return open_dataset(folder)


def look(dataset: Dataset, config: MaskConfig = FILES, side: int = 64) -> Masks:
    placements = [place(sample.size, BucketConfig(resolution=side, step=16)) for sample in dataset.samples]
    return read_masks(dataset.samples, placements, config, CELL)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
def test_white_is_one_and_black_is_nothing_whatever_the_mode(tmp_path: Path, mode: str) -> None:
    dataset = opened(tmp_path, {"a": half((64, 64)).convert(mode)})
    (mask,) = look(dataset).of_samples
    assert mask is not None and mask.dtype == np.float32
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 8


def test_greys_scale_and_what_is_transparent_is_black(tmp_path: Path) -> None:
    image = Image.new("LA", (16, 16), (255, 255))
    image.paste((255, 102), (0, 0, 8, 16))
    image.paste((51, 255), (8, 0, 16, 8))
    write(tmp_path / "mask.png", image)
    mask = latent_mask(read_mask(tmp_path / "mask.png"), Placement((16, 16), (16, 16), (0, 0, 16, 16)), CELL)
    np.testing.assert_allclose(mask, [[0.4, 0.2], [0.4, 1.0]], rtol=1e-6)


def test_sixteen_bits_are_scaled_and_cameras_turned(tmp_path: Path) -> None:
    write(tmp_path / "deep.png", Image.fromarray(np.full((8, 8), 65535 // 5, np.uint16)))
    assert read_mask(tmp_path / "deep.png").getextrema() == (51, 51)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    write(tmp_path / "turned.png", half((32, 16)), exif=exif)
    turned = np.asarray(read_mask(tmp_path / "turned.png"))
    assert turned.shape == (32, 16) and not turned[:16].any() and (turned[16:] == 255).all()


def test_a_cell_is_the_mean_of_its_pixels() -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[0, :4], pixels[:, 8:] = 255, 128
    mask = latent_mask(Image.fromarray(pixels), Placement((16, 8), (16, 8), (0, 0, 16, 8)), CELL)
    np.testing.assert_allclose(mask, [[4 / 64, 128 / 255]], rtol=1e-6)


@pytest.mark.parametrize("size", [(100, 64), (300, 200), (50, 33), (64, 64), (30, 90)])
def test_a_mask_goes_where_its_picture_goes(size: tuple[int, int]) -> None:
    """The picture of a mask, brought to its bucket as pictures are, has its edges in the same cells."""
    placement = place(size, BucketConfig(resolution=64, step=16))
    image = Image.new("L", size, "black")
    image.paste("white", (size[0] // 3, size[1] // 4, size[0] * 3 // 4, size[1] * 4 // 5))
    picture = np.asarray(fit(image.convert("RGB"), placement).convert("L"), dtype=float) / 255
    rows, columns = picture.shape[0] // CELL, picture.shape[1] // CELL
    expected = picture.reshape(rows, CELL, columns, CELL).mean((1, 3))
    found = latent_mask(image, placement, CELL)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.03


def test_enlarging_lets_nothing_outside_begin_to_count() -> None:
    """Sharpening filters swing beyond an edge; a mask's edge does not."""
    mask = latent_mask(half((32, 32)), Placement((512, 512), (512, 512), (0, 0, 512, 512)), CELL)
    assert (mask[:, :31] == 0).all() and (mask[:, 33:] == 1).all()


def test_a_mask_of_another_size_but_the_same_shape_will_do(tmp_path: Path) -> None:
    dataset = opened(tmp_path, {"a": half((40, 40)), "b": half((333, 333))})
    masks = look(dataset)
    assert not masks.problems and all(mask is not None for mask in masks.of_samples)


def test_what_cannot_be_this_pictures_mask_is_a_problem(tmp_path: Path) -> None:
    dataset = opened(tmp_path, {"a": half((64, 48)), "b": half((64, 64)), "c": half((64, 96))})
    (tmp_path / "masks" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = look(dataset)
    assert [problem.where for problem in found.problems] == ["a.png", "b.png", "c.png"]
    assert "its mask is 64x48, the picture 64x64" in found.problems[0].what
    assert "its mask cannot be used" in found.problems[1].what


def test_useless_masks_are_told_and_left_aside(tmp_path: Path) -> None:
    grey = Image.new("L", (64, 64), 128)
    dataset = opened(tmp_path, {"a": Image.new("L", (64, 64)), "b": grey, "c": half((64, 64)), "d": None})
    found = look(dataset)
    assert [mask is None for mask in found.of_samples] == [True, True, False, True]
    assert not found.problems
    assert "1 of 4 pictures have a mask that is black where the picture is trained. It is left aside" in found.notes[0]
    assert "a.png" in found.notes[0] and "grey all over" in found.notes[1] and "b.png" in found.notes[1]
    assert found.notes[2] == "data.masks: 1 of 4 pictures have no mask and count whole: d.png."


def test_a_mask_whose_white_is_cropped_off_is_black(tmp_path: Path) -> None:
    mask = Image.new("L", (160, 64), "black")
    mask.paste("white", (0, 0, 8, 64))
    dataset = opened(tmp_path, {"a": mask}, (160, 64))
    places = [place((160, 64), BucketConfig(resolution=64, step=16, enabled=False))]
    assert read_masks(dataset.samples, places, FILES, CELL).of_samples == (None,)


def test_alpha_is_a_mask_where_there_is_some(tmp_path: Path) -> None:
    see_through = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    see_through.paste((255, 0, 0, 255), (32, 0, 64, 64))
    write(tmp_path / "a.png", see_through)
    write(tmp_path / "b.png", Image.new("RGBA", (64, 64), (255, 0, 0, 255)))
    write(tmp_path / "c.png", Image.new("RGB", (64, 64), "red"))
    assert read_opacity(tmp_path / "c.png") is None
    first, second, third = look(open_dataset(tmp_path), MaskConfig(source="alpha")).of_samples
    assert first is not None and first.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 8
    assert second is None and third is None


def test_masks_that_are_there_and_not_asked_for_are_told(tmp_path: Path) -> None:
    dataset = opened(tmp_path, {"a": half((64, 64)), "b": None})
    found = look(dataset, MaskConfig())
    assert found.of_samples == ()
    assert found.notes == ('data.masks: 1 of the pictures has a mask, which is not used. For masked training: source = "files".',)  # fmt: skip
    assert look(opened(tmp_path / "none", {"a": None}), MaskConfig()).notes == ()


def test_settings_that_do_nothing() -> None:
    assert idle_settings(MaskConfig(source="files", unmasked_weight=0.1, normalise="none")) == ()
    assert idle_settings(MaskConfig(unmasked_weight=0.1, normalise="none")) == (
        "unmasked_weight = 0.1 does nothing: data.masks.source is 'none'.",
        "normalise = none does nothing: data.masks.source is 'none'.",
    )
