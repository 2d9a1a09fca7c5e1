"""Buckets: hand-computed cases, an independent transcription of kohya's arithmetic, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from lorabake.base.errors import Problems, UserError
from lorabake.dataset.buckets import (
    BucketConfig,
    Placement,
    bucket_problems,
    fit,
    idle_settings,
    make_buckets,
    place,
    placements,
)

sides = st.integers(1, 6000)
configs = st.builds(
    lambda units, step, low, high: BucketConfig(
        resolution=units * step, step=step, min=max(step, units * step // low), max=units * step * high
    ),
    units=st.integers(2, 24),
    step=st.sampled_from([8, 32, 64]),
    low=st.integers(1, 4),
    high=st.integers(1, 3),
)

SD15 = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512)]
"""What 512 with kohya's defaults (256, 1024, 64) gives, by hand: for each width floor(262144 / width / 64) * 64."""


def test_the_default_set_of_sd15_by_hand() -> None:
    # width 256: 1024; 320: 819 -> 768; 384: 682 -> 640; 448: 585 -> 576; 512: 512; 576: 455 -> 448; 640: 409 -> 384;
    # 704: 372 -> 320; 768: 341 -> 320; 832: 315 -> 256; 896: 292 -> 256; 960: 273 -> 256; 1024: 256.
    expected = sorted({*SD15, *((height, width) for width, height in SD15)})
    assert list(make_buckets((512, 512), 256, 1024, 64)) == expected
    assert len(expected) == 17


def test_sdxl_reaches_its_own_shapes_only_when_max_allows() -> None:
    wide = make_buckets((1024, 1024), 256, 2048, 64)
    assert {(832, 1216), (1216, 832), (896, 1152), (1024, 1024), (640, 1600)} <= set(wide)
    narrow = make_buckets((1024, 1024), 256, 1024, 64)
    assert (832, 1216) not in narrow
    assert (832, 1024) in narrow


def test_default_limits_leave_sdxl_its_shapes() -> None:
    assert place((832, 1216), BucketConfig(resolution=1024)).bucket_wh == (832, 1216)


def test_min_is_rounded_down_and_max_up() -> None:
    config = BucketConfig(resolution=512, min=300, max=700)
    # 300 -> 256 and 700 -> 704: a 256-wide bucket exists, and its height is capped at 704, not 640.
    assert place((100, 275), config).bucket_wh == (256, 704)


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "crop"),
    [
        ((512, 512), (512, 512), (512, 512), (0, 0, 512, 512)),
        ((1000, 1000), (512, 512), (512, 512), (0, 0, 512, 512)),
        # 4:3 = 1.3333; 576/448 = 1.2857 (off 0.048) beats 640/384 = 1.667: 448 high -> 597.33 -> 597 wide.
        ((4000, 3000), (576, 448), (597, 448), (10, 0, 586, 448)),
        # 3:4 = 0.75; 448/576 = 0.7778: narrower than the bucket, so width 448 -> 597 high.
        ((3000, 4000), (448, 576), (448, 597), (0, 10, 448, 586)),
        ((100, 100), (512, 512), (512, 512), (0, 0, 512, 512)),
    ],
)
def test_upscaling_by_hand(size: tuple[int, int], bucket: tuple, resized: tuple, crop: tuple) -> None:
    assert place(size, BucketConfig(resolution=512)) == Placement(bucket, resized, crop)


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "crop"),
    [
        # Small: stays as it is, cropped to multiples of 64.
        ((500, 300), (448, 256), (500, 300), (26, 22, 474, 278)),
        # 4000x3000: width sqrt(262144 * 4/3) = 591.2, height 443.4. By width: 576 x 432 -> 384, shape 1.5 (off 0.167);
        # by height: 384 x 512, shape 1.3333 (off 0). By height wins.
        ((4000, 3000), (512, 384), (512, 384), (0, 0, 512, 384)),
        # 1200x1000: width 560.9 -> 512 x 426.7 -> 384 (1.333, off 0.133);
        # height 467.4 -> 448, width 537.6 -> 512 (1.143, off 0.057). By height: 538 x 448.
        ((1200, 1000), (512, 448), (538, 448), (13, 0, 525, 448)),
    ],
)
def test_without_upscaling_by_hand(size: tuple[int, int], bucket: tuple, resized: tuple, crop: tuple) -> None:
    assert place(size, BucketConfig(resolution=512, upscale=False)) == Placement(bucket, resized, crop)


