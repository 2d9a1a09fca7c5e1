"""Random looks at pictures: sound crops, colours computed by hand, and streams of their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from lorabake.base.errors import UserError
from lorabake.dataset.augment import AugmentConfig, Box, Tint, idle_settings, look_at, tinted
from lorabake.dataset.buckets import BucketConfig, Placement, fit, place

SHA = "ab" * 32
SQUARE = Placement((64, 64), (96, 64), (16, 0, 80, 64))
UNCHANGED = Tint(1, 1, 1, 0)

sides = st.integers(40, 3000)
faces = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.02, 1.0))


def box(size: tuple[int, int], face: tuple[float, float, float]) -> Box:
    """A square face inside a picture."""
    side = max(8, int(min(size) * face[2]))
    return int((size[0] - side) * face[0]), int((size[1] - side) * face[1]), side, side


def placed(size: tuple[int, int]) -> Placement:
    try:
        return place(size, BucketConfig(resolution=128, step=32))
    except UserError:
        assume(False)
        raise


@given(width=sides, height=sides, number=st.integers(0, 99), face=st.none() | faces, random_crop=st.booleans())
def test_every_look_is_a_sound_crop_of_the_buckets_size(
    width: int, height: int, number: int, face: tuple[float, float, float] | None, random_crop: bool
) -> None:
    placement = placed((width, height))
    found = [box((width, height), face)] if face else []
    config = AugmentConfig(random_crop=random_crop, face_crop=(1.5, 4))
    look = look_at((width, height), placement, SHA, number, config, found)
    left, top, right, bottom = look.placement.crop_ltrb
    assert look.placement.bucket_wh == placement.bucket_wh == (right - left, bottom - top)
    assert left >= 0 and top >= 0
    assert right <= look.placement.resized_wh[0] and bottom <= look.placement.resized_wh[1]
    shape = look.placement.resized_wh[0] / look.placement.resized_wh[1]
    assert shape == pytest.approx(width / height, rel=2 / min(look.placement.resized_wh))
    if not found and not random_crop:
        assert look.placement == placement


@given(size=st.tuples(st.integers(400, 3000), st.integers(400, 3000)), face=faces, number=st.integers(0, 50))
def test_the_face_has_the_size_asked_for_and_is_inside(
    size: tuple[int, int], face: tuple[float, float, float], number: int
) -> None:
    placement, found = placed(size), box(size, face)
    for random_crop in (False, True):
        config = AugmentConfig(face_crop=(2, 4), random_crop=random_crop)
        look = look_at(size, placement, SHA, number, config, [found]).placement
        scale = look.resized_wh[0] / size[0]
        heights = min(look.bucket_wh) / (found[2] * scale)
        cover = max(look.bucket_wh[0] / size[0], look.bucket_wh[1] / size[1])
        assert scale <= max(1.0, cover) * 1.02
        if cover * 1.02 < scale < 0.98:  # the picture allows it
            assert 1.95 < heights < 4.1
        if heights > 1.05 and max(cover, 0) * 1.02 < scale:
            left, top, right, bottom = look.crop_ltrb
            assert found[0] * scale >= left - 2 and (found[0] + found[2]) * scale <= right + 2
            assert found[1] * scale >= top - 2 and (found[1] + found[3]) * scale <= bottom + 2


def test_a_face_in_the_middle_is_centred() -> None:
    placement = place((1000, 1000), BucketConfig(resolution=128, step=32))
    look = look_at((1000, 1000), placement, SHA, 0, AugmentConfig(face_crop=(2, 2)), [(450, 350, 100, 100)]).placement
    # the crop is 200 pixels of the picture, so it is shrunk to 640; the face's centre is at (320, 256) then
    assert (look.resized_wh, look.crop_ltrb) == ((640, 640), (256, 192, 384, 320))


def test_random_crops_reach_every_place_and_only_that_changes() -> None:
    config = AugmentConfig(random_crop=True)
    looks = [look_at((96, 64), SQUARE, SHA, number, config) for number in range(600)]
    assert {look.placement.crop_ltrb[0] for look in looks} == set(range(33))
    assert {look.placement.crop_ltrb[1] for look in looks} == {0}
    assert all(look.tint is None for look in looks)


def test_a_look_belongs_to_the_picture_and_its_number() -> None:
    config = AugmentConfig(random_crop=True, hue=10)
    looks = [look_at((96, 64), SQUARE, sha, number, config) for sha in (SHA, "cd" * 32) for number in range(9)]
    assert len(set(looks)) == 18
    assert looks[3] == look_at((96, 64), SQUARE, SHA, 3, config)


@given(number=st.integers(0, 1000))
def test_each_option_draws_from_its_own_stream(number: int) -> None:
    every = {"random_crop": True, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 20}
    both = look_at((96, 64), SQUARE, SHA, number, AugmentConfig(**every))
    assert both.tint is not None
    for name in ("brightness", "contrast", "saturation", "hue"):
        other = look_at((96, 64), SQUARE, SHA, number, AugmentConfig(**{**every, name: 0})).tint
        assert other is not None and getattr(other, name) == (0 if name == "hue" else 1)
        assert all(getattr(other, more) == getattr(both.tint, more) for more in UNCHANGED.__slots__ if more != name)
    assert look_at((96, 64), SQUARE, SHA, number, AugmentConfig(random_crop=True)).placement == both.placement


# --- colours ---


def colour(tint: Tint, *pixels: tuple[int, int, int]) -> list[tuple[int, ...]]:
    image = Image.fromarray(np.array([pixels], dtype=np.uint8))
    return [tuple(int(channel) for channel in pixel) for pixel in np.asarray(tinted(image, tint))[0]]


def test_colours_by_hand() -> None:
    pixels = ((200, 100, 50), (40, 40, 40))
    assert colour(UNCHANGED, *pixels) == list(pixels)
    assert colour(Tint(1.1, 1, 1, 0), *pixels) == [(220, 110, 55), (44, 44, 44)]
    # greys: 0.299*200 + 0.587*100 + 0.114*50 = 124.2 and 40, mean 82.1; twice the distance from it
    assert colour(Tint(1, 1.5, 1, 0), *pixels) == [(255, 109, 34), (19, 19, 19)]
    assert colour(Tint(1, 1, 0, 0), *pixels) == [(124, 124, 124), (40, 40, 40)]
    assert colour(Tint(1, 1, 0.5, 0), *pixels) == [(162, 112, 87), (40, 40, 40)]
    assert colour(Tint(2, 1, 1, 0), (200, 0, 0)) == [(255, 0, 0)]


def test_turning_hues_keeps_greys_and_comes_back() -> None:
    assert colour(Tint(1, 1, 1, 45), (40, 40, 40), (255, 255, 255)) == [(40, 40, 40), (255, 255, 255)]
    (there,) = colour(Tint(1, 1, 1, 20), (150, 100, 90))
    assert there != (150, 100, 90)
    (back,) = colour(Tint(1, 1, 1, -20), (there[0], there[1], there[2]))
    assert np.abs(np.subtract(back, (150, 100, 90))).max() <= 1
    grey = np.dot(there, [0.299, 0.587, 0.114])
    assert grey == pytest.approx(np.dot((150, 100, 90), [0.299, 0.587, 0.114]), abs=1)


def test_an_unchanged_tint_leaves_a_picture_alone() -> None:
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    assert tinted(image, UNCHANGED).tobytes() == image.tobytes()


def test_a_random_crop_shows_another_part() -> None:
    image = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (64, 1))).convert("RGB")
    look = look_at((96, 64), SQUARE, SHA, 1, AugmentConfig(random_crop=True)).placement
    assert np.asarray(fit(image, look))[0, 0, 0] == look.crop_ltrb[0]


# --- settings ---


@pytest.mark.parametrize(
    "given_",
    [
        {"face_crop": (4, 2)},
        {"face_crop": (0.5, 2)},
        {"views": 0},
        {"views": "often"},
        {"hue": 91},
        {"brightness": 0.6},
    ],
)
def test_nonsense_is_refused(given_: dict) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**given_)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AugmentConfig(), None),
        (AugmentConfig(views=3), "views = 3 does nothing"),
        (AugmentConfig(views="fresh"), 'views = "fresh" does nothing'),
        (AugmentConfig(views=3, hue=1), None),
        (AugmentConfig(random_crop=True), "random_crop does nothing"),
        (AugmentConfig(face_crop=(2, 4)), "face_crop does little"),
    ],
)
def test_idle_settings(config: AugmentConfig, expected: str | None) -> None:
    told = idle_settings(config, [(64, 64)], [Placement((64, 64), (64, 64), (0, 0, 64, 64))])
    assert [text.startswith(expected or "") for text in told] == [True] * (expected is not None)


def test_what_is_cut_off_may_be_cut_off_at_random() -> None:
    config = AugmentConfig(random_crop=True, face_crop=(2, 4))
    assert idle_settings(config, [(960, 640)], [SQUARE]) == ()
    assert idle_settings(AugmentConfig(random_crop=True), [(96, 64)], [SQUARE]) == ()
