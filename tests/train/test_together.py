"""Random crops, several sizes and folders, together with masks, regularisation and held-out pictures."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorabake.base.errors import Problems, UserError
from lorabake.base.events import Event, Events
from lorabake.pocket.world import draw, sample
from lorabake.recipe import Checked, check_values
from lorabake.sampling.infotext import save_png
from lorabake.train import loop
from lorabake.train.asked import Asked
from lorabake.train.prepare import prepare
from lorabake.train.run import train

CELL = 4
"""Pixels of a latent cell of the tiny base."""


def picture(path: Path, number: int, size: tuple[int, int] = (64, 64)) -> None:
    save_png(draw(sample(random.Random(number)), number, 64).image.resize(size), path)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Two more pictures for training, in a folder of their own; one is too small for 64 px."""
    picture(tmp_path / "2_kavi" / "a.png", 31)
    picture(tmp_path / "2_kavi" / "b.png", 32, (48, 48))
    return tmp_path / "2_kavi"


@pytest.fixture
def girls(tmp_path: Path) -> Path:
    """Nine pictures of a class, with several captions each."""
    for index in range(9):
        picture(tmp_path / "reg" / "1_girl" / f"{index}.png", 50 + index)
        (tmp_path / "reg" / "1_girl" / f"{index}.txt").write_text("a girl\n{one|two} girls\n")
    return tmp_path / "reg"


def recipe(folders: list[Path], **data: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(folders[0].with_name("base"))},
        "data": {"folder": [str(folder) for folder in folders], **data},
        "adapter": {"rank": 1},
        "train": {"batch_size": 2, "device": "cpu", "length": "3 epochs"},
        "output": {"name": "mira"},
    }


def masked(dataset: Path, right: int = 32) -> None:
    """Masks that show what lies right of ``right`` pixels."""
    for path in sorted(dataset.rglob("*.png")):
        mask = Image.new("L", (64, 64), "black")
        mask.paste("white", (right, 0, 64, 64))
        (path.parent / "masks").mkdir(exist_ok=True)
        mask.save(path.parent / "masks" / path.name)


def cropped(dataset: Path, views: int | str, **masks: Any) -> Checked:
    """Upright crops, as wide as half of each picture."""
    buckets = {"resolution": [32, 64], "enabled": False}
    data = {"augment": {"random_crop": True, "views": views}, "flip": True, "buckets": buckets}
    return check_values(recipe([dataset], **data, masks={"source": "files", **masks}))


@pytest.mark.parametrize("views", [4, "fresh"])
def test_masks_follow_the_crop_and_the_mirroring(dataset: Path, views: int | str) -> None:
    masked(dataset)
    baked = prepare(cropped(dataset, views, normalise="none"), Events())
    seen: set[tuple[int, bool]] = set()
    for step in range(12):
        (more,) = baked.more_inputs
        rows = list(loop._draw_views(baked, step, 0, (0, 1, 2)))
        asked = more(Asked(step, 0, rows, [""] * 3))["mask_B1HW"]
        inputs = loop.batch_inputs(baked, step, 0, (0, 1, 2))
        assert torch.equal(inputs["mask_B1HW"], asked) and asked.shape[2:] == inputs["latents_BCHW"].shape[2:]
        for (index, view), mask_1HW in zip(rows, asked, strict=True):
            mirrored, corner = bool(view % 2), baked.framings[index][view].corner_lt[0]
            pixels = [(column < 32) if mirrored else (column >= 32) for column in range(corner, corner + 32)]
            cells = [sum(pixels[start : start + CELL]) / CELL for start in range(0, 32, CELL)]
            assert torch.allclose(mask_1HW, torch.tensor(cells).expand(1, 16, 8))
            seen.add((corner, mirrored))
    assert len(seen) > 8, "many crops, both ways round"


@pytest.mark.parametrize(("config", "counts"), [({}, 0.0), ({"unmasked_weight": 0.25}, 0.25)])
def test_a_crop_that_holds_nothing_of_the_mask_trains_nothing(
    dataset: Path, config: dict[str, float], counts: float
) -> None:
    masked(dataset, right=40)  # the crop in the middle ends at 48
    baked = prepare(cropped(dataset, 8, **config), Events())
    (more,) = baked.more_inputs
    empty = shown = 0
    for index in range(6):
        for view, framing in enumerate(baked.framings[index]):
            mask = more(Asked(0, 0, [(index, view)], [""]))["mask_B1HW"]
            left = 32 - framing.corner_lt[0] if view % 2 else framing.corner_lt[0]
            if left + 32 <= 40:
                empty += 1
                assert (mask == counts).all()
            else:
                shown += 1
                assert float(mask.mean()) == pytest.approx(1.0)
    assert empty and shown


