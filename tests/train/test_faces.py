"""Faces are looked for once: the cache goes by the pictures' bytes, and losing it, or any of it, costs only time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import lorabake.train.faces as faces_module
from lorabake.base.errors import Interrupted
from lorabake.base.events import Event, Events
from lorabake.dataset.faces import find_faces
from lorabake.dataset.folder import Sample
from lorabake.recipe import Checked, check_values
from lorabake.train.faces import cached_faces
from lorabake.train.prepare import prepare


@pytest.fixture
def people(dataset: Path) -> Path:
    from skimage.data import astronaut

    portrait = Image.fromarray(astronaut())
    for name in ("a", "same"):
        portrait.save(dataset / "1_mira" / f"{name}.png")
    portrait.crop((100, 0, 400, 300)).save(dataset / "1_mira" / "closer.png")
    return dataset


def checked(dataset: Path) -> Checked:
    return check_values({
        "data": {"folder": str(dataset), "buckets": {"resolution": [64, 64], "enabled": False},
                 "augment": {"face_crop": [1.5, 2], "views": 2}},
        "adapter": {"rank": 1}, "train": {"device": "cpu", "batch_size": 2},
    })  # fmt: skip


def looked_at(samples: list[Sample], folder: Path) -> tuple[list[list[tuple[int, int, int, int]]], int]:
    asked: list[int] = []
    return cached_faces(samples, folder, lambda done, total: asked.append(total)), len(asked)


def test_each_picture_is_looked_at_once(people: Path, tmp_path: Path) -> None:
    samples = list(checked(people).dataset.samples)
    straight = list(find_faces([sample.path for sample in samples]))
    assert sum(map(bool, straight)) == 3
    cache = tmp_path / "cache"
    assert looked_at(samples, cache) == (straight, len(samples) - 1), "two files are the same picture"
    assert looked_at(samples, cache) == (straight, 0)
    (pack,) = cache.rglob("*.safetensors")
    pack.write_bytes(pack.read_bytes()[:-1] + b"?")
    assert looked_at(samples, cache) == (straight, len(samples) - 1)
    shutil.rmtree(cache)
    assert looked_at(samples, cache) == (straight, len(samples) - 1)
    (people / "1_mira" / "closer.png").write_bytes((people / "1_mira" / "000.png").read_bytes())
    changed = list(checked(people).dataset.samples)
    found, looked = looked_at(changed, cache)
    assert found == list(find_faces([sample.path for sample in changed])) != straight and looked == 0


def test_another_detector_looks_again(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = list(checked(people).dataset.samples)
    _, first = looked_at(samples, tmp_path)
    monkeypatch.setattr(faces_module, "detector_name", lambda: "a newer one")
    assert looked_at(samples, tmp_path)[1] == first > 0


def test_a_run_keeps_them_beside_its_latents_and_says_how_far_it_is(people: Path) -> None:
    told: list[Event] = []
    prepare(checked(people), Events(told.append))
    steps = [event for event in told if event["kind"] == "finding_faces"]
    assert [event["done"] for event in steps] == list(range(1, steps[-1]["total"] + 1))
    assert list((people / ".lorabake" / "faces").rglob("*.safetensors"))
    again: list[Event] = []
    prepare(checked(people), Events(again.append))
    assert {event["kind"] for event in again}.isdisjoint({"finding_faces", "encoding"})


def test_stopped_while_looking_it_keeps_what_it_found(people: Path) -> None:
    told: list[Event] = []
    with pytest.raises(Interrupted, match=r"after looking for faces in 2 of 8 pictures\. The same command continues"):
        prepare(checked(people), Events(told.append), lambda: len(told) >= 2)
    again: list[Event] = []
    prepare(checked(people), Events(again.append))
    assert sum(event["kind"] == "finding_faces" for event in again) == 6
