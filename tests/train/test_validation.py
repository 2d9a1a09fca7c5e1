"""Pictures that are not trained on: which they are, what is told of them, and that training does not notice."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorabake.base.errors import Problems
from lorabake.base.events import Event, Events
from lorabake.base.runs import Run
from lorabake.cli.terminal import TrainingProgress
from lorabake.dataset.holdout import chances
from lorabake.pocket.world import draw, sample
from lorabake.recipe import check_values
from lorabake.sampling.infotext import save_png
from lorabake.train.loop import batch_inputs, loss_of, optimizer_step
from lorabake.train.prepare import prepare
from lorabake.train.run import train
from lorabake.train.validation import confidence_interval, middles, student_quantile


def recipe(dataset: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "2 epochs"},
        "save": {"state_every": 1e-3},
        "output": {"name": "mira"},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return raw


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Three pictures that the dataset has not."""
    rng = random.Random(77)
    for index in range(3):
        drawing = draw(sample(rng), 100 + index, 64)
        path = tmp_path / "others" / f"{index}.png"
        save_png(drawing.image, path)
        path.with_suffix(".txt").write_text(", ".join(drawing.tags))
    return tmp_path / "others"


def run(raw: dict[str, Any], into: Path, stop: Callable[[list[Event]], bool] = lambda seen: False) -> list[Event]:
    seen: list[Event] = []
    train(check_values(raw), into, Events(seen.append), stop=lambda: stop(seen))
    return seen


def told(into: Path) -> list[Event]:
    return Run(into).read_events()


def of_kind(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["kind"] == kind]


# ---- which


def test_chance_goes_by_the_bytes_alone(dataset: Path) -> None:
    samples = check_values(recipe(dataset)).dataset.samples
    whole = chances(samples, 0)
    assert chances(samples[::2], 0) == whole[::2] and chances(samples, 1) != whole
    renamed = [replace(item, name="x", caption="y", repeats=9) for item in samples]
    assert chances(renamed, 0) == whole and len(set(whole)) == 6


def test_about_the_share_is_held_out() -> None:
    class Picture:
        def __init__(self, sha256: str) -> None:
            self.sha256 = sha256

    pictures: Any = [Picture(f"{index:064x}") for index in range(4000)]
    assert 0.18 < sum(chance < 0.2 for chance in chances(pictures, 0)) / 4000 < 0.22


def seed_for(dataset: Path, share: float, count: int) -> int:
    """A seed with which so many pictures are held out."""
    samples = check_values(recipe(dataset)).dataset.samples
    return next(seed for seed in range(1000) if sum(chance < share for chance in chances(samples, seed)) == count)


def test_more_pictures_change_nothing_for_those_that_are_there(dataset: Path, others: Path) -> None:
    seed = seed_for(dataset, 0.4, 2)
    before = check_values(recipe(dataset, validation={"share": 0.4, "seed": seed}))
    assert before.held_out is not None and len(before.dataset) == 4 and len(before.held_out.samples) == 2
    for path in others.iterdir():
        shutil.copy(path, dataset / "1_mira" / path.name)
    after = check_values(recipe(dataset, validation={"share": 0.4, "seed": seed}))
    assert after.held_out is not None
    names = {item.name for item in after.held_out.samples}
    assert {item.name for item in before.held_out.samples} <= names
    assert not names & {item.name for item in before.dataset.samples}
    assert any(
        f"validation: {len(names)} of 9 pictures are held out and not trained on" in note for note in after.warnings
    )


# ---- what is told


def test_it_is_told_at_the_start_every_epoch_and_at_the_end(dataset: Path, others: Path, tmp_path: Path) -> None:
    seen = run(recipe(dataset, validation={"folder": str(others), "timesteps": 3}), tmp_path / "run")
    found = of_kind(told(tmp_path / "run"), "validation")
    assert found == of_kind(seen, "validation") and [event["step"] for event in found] == [0, 3, 6]
    first, _, last = found
    assert first["loss"] == first["base"] == last["base"] and first["change"] == 0 and first["interval"] == [0, 0]
    assert last["change"] == pytest.approx(last["loss"] - last["base"], abs=1e-7) and last["change"] != 0
    assert last["interval"][0] < last["change"] < last["interval"][1]
    often = run(recipe(dataset, validation={"folder": str(others), "every": "4 steps"}), tmp_path / "often")
    assert [event["step"] for event in of_kind(often, "validation")] == [0, 4, 6]


