"""float16: gradients are scaled up on their way, steps in which they overflow are skipped, and a run goes on from any of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import NotFinite, Problems
from lorabake.base.events import Events
from lorabake.recipe import check_values
from lorabake.train import scaling
from lorabake.train.bake import Bake
from lorabake.train.loop import run_loop
from lorabake.train.prepare import prepare
from lorabake.train.run import train
from lorabake.train.scaling import FIRST, LossScale, take_step
from lorabake.train.state import Progress, read_state, save_state, states_of


def raw(dataset: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    plain: dict[str, dict[str, Any]] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "optimizer": {"text_encoder_lr": 0.0},
        "train": {"batch_size": 2, "device": "cpu", "length": "4 steps", "precision": "fp16"},
    }
    return {name: {**plain.get(name, {}), **sections.get(name, {})} for name in plain.keys() | sections.keys()}


def bake(dataset: Path, **sections: dict[str, Any]) -> Bake:
    return prepare(check_values(raw(dataset, **sections)), Events())


def steps(baked: Bake, first: int = 0, last: int = 4) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    run_loop(baked, first, Events(seen.append), lambda step: step == last)
    return seen


class Sgd:
    """The least there is of an optimizer."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": [weight], "lr": 1.0}]
        self.weight, self.steps = weight, 0

    def step(self) -> None:
        self.steps += 1


def scale_of(values: list[float]) -> tuple[LossScale, Sgd, Any]:
    from lorabake.optimizers._flat import FlatGroup

    weight = torch.nn.Parameter(torch.tensor(values))
    group = FlatGroup("denoiser", {"w": weight})
    optimizer = Sgd(group.values)
    return LossScale(optimizer, [group]), optimizer, group  # pyright: ignore[reportArgumentType]


def test_it_is_what_torchs_own_scaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same overflows, the same scales, at the same steps; with a tenth of the patience, which is torch's own."""
    usual = torch.amp.GradScaler("cpu")
    assert (usual.get_scale(), usual.get_growth_interval()) == (FIRST, scaling.PATIENCE)
    monkeypatch.setattr(scaling, "PATIENCE", 200)
    theirs = torch.amp.GradScaler("cpu", init_scale=FIRST, growth_interval=200)
    ours, optimizer, group = scale_of([1.0])
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    other = torch.optim.SGD([weight], lr=0.0)
    overflows = {3, 4, 5, 90, 310}
    for step in range(520):
        bad = math.inf if step in overflows else 1.0
        ours.begin()
        assert float(ours.factor) == theirs.get_scale()
        group.gradient.copy_(ours.factor * bad)
        ours.unscale()
        told = take_step(ours, float(group.gradient), optimizer, None)  # pyright: ignore[reportArgumentType]
        assert ("skipped" in told) == (step in overflows)
        theirs.scale(weight.sum() * bad).backward()
        theirs.step(other)
        theirs.update()
        other.zero_grad()
    assert optimizer.steps == 520 - len(overflows)


def test_scaling_down_rounds_nothing() -> None:
    ours, _, group = scale_of([1.0, 1.0, 1.0])
    gradient = torch.tensor([1 / 3, -7e-30, 1e30])
    group.gradient.copy_(gradient * FIRST)
    ours.unscale()
    assert torch.equal(group.gradient, gradient)