def test_buckets_off_crops_to_the_resolution() -> None:
    config = BucketConfig(resolution=(512, 768), enabled=False)
    assert place((1000, 1000), config) == Placement((512, 768), (768, 768), (128, 0, 640, 768))


def test_buckets_off_without_upscaling_refuses_small_pictures() -> None:
    config = BucketConfig(enabled=False, upscale=False)
    assert place((512, 600), config).bucket_wh == (512, 512)
    with pytest.raises(UserError, match="400x600 is smaller than resolution 512x512"):
        place((400, 600), config)


@pytest.mark.parametrize("size", [(63, 800), (800, 63), (1, 1), (20, 100_000)])
def test_a_zero_bucket_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="below step 64"):
        place(size, BucketConfig(upscale=False))


def test_a_line_of_pixels_is_refused_instead_of_filling_the_memory() -> None:
    with pytest.raises(UserError, match="1x10000 is too narrow"):
        place((1, 10_000), BucketConfig())


@pytest.mark.parametrize(
    ("given", "where", "what"),
    [
        ({"resolution": 500}, "resolution", "Nearest: 512x512"),
        ({"resolution": (512, 520)}, "resolution", "512x520 is not a multiple of step 64"),
        ({"resolution": 0}, "resolution", "has no area"),
        ({"min": 32}, "min", "below step 64"),
        ({"min": 640}, "min", "above the shorter side"),
        ({"max": 448}, "max", "below the longer side"),
    ],
)
def test_settings_that_cannot_work(given: dict, where: str, what: str) -> None:
    problems = bucket_problems(BucketConfig(**given))
    assert [problem.where for problem in problems] == [where]
    assert what in problems[0].what
    with pytest.raises(Problems):
        place((512, 512), BucketConfig(**given))


def test_all_problems_come_at_once() -> None:
    assert [problem.where for problem in bucket_problems(BucketConfig(resolution=500, min=600, max=300))] == [
        "resolution",
        "min",
        "max",
    ]


def test_the_defaults_work_at_every_resolution_of_the_field() -> None:
    for resolution, step in [
        (64, 8),
        (64, 64),
        (128, 64),
        (256, 64),
        (512, 64),
        (768, 64),
        (1024, 32),
        ((832, 1216), 64),
    ]:
        assert not bucket_problems(BucketConfig(resolution=resolution, step=step))


def test_limits_do_nothing_without_upscaling_and_it_is_said() -> None:
    assert idle_settings(BucketConfig(min=256, max=1024)) == ()
    assert len(idle_settings(BucketConfig(min=256, max=1024, upscale=False))) == 2
    assert "buckets are off" in idle_settings(BucketConfig(max=1024, enabled=False))[0]
    assert not bucket_problems(BucketConfig(min=640, upscale=False))


def test_config_is_closed_frozen_and_explained() -> None:
    with pytest.raises(ValidationError):
        BucketConfig(stepp=64)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        BucketConfig().step = 32
    assert all(field.description for field in BucketConfig.model_fields.values())


# --- several resolutions ---

MANY = BucketConfig(resolutions=(768, 512), step=64)