def test_the_loss_by_hand(dataset: Path, others: Path) -> None:
    baked = prepare(check_values(recipe(dataset, validation={"folder": str(others), "timesteps": 5})), Events())
    assert baked.held_out is not None
    optimizer_step(baked, 0, [(0, 1)])
    optimizer_step(baked, 1, [(2, 3)])
    found = baked.held_out.compare()
    with torch.no_grad():
        baked.graft.training = False
        own = [float(loss_of(baked.model, baked.objective, inputs)) for inputs in baked.held_out._inputs]
        baked.graft.multiplier = 0.0
        base = [float(loss_of(baked.model, baked.objective, inputs)) for inputs in baked.held_out._inputs]
    assert len(own) == 3 and found.loss == pytest.approx(sum(own) / 3) and found.base == pytest.approx(sum(base) / 3)
    assert found.change == pytest.approx((sum(own) - sum(base)) / 3, abs=1e-7)
    changes = [one - other for one, other in zip(own, base, strict=True)]
    assert found.interval == pytest.approx(confidence_interval(changes, found.change), rel=1e-4)
    for inputs in baked.held_out._inputs:
        steps = inputs["timesteps_B"].tolist()
        assert steps == pytest.approx([100, 300, 500, 700, 900], abs=30), "spread evenly over what is trained"
        assert not torch.equal(inputs["noise_BCHW"][0], inputs["noise_BCHW"][1])


def test_amounts_of_noise_are_spread_as_training_draws_them(dataset: Path) -> None:
    baked = prepare(check_values(recipe(dataset, objective={"min_timestep": 200, "max_timestep": 600})), Events())
    assert middles(baked.objective, (4, 8, 8), 4).tolist() == pytest.approx([250, 350, 450, 550], abs=12)


def test_the_interval_by_hand() -> None:
    assert confidence_interval([1.0], 1.0) is None
    low, high = confidence_interval([1.0, 2.0, 3.0], 2.0) or (0, 0)
    assert (low, high) == (pytest.approx(2 - 4.303 / 3**0.5), pytest.approx(2 + 4.303 / 3**0.5))
    true = {5: 2.5706, 8: 2.3060, 20: 2.0860, 60: 2.0003, 1000: 1.9623}
    assert all(student_quantile(freedom) == pytest.approx(value, abs=3e-3) for freedom, value in true.items())


def test_the_terminal_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    progress({"kind": "validation", "step": 0, "loss": 0.2, "base": 0.2, "change": 0.0, "interval": [0.0, 0.0]})
    progress({"kind": "validation", "step": 9, "loss": 0.15, "base": 0.2, "change": -0.05, "interval": [-0.07, -0.03]})
    progress({"kind": "validation", "step": 9, "loss": 0.15, "base": 0.2, "change": -0.05, "interval": None})
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "held out at step 0: loss 0.2000 (the base's own)"
    assert second == "held out at step 9: loss 0.1500 (-0.0500 against the base, 95 % between -0.0700 and -0.0300)"
    assert third == "held out at step 9: loss 0.1500 (-0.0500 against the base)"