def test_losses_are_those_of_float32_nearly(dataset: Path) -> None:
    half = steps(bake(dataset))
    whole = steps(bake(dataset, train={"precision": "fp32"}))
    for ours, theirs in zip(half, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    assert {event["loss_scale"] for event in half} == {FIRST} and "loss_scale" not in whole[0]


def test_adapter_and_moments_stay_in_float32(dataset: Path) -> None:
    baked = bake(dataset)
    steps(baked, last=1)
    assert baked.model.dtype == torch.float16
    kept = [value for state in baked.optimizer.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in [*(group.values for group in baked.groups), *kept]} == {torch.float32}


def test_small_gradients_are_lost_without_it(dataset: Path) -> None:
    """A loss that counts little has the gradient of one that counts, times that."""
    from lorabake.train.loop import batch_loss

    gradients: dict[tuple[str, float], torch.Tensor] = {}
    for precision, factor in (("fp32", 1.0), ("fp16", 1.0), ("fp16", FIRST)):
        baked = bake(dataset, train={"precision": precision})
        (group,) = baked.groups
        group.values.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        batch_loss(baked, 0, 0, (0, 1)).backward(torch.tensor(1e-4 * factor))
        gradients[precision, factor] = group.gradient / factor
    exact = gradients["fp32", 1.0]
    lost, kept = (float((gradients["fp16", factor] - exact).norm() / exact.norm()) for factor in (1.0, FIRST))
    assert kept < 0.1 < 0.3 < lost


LARGE = 2.0**28


def overflowing(baked: Bake) -> Bake:
    """So large a scale that the first steps overflow."""
    baked.optimizer.param_groups[0]["loss_scale"] = LARGE
    return baked


def test_steps_that_overflow_are_skipped_and_told(dataset: Path) -> None:
    baked = overflowing(bake(dataset, train={"length": "14 steps"}))
    before = [group.values.detach().clone() for group in baked.groups]
    first = steps(baked, last=1)
    assert first[0]["skipped"] == 1 and first[0]["loss_scale"] == LARGE and math.isfinite(first[0]["loss"])
    assert all(torch.equal(old, group.values) for old, group in zip(before, baked.groups, strict=True))
    json.dumps(first, allow_nan=False)
    rest = steps(baked, first=1, last=14)
    skipped = [event for event in rest if "skipped" in event]
    assert 3 < len(skipped) < 13 and "skipped" not in rest[-1]
    scales = [event["loss_scale"] for event in [*first, *rest]]
    halved = [0.5 if "skipped" in event else 1.0 for event in [*first, *rest]]
    assert scales[1:] == [scale * by for scale, by in zip(scales, halved, strict=True)][:-1]
    assert all(bool(torch.isfinite(group.values).all()) for group in baked.groups)


def test_it_goes_on_from_a_state_to_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    whole = overflowing(bake(dataset, train={"length": "8 steps"}))
    seen = steps(whole, last=3)
    save_state(tmp_path, Progress(3, 0), whole.groups, whole.optimizer)
    seen = steps(whole, first=3, last=8)
    rest = bake(dataset, train={"length": "8 steps"})
    assert read_state(states_of(tmp_path)[-1], rest.groups, rest.optimizer) == Progress(3, 0)
    assert steps(rest, first=3, last=8) == seen and any("skipped" in event for event in seen)
    assert all(torch.equal(a.values, b.values) for a, b in zip(whole.groups, rest.groups, strict=True))


def test_an_overflow_that_does_not_end_stops_the_run() -> None:
    ours, optimizer, _ = scale_of([1.0])
    for _ in range(16):
        assert "skipped" in take_step(ours, math.nan, optimizer, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotFinite, match=r"not scaled up any more.* precision bf16"):
        take_step(ours, math.inf, optimizer, None)  # pyright: ignore[reportArgumentType]
    assert optimizer.steps == 0


def test_a_whole_run_and_what_its_file_says(dataset: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    checked = check_values(raw(dataset, train={"length": "2 steps"}))
    assert any("slower than fp32" in warning for warning in checked.warnings)
    train(checked, tmp_path / "run", Events())
    (file,) = (tmp_path / "run" / "checkpoints").glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["ss_mixed_precision"] == "fp16"


def test_what_trains_the_weights_themselves_is_refused(dataset: Path) -> None:
    with pytest.raises(Problems, match="'fp16': adapter 'full' trains the weights themselves"):
        check_values(raw(dataset) | {"adapter": {"name": "full"}})
