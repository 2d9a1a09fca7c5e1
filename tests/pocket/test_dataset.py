"""Renderings are ordinary datasets, repeatable picture by picture, and continue where they were stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorabake.base.errors import UserError
from lorabake.dataset.folder import open_dataset
from lorabake.pocket.cast import cast, cast_without
from lorabake.pocket.dataset import MANIFEST, World, picture_path, render_dataset
from lorabake.pocket.world import axes, vocabulary


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_rendering_is_a_dataset_that_says_what_it_shows(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    rendering = render_dataset(
        tmp_path / "a", 120, seed=3, named=0, workers=1, progress=lambda *done: told.append(done)
    )
    assert (rendering.pictures, rendering.drawn, told) == (120, 120, [(100, 120), (120, 120)])
    dataset = open_dataset(tmp_path / "a")
    assert len(dataset) == 120 and not dataset.dropped and not dataset.warnings
    assert all(
        sample.size == (64, 64) and sample.repeats == 1 and sample.caption_source == "txt" for sample in dataset.samples
    )
    for index in (0, 57, 119):
        drawing, caption = World(seed=3, named=0).picture(index)
        path = picture_path(tmp_path / "a", index)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(drawing.image))
        assert path.with_suffix(".txt").read_text() == caption + "\n"
        assert set(drawing.tags) <= set(caption.split(", "))
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["complete"] and manifest["tags"]["1girl"] == 120


def test_captions_are_shuffled_and_some_have_a_made_up_name() -> None:
    known = set(vocabulary())
    captions = [World(invented_names=0.5, named=0).picture(index)[1].split(", ") for index in range(80)]
    strangers = [[tag for tag in caption if tag not in known] for caption in captions]
    assert all(len(names) <= 1 for names in strangers)
    assert 25 <= sum(map(len, strangers)) <= 55
    assert len({caption.index("1girl") for caption in captions}) > 5
    assert not any(set(World(invented_names=0, named=0).picture(index)[1].split(", ")) - known for index in range(30))


def test_named_people_look_as_they_always_do_and_captions_leave_that_to_the_name() -> None:
    members = {member.name: member for member in cast()}
    pruned = 0
    for index in range(60):
        drawing, caption = World(named=1, invented_names=0).picture(index)
        tags = set(caption.split(", "))
        (name,) = tags & set(members)
        member = members[name]
        assert all(getattr(drawing.spec, axis) == value for axis, value in member.fixes.items())
        visible = set(drawing.tags) & member.own_tags()
        assert tags - {name} in (set(drawing.tags), set(drawing.tags) - visible - {"1girl"})
        pruned += not tags & visible and "1girl" not in tags
    assert 40 <= pruned <= 56


def test_what_is_held_out_is_held_out_of_the_cast_too() -> None:
    held = {"hair_color": {"pink", "red"}}
    assert all(World(named=1, hold_out=held).picture(i)[0].spec.hair_color not in held["hair_color"] for i in range(40))
    nobody = {"hair_color": set(axes["hair_color"]) - {"pink"}, "eye_color": set(axes["eye_color"]) - {"blue"}}
    assert len(cast_without({})) == len(cast()) == len({member.name for member in cast()})
    assert len(cast_without(nobody)) < 10
    World(named=1, hold_out=nobody).picture(0)


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    render_dataset(tmp_path / "one", 130, workers=1)
    render_dataset(tmp_path / "two", 130, workers=2)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_a_torn_rendering_is_mended_and_a_longer_one_keeps_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    render_dataset(folder, 12, workers=1)
    whole = _files(folder)
    torn = picture_path(folder, 3)
    torn.write_bytes(torn.read_bytes()[:-20])
    picture_path(folder, 5).with_suffix(".txt").write_bytes(b"1girl, re")
    picture_path(folder, 7).unlink()
    assert render_dataset(folder, 12, workers=1).drawn == 3
    assert _files(folder) == whole
    assert render_dataset(folder, 15, workers=1).drawn == 3
    assert {name: data for name, data in _files(folder).items() if name in whole and name != MANIFEST} == {
        name: data for name, data in whole.items() if name != MANIFEST
    }


def test_an_interrupted_rendering_says_so_until_it_is_finished(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_dataset(tmp_path / "world", 150, workers=1, progress=stop)
    assert json.loads((tmp_path / "world" / MANIFEST).read_text())["complete"] is False
    assert render_dataset(tmp_path / "world", 150, workers=1).drawn == 50
    assert json.loads((tmp_path / "world" / MANIFEST).read_text())["complete"] is True


def test_held_out_values_never_occur(tmp_path: Path) -> None:
    world = World(hold_out={"background": {"beach", "night"}})
    captions = [world.picture(index)[1] for index in range(60)]
    assert not any("beach" in caption or "night" in caption for caption in captions)
    assert any("forest" in caption for caption in captions)


def test_what_cannot_be_rendered_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    render_dataset(tmp_path / "world", 3, workers=1)
    with pytest.raises(UserError, match="another pocket world"):
        render_dataset(tmp_path / "world", 3, seed=1, workers=1)
    with pytest.raises(UserError, match="more than 2"):
        render_dataset(tmp_path / "world", 2, workers=1)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="not empty"):
        render_dataset(other, 3, workers=1)
    for wrong in (dict(invented_names=2.0), dict(size=65), dict(hold_out={"sky": {"blue"}}), dict(workers=0)):
        with pytest.raises(UserError):
            render_dataset(tmp_path / "new", 3, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="0 pictures"):
        render_dataset(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()