# ---- training does not notice


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank": 2, "dropout": 0.2}, "data": {"captions": {"shuffle": True}}},
        {"optimizer": {"text_encoder_lr": 0.0}},
    ],
    ids=["everything random", "kept text"],
)
def test_the_result_is_the_one_without(dataset: Path, others: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    raw = recipe(dataset, **sections)
    plain = run(raw, tmp_path / "plain")
    asked = run({**raw, "validation": {"folder": str(others), "every": "1 steps"}}, tmp_path / "asked")
    assert of_kind(plain, "step") == of_kind(asked, "step")
    assert_equal_files(tmp_path / "plain", tmp_path / "asked")


def assert_equal_files(first: Path, second: Path) -> None:
    for name in ("checkpoints/mira-000001.safetensors", "checkpoints/mira.safetensors"):
        ours, theirs = load_file(first / name), load_file(second / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_held_out_picture_might_as_well_not_be_there(dataset: Path, tmp_path: Path) -> None:
    seed = seed_for(dataset, 0.4, 2)
    raw = recipe(dataset, validation={"share": 0.4, "seed": seed})
    held_out = check_values(raw).held_out
    assert held_out is not None
    asked = run(raw, tmp_path / "asked")
    for item in held_out.samples:
        item.path.unlink()
    shutil.rmtree(dataset / ".lorabake")
    plain = run(recipe(dataset), tmp_path / "plain")
    assert of_kind(plain, "step") == of_kind(asked, "step")
    assert_equal_files(tmp_path / "plain", tmp_path / "asked")


def test_stopped_and_continued_the_log_is_the_same(dataset: Path, others: Path, tmp_path: Path) -> None:
    raw = recipe(dataset, validation={"folder": str(others), "every": "2 steps"})
    run(raw, tmp_path / "whole")
    for stop_at in (1, 4):
        run(raw, tmp_path / "cut", lambda seen, at=stop_at: len(of_kind(seen, "step")) >= at)
    run(raw, tmp_path / "cut")
    for name in ("events.jsonl", "checkpoints/mira.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- running averages


EMA = {"batch_size": 2, "device": "cpu", "length": "6 steps", "ema": [0.1, 0.99]}


def test_each_average_is_asked_beside_the_weights(dataset: Path, others: Path, tmp_path: Path) -> None:
    asked = {"folder": str(others), "every": "3 steps"}
    raw = recipe(
        dataset, train=EMA, validation=asked, save={"every": "3 steps", "dtype": "fp32"}, optimizer={"lr": 0.01}
    )
    seen = run(raw, tmp_path / "both")
    found = of_kind(seen, "validation")
    assert [(event["step"], event.get("ema")) for event in found] == [
        (0, None), (3, 0.1), (3, 0.99), (3, None), (6, 0.1), (6, 0.99), (6, None),
    ]  # fmt: skip
    assert len({event["loss"] for event in found}) == 7 and len({event["base"] for event in found}) == 1
    plain = run({**raw, "train": {**raw["train"], "ema": []}}, tmp_path / "validation alone")
    assert of_kind(plain, "validation") == [event for event in found if "ema" not in event]
    assert of_kind(run({**raw, "validation": {}}, tmp_path / "averages alone"), "validation") == []
    for folder in ("validation alone", "averages alone"):
        assert_equal_files(tmp_path / "both", tmp_path / folder)
    # The file with an average has the loss that was told of it.
    for end, expected in (("-ema0.1", found[4]), ("-ema0.99", found[5]), ("", found[6])):
        file = tmp_path / "both" / "checkpoints" / f"mira{end}.safetensors"
        again = prepare(check_values({**raw, "adapter": {"rank": 2, "start_from": str(file)}}), Events())
        assert again.held_out is not None and again.held_out.compare().loss == pytest.approx(expected["loss"], rel=1e-5)


def test_stopped_and_continued_the_averages_losses_are_the_same(dataset: Path, others: Path, tmp_path: Path) -> None:
    raw = recipe(dataset, train=EMA, validation={"folder": str(others), "every": "2 steps"})
    run(raw, tmp_path / "whole")
    run(raw, tmp_path / "cut", lambda seen: len(of_kind(seen, "step")) >= 3)
    run(raw, tmp_path / "cut")
    assert (tmp_path / "cut" / "events.jsonl").read_bytes() == (tmp_path / "whole" / "events.jsonl").read_bytes()


def test_the_lowest_of_the_checkpoints_that_stay_is_told(dataset: Path, others: Path, tmp_path: Path) -> None:
    asked = {"folder": str(others), "every": "1 steps"}
    raw = recipe(dataset, train=EMA, validation=asked, save={"every": "2 steps"}, optimizer={"lr": 1.0})
    seen = run(raw, tmp_path / "all")
    losses = {(event["step"], event.get("ema")): event["loss"] for event in of_kind(seen, "validation")}
    saved = {(event["step"], event.get("ema")): event["file"] for event in of_kind(seen, "checkpoint")}
    (told_of,) = of_kind(seen, "lowest_held_out")
    best = min(saved, key=losses.__getitem__)
    assert (told_of["file"], told_of["loss"]) == (saved[best], losses[best])
    assert best[0] == 2, "with such a rate the first ones are the best"
    assert seen[-1]["kind"] == "finished" and seen[-2] == told_of
    (told_of,) = of_kind(run({**raw, "save": {"every": "2 steps", "keep": 1}}, tmp_path / "last"), "lowest_held_out")
    assert told_of["step"] == 6, "the others were deleted"
    assert not of_kind(run(recipe(dataset), tmp_path / "none"), "lowest_held_out")


def test_the_terminal_shows_averages_and_the_lowest(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    asked = {"step": 9, "loss": 0.15, "base": 0.2, "change": -0.05}
    progress({"kind": "validation", **asked, "interval": None, "ema": 0.99})
    progress({"kind": "lowest_held_out", **asked, "file": "checkpoints/mira-ema0.99.safetensors"})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "held out at step 9 with average 0.99: loss 0.1500 (-0.0500 against the base)"
    assert second == (
        "lowest held-out loss of the checkpoints: checkpoints/mira-ema0.99.safetensors (0.1500, -0.0500 against the base)"
    )


def test_masks_count_here_too(dataset: Path, others: Path) -> None:
    from PIL import Image

    for folder in (dataset, others):
        for path in list(folder.rglob("*.png")):
            mask = Image.new("L", (64, 64), "black")
            mask.paste("white", (32, 0, 64, 64))
            (folder / "masks").mkdir(exist_ok=True)
            mask.save(folder / "masks" / path.name)
    raw = recipe(dataset, data={"masks": {"source": "files"}}, validation={"folder": str(others)})
    baked = prepare(check_values(raw), Events())
    assert baked.held_out is not None
    inside = baked.held_out._inputs[0]["mask_B1HW"]
    assert torch.equal(inside[0], batch_inputs(baked, 0, 0, (0,))["mask_B1HW"][0]) and inside.shape[0] == 4


# ---- what is wrong


def test_what_is_wrong_is_told_before_the_run(dataset: Path, others: Path) -> None:
    with pytest.raises(Problems, match=r"validation\.share +0\.3, and a folder is given as well"):
        check_values(recipe(dataset, validation={"share": 0.3, "folder": str(others)}))
    with pytest.raises(Problems, match=r"validation\.share +1e-06 holds out none of the 6 pictures.*takes one"):
        check_values(recipe(dataset, validation={"share": 1e-6}))
    with pytest.raises(Problems, match=r"validation\.folder .*lies inside"):
        check_values(recipe(dataset, validation={"folder": str(dataset / "1_mira")}))
    shutil.copy(next(dataset.rglob("*.png")), others / "double.png")
    with pytest.raises(Problems, match=r"1 of others's pictures are training pictures too: others/double\.png"):
        check_values(recipe(dataset, validation={"folder": str(others)}))


def test_settings_that_do_nothing(dataset: Path) -> None:
    notes = check_values(recipe(dataset, validation={"timesteps": 8, "every": "2 epochs"})).warnings
    assert "validation.timesteps = 8 does nothing: neither a share nor a folder is held out." in notes
    assert "validation.every = 2 epochs does nothing: neither a share nor a folder is held out." in notes


def test_a_single_picture_says_little(dataset: Path, tmp_path: Path) -> None:
    seed = seed_for(dataset, 0.3, 1)
    raw = recipe(dataset, validation={"share": 0.3, "seed": seed}, train={"length": "1 steps"})
    assert any("of a single picture's loss" in note for note in check_values(raw).warnings)
    assert of_kind(run(raw, tmp_path / "run"), "validation")[-1]["interval"] is None