@pytest.mark.parametrize("views", [2, "fresh"])
def test_the_length_is_exact_with_everything(
    dataset: Path, second: Path, girls: Path, views: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = recipe([dataset, second], regularisation=str(girls), augment={"hue": 5, "views": views}, flip=True,
                 buckets={"resolutions": [32, 64]}, captions={"wildcards": True})  # fmt: skip
    raw["validation"] = {"share": 0.2, "seed": 1}
    raw["train"]["length"] = "20 steps"
    checked = check_values(raw)
    assert checked.held_out and len(checked.dataset) + len(checked.held_out.samples) == 8
    assert len(set(checked.held_out.samples)) == len(checked.held_out.samples)
    sizes = Counter(place.bucket_wh for place in checked.placements)
    large = sum(sample.width == 64 for sample in checked.dataset.samples)
    assert sizes == {(32, 32): len(checked.dataset), (64, 64): large}
    assert checked.held_out.placements[0].bucket_wh == (64, 64) or checked.held_out.samples[0].width < 64
    assert checked.regularisation and len(checked.regularisation.samples) == 18
    assert checked.length.images_per_epoch == checked.entries + checked.regularisation.turns.entries
    baked, steps = prepare(checked, Events()), list[Any]()
    monkeypatch.setattr(
        loop, "optimizer_step", lambda bake, step, batches: steps.append(batches) or loop.Step(0.1, 0.1, 1)
    )
    loop.run_loop(baked, 0, Events(), lambda step: False)
    assert len(steps) == checked.length.steps == 20
    assert sum(len(batch) for batches in steps for batch in batches) == checked.length.images
    epoch = [index for batches in steps[: checked.length.steps_per_epoch] for batch in batches for index in batch]
    assert len(epoch) == checked.length.images_per_epoch
    expected = Counter({index: sample.repeats for index, sample in enumerate(checked.samples)})
    assert Counter(index for index in epoch if index < baked.trained) == expected
    inputs = loop.batch_inputs(baked, 0, 0, (0, baked.trained))  # one of each kind, both at 32 px
    assert inputs["latents_BCHW"].shape[0] == 2


def test_captions_of_the_class_are_drawn_too(dataset: Path, girls: Path) -> None:
    raw = recipe([dataset], regularisation=str(girls), captions={"wildcards": True, "prefix": "mira,"})
    baked, heard = prepare(check_values(raw), Events()), list[str]()
    text = baked.text
    listening = replace(baked, text=lambda captions: heard.extend(captions) or text(captions))
    for step in range(20):
        loop.batch_inputs(listening, step, 0, (baked.trained,))
    assert set(heard) == {"a girl", "one girls", "two girls"}


def test_folders_beside_must_lie_apart_from_every_one(dataset: Path, second: Path) -> None:
    with pytest.raises(Problems, match=r"is a folder of the training pictures"):
        check_values(recipe([dataset, second], regularisation=str(second)))


def test_the_trigger_may_be_in_one_choice_only(dataset: Path) -> None:
    for path in sorted(dataset.rglob("*.txt"))[:-1]:
        path.write_text("a very long line without the word\nmira {smiling|standing}\n")
    raw = recipe([dataset], captions={"wildcards": True})
    raw["preservation"] = {"weight": 1.0, "trigger": "mira"}
    (told,) = [note for note in check_values(raw).warnings if "do not hold" in note]
    assert "1 of 6 captions do not hold 'mira'" in told


def test_a_mask_that_changes_where_only_other_crops_reach_makes_another_run(dataset: Path, tmp_path: Path) -> None:
    masked(dataset)
    raw = recipe([dataset], augment={"random_crop": True, "views": 2}, masks={"source": "files"},
                 buckets={"resolution": [32, 64], "enabled": False})  # fmt: skip
    raw["train"]["length"] = "1 step"
    train(check_values(raw), tmp_path / "run", Events())
    path = next(dataset.rglob("masks")) / "001.png"
    with Image.open(path) as mask:
        mask.paste("black", (50, 0, 64, 64))
        mask.save(path)
    with pytest.raises(UserError, match=r"changed 1_mira/001\.png"):
        train(check_values(raw), tmp_path / "run", Events())


def test_a_run_with_everything(dataset: Path, second: Path, girls: Path, tmp_path: Path) -> None:
    masked(dataset)
    raw = recipe([dataset, second], regularisation=str(girls), prior_loss_weight=0.5, masks={"source": "files"},
                 augment={"random_crop": True, "views": 2}, buckets={"resolutions": [32, 64]},
                 captions={"wildcards": True, "shuffle": True})  # fmt: skip
    raw["validation"] = {"share": 0.2, "seed": 1}
    raw["preservation"] = {"weight": 0.5, "caption": "", "outside_masks": 0.5}
    raw["train"]["length"] = "1 epoch"
    told: list[Event] = []
    checked = check_values(raw)
    (note,) = [note for note in checked.warnings if note.startswith("data.masks")]
    assert "pictures have no mask and count whole: 2_kavi/a.png" in note and "have no mask" in note
    train(checked, tmp_path / "run", Events(told.append))
    assert told[-1]["kind"] == "finished"
    lines = (tmp_path / "run" / "losses.csv").read_text().splitlines()[1:]
    names = [line.split(",")[0] for line in lines]
    assert len(names) == len(set(names)), "one line for a picture, at however many sizes it is seen"
    assert {name for name in names if not name.startswith("reg/")} == {
        sample.name for sample in checked.dataset.samples
    }