@pytest.mark.parametrize(
    ("size", "buckets"),
    [
        ((4000, 4000), [(512, 512), (768, 768)]),
        ((768, 768), [(512, 512), (768, 768)]),
        ((767, 768), [(512, 512)]),
        ((100, 100), [(512, 512)]),  # the smallest in any case
        ((1200, 500), [(768, 320), (1152, 512)]),
    ],
)
def test_each_resolution_a_picture_is_large_enough_for(size: tuple[int, int], buckets: list) -> None:
    found = placements(size, MANY)
    assert [placement.bucket_wh for placement in found] == buckets
    assert found == tuple(place(size, alone) for alone in MANY.each()[: len(found)])


def test_one_resolution_is_one_placement() -> None:
    assert placements((900, 700), BucketConfig()) == (place((900, 700), BucketConfig()),)
    assert placements((900, 700), BucketConfig(resolutions=(512,))) == (place((900, 700), BucketConfig()),)


def test_a_picture_that_stays_at_its_size_is_there_once() -> None:
    config = BucketConfig(resolutions=(256, 512), upscale=False)
    assert len(placements((300, 200), config)) == 1
    assert [found.bucket_wh for found in placements((512, 512), config)] == [(256, 256), (512, 512)]


@given(
    width=sides,
    height=sides,
    resolutions=st.sets(st.sampled_from([256, 384, 512, 768, 1024]), min_size=1),
    upscale=st.booleans(),
)
def test_several_resolutions_never_enlarge_but_the_smallest(
    width: int, height: int, resolutions: set[int], upscale: bool
) -> None:
    config = BucketConfig(resolutions=tuple(resolutions), upscale=upscale)
    try:
        found = placements((width, height), config)
    except UserError:
        return
    areas = [placement.bucket_wh[0] * placement.bucket_wh[1] for placement in found]
    assert len(set(found)) == len(found) <= len(resolutions)
    assert all(area <= max(resolutions) ** 2 for area in areas)
    for side in sorted(resolutions)[1:]:
        alone = place((width, height), BucketConfig(resolution=side, upscale=upscale))
        assert (alone in found) or width * height < side * side


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"resolutions": (512, 512)}, "names a size twice"),
        ({"resolutions": (512, 768), "resolution": 512}, "Leave resolution out"),
        ({"resolutions": (512, 760)}, "760x760 is not a multiple of step 64"),
        ({"resolutions": (256, 512), "min": 320}, "above the shorter side"),
    ],
)
def test_resolutions_that_cannot_work(given: dict, what: str) -> None:
    (problem,) = bucket_problems(BucketConfig(**given))
    assert what in problem.what
    assert not bucket_problems(BucketConfig(resolutions=(512, 768), resolution=768))


# --- against a second, straight transcription of the published arithmetic ---


