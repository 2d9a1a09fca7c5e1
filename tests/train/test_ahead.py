"""Pictures of the next step are read while this one is computed, and nothing else changes for it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.events import Event, Events
from lorabake.dataset.image import UnreadableImage
from lorabake.recipe import check_values
from lorabake.train import ahead
from lorabake.train.ahead import PicturesAhead, announced
from lorabake.train.bake import Bake
from lorabake.train.loop import run_loop
from lorabake.train.prepare import prepare

FRESH = {"random_crop": True, "brightness": 0.3, "hue": 20.0, "views": "fresh"}


def baked(dataset: Path, augment: dict[str, Any] = FRESH, **train: Any) -> Bake:
    return prepare(check_values({
        "data": {"folder": str(dataset), "flip": True, "augment": augment, "buckets": {"resolution": [32, 64], "enabled": False}},
        "adapter": {"rank": 2}, "train": {"device": "cpu", "batch_size": 2, "length": "7 steps", **train},
    }), Events())  # fmt: skip


def ran(
    bake: Bake, first: int = 0, after: Callable[[int], bool] = lambda step: False
) -> tuple[list[Event], list[torch.Tensor]]:
    told: list[Event] = []
    run_loop(bake, first, Events(told.append), after)
    return told, [group.values.detach().clone() for group in bake.groups]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each picture that is read, and by which thread."""
    found: list[tuple[str, str]] = []
    real = ahead.pixels_of

    def noted(view: Any) -> Any:
        found.append((view.sample.name, threading.current_thread().name))
        return real(view)

    monkeypatch.setattr(ahead, "pixels_of", noted)
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
def test_not_a_bit_changes(dataset: Path, accumulation: int, reads: list[tuple[str, str]]) -> None:
    plain = dataclasses.replace(baked(dataset, gradient_accumulation=accumulation), pictures=None)
    told, weights = ran(plain)
    there = len(reads)
    assert there and {thread for _, thread in reads} == {"MainThread"}
    again, same = ran(baked(dataset, gradient_accumulation=accumulation))
    assert again == told and all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))
    later = reads[there:]
    assert all(thread.startswith("pictures") for _, thread in later), "what steps ask for was begun before"
    assert sorted(name for name, _ in later) == sorted(name for name, _ in reads[:there]), "each once"


def test_a_run_that_goes_on_goes_on_to_the_same(dataset: Path) -> None:
    told, weights = ran(baked(dataset))
    other = baked(dataset)
    first, _ = ran(other, after=lambda step: step == 3)
    second, same = ran(other, first=3)
    assert [*first, *second] == told and all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_where_latents_are_kept_nothing_is_read(dataset: Path) -> None:
    assert baked(dataset, {**FRESH, "views": 2}).pictures is None and baked(dataset, {}).pictures is None


class Counted(PicturesAhead):
    """Notes what is begun."""

    def __init__(self) -> None:
        super().__init__(())
        self.begun: list[tuple[int, int]] = []

    def begin(self, rows: Any) -> None:
        self.begun += rows


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_step_comes_when_the_next_ones_pictures_are_begun(steps: int) -> None:
    pictures = Counted()
    for step in announced(((step, [(step, 0)]) for step in range(steps)), pictures):
        assert pictures.begun == [(at, 0) for at in range(min(step + 2, steps))]
    assert len(pictures.begun) == steps


def test_pictures_of_two_steps_are_in_memory_at_most(dataset: Path) -> None:
    bake = baked(dataset)
    assert bake.pictures is not None
    pictures = bake.pictures
    for step in range(6):
        pictures.begin([(step, 0), (step, 1)])
        assert len(pictures._now) + len(pictures._next) <= 4
    assert {row[0] for row in [*pictures._now, *pictures._next]} == {4, 5}
    pictures.stop()
    assert not pictures._now and not pictures._next


def no_readers() -> bool:
    until = time.monotonic() + 10
    while any(thread.name.startswith("pictures") for thread in threading.enumerate()):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_a_picture_that_is_gone_is_told_at_its_step(dataset: Path) -> None:
    told, _ = ran(baked(dataset))
    bake, heard = baked(dataset), list[Event]()
    lost = bake.samples[told[4]["pictures"][0][0]]
    shows = next(at for at, event in enumerate(told)
                 if lost.name in {bake.samples[row[0]].name for row in event["pictures"]})  # fmt: skip
    lost.path.unlink()
    with pytest.raises(UnreadableImage, match=f"{lost.path.name} cannot be used: the system says: No such file"):
        run_loop(bake, 0, Events(heard.append), lambda step: False)
    assert heard == told[:shows], "steps before it are as ever"
    assert no_readers()


def test_whoever_stops_leaves_no_reader_behind(dataset: Path) -> None:
    def interrupt(step: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_loop(baked(dataset), 0, Events(), interrupt)
    assert no_readers()
    ran(baked(dataset), after=lambda step: True)
    assert no_readers()
