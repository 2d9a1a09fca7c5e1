"""Learned weights in the loop: beside the adapter, in the state and in no file."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorabake.base.events import Events
from lorabake.recipe import check_values
from lorabake.train.bake import Bake
from lorabake.train.capture import Captured
from lorabake.train.loop import batch_loss, loss_of, optimizer_step, run_loop
from lorabake.train.prepare import prepare

LEARNED = {"weighting": "learned", "learned_lr": 0.02}


def bake(dataset: Path, **sections: dict[str, Any]) -> Bake:
    raw: dict[str, dict[str, Any]] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "4 steps"},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return prepare(check_values(raw), Events())


def learned(baked: Bake) -> torch.Tensor:
    assert baked.beside is not None
    return baked.beside.group.values.detach().clone()


def test_the_first_step_is_that_of_the_plain_loss(dataset: Path) -> None:
    """To the last bit; then what was learned shows."""
    plain, learning = bake(dataset, objective={"weighting": "none"}), bake(dataset, objective=LEARNED)
    assert plain.beside is None
    assert optimizer_step(plain, 0, [(0, 1), (2,)]) == optimizer_step(learning, 0, [(0, 1), (2,)])
    for mine, theirs in zip(learning.groups, plain.groups, strict=True):
        assert torch.equal(mine.values, theirs.values)
    assert float(learned(learning).abs().max()) == pytest.approx(0.02, rel=1e-3), "one step of AdamW"
    assert optimizer_step(plain, 1, [(3, 4)]) != optimizer_step(learning, 1, [(3, 4)])


def test_the_adapters_clipping_and_schedule_are_not_the_weights(dataset: Path) -> None:
    """Whatever the gradient of the weights, it does not press the adapter's."""
    baked = bake(dataset, objective=LEARNED, train={"max_grad_norm": 1e-6}, schedule={"warmup": 0.9})
    done = optimizer_step(baked, 0, [(0, 1)])
    norm = torch.linalg.vector_norm(torch.cat([group.gradient for group in baked.groups]))
    assert float(norm) == pytest.approx(1e-6, rel=0.5) and done.grad_norm > 1e-6
    assert baked.beside is not None and float(baked.beside.group.gradient.norm()) > 0.01
    assert float(learned(baked).abs().max()) == pytest.approx(0.02, rel=1e-3), "the adapter's rate is 0 in this step"


def test_accumulated_gradients_of_the_weights_are_the_mean(dataset: Path) -> None:
    baked = bake(dataset, objective=LEARNED)
    assert baked.beside is not None
    optimizer_step(baked, 0, [(0, 1)])  # its gradient must be forgotten
    batches, single = [(0, 1), (2,), (3, 4)], list[torch.Tensor]()
    for micro, batch in enumerate(batches):
        baked.beside.group.zero_gradient()
        batch_loss(baked, 1, micro, batch).backward()
        single.append(baked.beside.group.gradient.clone())
    optimizer_step(baked, 1, batches)
    torch.testing.assert_close(baked.beside.group.gradient, torch.stack(single).mean(0), rtol=1e-4, atol=1e-7)


def test_recordings_compute_the_same(dataset: Path) -> None:
    def again(step: Any) -> Any:
        for _ in range(2):
            step()
        return step

    results: list[Any] = []
    for captures in (False, True):
        baked = bake(dataset, objective=LEARNED, train={"gradient_accumulation": 2})
        assert baked.beside is not None
        if captures:
            of_inputs = partial(loss_of, baked.model, baked.objective, noted_2B=baked.noted_2B)
            groups = [*baked.groups, baked.beside.group]
            captured = Captured(of_inputs, groups, torch.device("cpu"), again, around=baked.graft.ahead)
            baked = replace(baked, captured=captured)
        seen: list[dict[str, Any]] = []
        run_loop(baked, 0, Events(seen.append), lambda step: False)
        results.append((seen, learned(baked).tolist(), [group.values.tolist() for group in baked.groups]))
    assert results[0] == results[1]


def test_they_are_in_the_state_and_not_in_the_file(oven: Any, dataset: Path, tmp_path: Path, options: Any) -> None:
    words = options(objective__weighting="learned", train__length="3 steps")
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words)
    assert done.code == 0, done.err
    newest = max((tmp_path / "run" / "state").iterdir())
    with safe_open(newest, framework="pt") as state:
        names = {name for name in state.keys() if name.startswith("objective.")}  # noqa: SIM118 - not a dict
        assert names == {
            "objective.values",
            *(f"objective.optimizer.0.{name}" for name in ("step", "exp_avg", "exp_avg_sq")),
        }
        assert state.get_tensor("objective.optimizer.0.step").item() == 3
        assert state.get_tensor("objective.values").abs().max() > 0
    with safe_open(tmp_path / "run" / "checkpoints" / "mira.safetensors", framework="pt") as file:
        assert all(name.startswith("lora_") for name in file.keys())  # noqa: SIM118 - not a dict
        assert file.metadata()["ss_weighting_scheme"] == "learned"
    events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    assert len([event for event in events if event["kind"] == "step"]) == 3


def test_held_out_losses_are_compared_by_one_measure(dataset: Path) -> None:
    """What is learned of the weights moves no held-out loss, and so none of the base's after a new start."""
    baked = bake(dataset, objective=LEARNED, validation={"share": 0.5})
    assert baked.held_out is not None and baked.beside is not None
    before = baked.held_out.compare()
    with torch.no_grad():
        baked.beside.group.values.fill_(0.5)
    assert baked.held_out.compare() == before