def reference_buckets(width: int, height: int, low: int, high: int, step: int) -> list[tuple[int, int]]:
    max_area = width * height
    found = set()
    side = int(math.sqrt(max_area) // step) * step
    found.add((side, side))
    w = low
    while w <= high:
        h = min(high, int((max_area // w) // step) * step)
        if h >= low:
            found.add((w, h))
            found.add((h, w))
        w += step
    return sorted(found)


def reference_upscale(w: int, h: int, buckets: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    ratio = w / h
    if (w, h) in buckets:
        bucket = (w, h)
    else:
        ratios = np.array([bw / bh for bw, bh in buckets])
        bucket = buckets[int(np.abs(ratios - ratio).argmin())]
    scale = bucket[1] / h if ratio > bucket[0] / bucket[1] else bucket[0] / w
    return bucket, (int(w * scale + 0.5), int(h * scale + 0.5))


def reference_no_upscale(w: int, h: int, max_area: int, step: int) -> tuple[tuple[int, int], tuple[int, int]]:
    def rounded(x: float) -> int:
        whole = int(x + 0.5)
        return whole - whole % step

    ratio = w / h
    resized = (w, h)
    if w * h > max_area:
        rw = math.sqrt(max_area * ratio)
        rh = max_area / rw
        a_w = rounded(rw)
        a_h = rounded(a_w / ratio)
        b_h = rounded(rh)
        b_w = rounded(b_h * ratio)
        by_width = abs(a_w / a_h - ratio) < abs(b_w / b_h - ratio)
        resized = (a_w, int(a_w / ratio + 0.5)) if by_width else (int(b_h * ratio + 0.5), b_h)
    return (resized[0] - resized[0] % step, resized[1] - resized[1] % step), resized


@given(config=configs, width=sides, height=sides)
def test_upscaling_agrees_with_the_reference(config: BucketConfig, width: int, height: int) -> None:
    assert config.min is not None
    assert config.max is not None
    low, high = config.min - config.min % config.step, math.ceil(config.max / config.step) * config.step
    buckets = reference_buckets(*config.resolution_wh, low, high, config.step)
    assert list(make_buckets(config.resolution_wh, low, high, config.step)) == buckets
    assume(1 / 12 < width / height < 12)
    placement = place((width, height), config)
    assert (placement.bucket_wh, placement.resized_wh) == reference_upscale(width, height, buckets)


@given(config=configs, width=sides, height=sides)
def test_no_upscaling_agrees_with_the_reference(config: BucketConfig, width: int, height: int) -> None:
    config = config.model_copy(update={"upscale": False, "min": None, "max": None})
    area = config.resolution_wh[0] * config.resolution_wh[1]
    try:
        bucket, resized = reference_no_upscale(width, height, area, config.step)
    except ZeroDivisionError:
        return
    if 0 in bucket:
        with pytest.raises(UserError):
            place((width, height), config)
        return
    placement = place((width, height), config)
    assert (placement.bucket_wh, placement.resized_wh) == (bucket, resized)


@given(config=configs, width=sides, height=sides, enabled=st.booleans(), upscale=st.booleans())
def test_every_placement_is_sound(config: BucketConfig, width: int, height: int, enabled: bool, upscale: bool) -> None:
    config = config.model_copy(update={"enabled": enabled, "upscale": upscale})
    try:
        placement = place((width, height), config)
    except UserError:
        return
    (bw, bh), (rw, rh), (left, top, right, bottom) = placement.bucket_wh, placement.resized_wh, placement.crop_ltrb
    assert bw % config.step == bh % config.step == 0
    assert min(bw, bh) > 0
    assert (right - left, bottom - top) == (bw, bh)
    assert 0 <= left <= right <= rw
    assert 0 <= top <= bottom <= rh
    assert abs((rw - right) - left) <= 1
    assert abs((rh - bottom) - top) <= 1
    if upscale:
        assert bw * bh <= config.resolution_wh[0] * config.resolution_wh[1]
    elif enabled:
        assert rw <= width
        assert rh <= height


# --- pixels ---


def test_fit_cuts_out_the_middle() -> None:
    pixels_HWC = np.zeros((64, 192, 3), dtype=np.uint8)
    pixels_HWC[:, 64:128] = 255
    out = fit(Image.fromarray(pixels_HWC), Placement((64, 64), (192, 64), (64, 0, 128, 64)))
    assert out.size == (64, 64)
    assert np.asarray(out).min() == 255


def test_fit_averages_when_shrinking() -> None:
    checker_HW = (np.indices((128, 128)).sum(axis=0) % 2 * 254).astype(np.uint8)
    image = Image.fromarray(checker_HW).convert("RGB")
    out = np.asarray(fit(image, Placement((64, 64), (64, 64), (0, 0, 64, 64))))
    assert (out == 127).all()


def test_fit_leaves_the_right_size_untouched() -> None:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    out = fit(image, Placement((64, 64), (64, 64), (0, 0, 64, 64)))
    assert out.tobytes() == image.tobytes()


def test_fit_enlarges_with_lanczos() -> None:
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    out = fit(image, Placement((64, 64), (64, 64), (0, 0, 64, 64)))
    assert out.tobytes() == image.resize((64, 64), Image.Resampling.LANCZOS).tobytes()
