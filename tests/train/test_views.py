"""The views of samples: kept or fresh, told to the model as they are, and free where nothing is random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import Problems
from lorabake.base.events import Event, Events
from lorabake.dataset.augment import Box, look_at
from lorabake.dataset.faces import find_faces
from lorabake.dataset.folder import Sample
from lorabake.recipe import Checked, check_values
from lorabake.train.bake import Bake
from lorabake.train.loop import batch_inputs
from lorabake.train.prepare import prepare
from lorabake.train.views import Lazy, views_of


def checked(dataset: Path, **data: Any) -> Checked:
    return check_values({
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset), "buckets": {"resolution": [32, 64], "enabled": False}, **data},
        "adapter": {"rank": 1}, "train": {"device": "cpu", "batch_size": 2},
    })  # fmt: skip


def no_faces(samples: Sequence[Sample]) -> list[list[Box]]:
    raise AssertionError("nothing here is cropped around faces")


def bake(dataset: Path, **data: Any) -> Bake:
    return prepare(checked(dataset, **data), Events())


def drawn(baked: Bake, steps: int = 12) -> list[torch.Tensor]:
    return [batch_inputs(baked, step, 0, (0, 1))["latents_BCHW"] for step in range(steps)]


def test_nothing_random_nothing_changed(dataset: Path) -> None:
    """The keys of latents decide their bytes; these are the ones of a picture that is fitted into its bucket."""
    given = checked(dataset, flip=True)
    views = views_of(given.dataset.samples, given.placements, given.recipe.data, no_faces, Events())
    assert [[view.mirrored for view in own] for own in views] == [[False, True]] * 6
    assert all(view.placement == place and view.tint is None
               for own, place in zip(views, given.placements, strict=True) for view in own)  # fmt: skip
    assert given.recipe.data.augment.views is None


def test_views_are_encoded_once_and_kept(dataset: Path) -> None:
    told: list[Event] = []
    given = checked(dataset, flip=True, augment={"random_crop": True, "views": 3})
    baked = prepare(given, Events(told.append))
    assert [len(own) for own in baked.latents] == [6] * 6
    crops = {(sample.sha256, number): look_at(sample.size, place, sample.sha256, number, given.recipe.data.augment).placement
             for sample, place in zip(given.dataset.samples, given.placements, strict=True) for number in range(3)}  # fmt: skip
    distinct = len({(sha256, place.crop_ltrb) for (sha256, _), place in crops.items()})
    assert [event["total"] for event in told if event["kind"] == "encoding"][-1] == 2 * distinct
    again: list[Event] = []
    prepare(checked(dataset, augment={"random_crop": True, "views": 2}), Events(again.append))
    assert not [event for event in again if event["kind"] == "encoding"]


def test_every_view_is_drawn_and_the_framing_is_its_own(dataset: Path) -> None:
    baked = bake(dataset, flip=True, augment={"random_crop": True, "views": 4})
    found = {tuple(latents[0].flatten()[:8].tolist()) for latents in drawn(baked, 60)}
    assert found == {tuple(latent.flatten()[:8].tolist()) for latent in baked.latents[0]}
    given = checked(dataset, flip=True, augment={"random_crop": True, "views": 4})
    (views, *_) = views_of(given.dataset.samples, given.placements, given.recipe.data, no_faces, Events())
    for straight, mirrored, framing, other in zip(
        views[::2], views[1::2], baked.framings[0][::2], baked.framings[0][1::2], strict=True
    ):
        left, top, right, _ = straight.placement.crop_ltrb
        assert framing.corner_lt == (left, top) and framing.target_wh == (32, 64)
        assert straight.placement == mirrored.placement and other.corner_lt == (64 - right, top)


def test_turning_flip_on_draws_the_same_crops(dataset: Path) -> None:
    one = bake(dataset, augment={"random_crop": True, "views": 5})
    both = bake(dataset, augment={"random_crop": True, "views": 5}, flip=True)
    for step in range(10):
        straight, either = (batch_inputs(baked, step, 0, (0,))["latents_BCHW"][0] for baked in (one, both))
        at = next(index for index, latent in enumerate(one.latents[0]) if torch.equal(latent, straight))
        assert any(torch.equal(either, both.latents[0][2 * at + mirrored]) for mirrored in (0, 1)) or _twice(one, at)


def _twice(baked: Bake, at: int) -> bool:
    """Whether two looks happen to be the same crop."""
    return sum(torch.equal(latent, baked.latents[0][at]) for latent in baked.latents[0]) > 1


def test_fresh_views_belong_to_the_step(dataset: Path) -> None:
    told: list[Event] = []
    given = checked(dataset, augment={"random_crop": True, "brightness": 0.3, "views": "fresh"})
    baked, other = prepare(given, Events(told.append)), prepare(given, Events())
    assert not told and not list(dataset.rglob("*.safetensors"))
    first, later = drawn(baked), drawn(other, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=False))
    assert len({tuple(latents.flatten()[:9].tolist()) for latents in first}) == 12
    assert torch.equal(batch_inputs(baked, 9, 0, (0, 1))["latents_BCHW"], first[9])


def test_faces_are_cropped_and_pictures_without_are_named(dataset: Path) -> None:
    from PIL import Image
    from skimage.data import astronaut

    Image.fromarray(astronaut()).save(dataset / "1_mira" / "face.png")
    told: list[Event] = []
    given = checked(dataset, augment={"face_crop": [1.5, 2], "views": 2})

    def looked(samples: Sequence[Sample]) -> list[list[Box]]:
        return list(find_faces([sample.path for sample in samples]))

    views = views_of(given.dataset.samples, given.placements, given.recipe.data, looked, Events(told.append))
    (note,) = [event["text"] for event in told]
    assert note.startswith("data.augment.face_crop: no face was found in 6 of 7 pictures")
    for view in views[-1]:
        left, top, right, bottom = (side * 512 / view.placement.resized_wh[1] for side in view.placement.crop_ltrb)
        assert left < 224 < right and top < 120 < bottom and right - left < 320
    assert views[0][0].placement == given.placements[0]


def test_without_opencv_face_crop_is_refused_before_the_run(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Problems, match=r"data\.augment\.face_crop .*pip install 'lorabake\[faces\]'"):
        checked(dataset, augment={"face_crop": [2, 4]})


def test_the_number_of_views_says_why(dataset: Path) -> None:
    recipe = checked(dataset, augment={"hue": 3}).recipe
    assert recipe.data.augment.views == 8 and "steps stay as fast" in recipe.why("data.augment")
    warnings = checked(dataset, augment={"views": 3}).warnings
    assert any("data.augment.views = 3 does nothing" in text for text in warnings)


def test_lazy_sequences_are_sequences() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        return index * index

    lazy: Sequence[int] = Lazy(5, make)
    assert (len(lazy), lazy[3], list(lazy[1::2]), list(lazy)) == (5, 9, [1, 9], [0, 1, 4, 9, 16])
    assert made == [3, 1, 3, 0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        lazy[5]
