"""Every optimizer in the real loop: killed at any step it goes on to the same bytes, and files hold the finished weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.base.events import Event, Events
from lorabake.optimizers._build import finished_weights
from lorabake.recipe import check_values
from lorabake.train.bake import Bake
from lorabake.train.loop import run_loop
from lorabake.train.prepare import prepare
from lorabake.train.run import train
from lorabake.train.state import Progress, read_state, save_state, states_of

Options = Callable[..., list[str]]


def bake(dataset: Path, optimizer: dict[str, Any], **sections: dict[str, Any]) -> Bake:
    raw = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2, "conv_rank": 1},
        "train": {"batch_size": 2, "device": "cpu", "length": "6 steps"},
        "optimizer": optimizer,
        **sections,
    }
    return prepare(check_values(raw), Events())


def weights(baked: Bake) -> torch.Tensor:
    return torch.cat([group.values.detach() for group in baked.groups]).clone()


@pytest.mark.parametrize("name", cards("optimizer"))
def test_a_run_cut_in_two_is_the_run(name: str, dataset: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    whole = bake(dataset, {"name": name})
    before = weights(whole)
    run_loop(whole, 0, Events(told.append), lambda step: False)
    assert not torch.equal(weights(whole), before) and bool(weights(whole).isfinite().all())

    first, second = bake(dataset, {"name": name}), bake(dataset, {"name": name})
    again: list[Event] = []
    run_loop(first, 0, Events(again.append), lambda step: step == 3)
    with finished_weights(first.optimizer, first.groups):
        pass  # a checkpoint
    save_state(tmp_path, Progress(3, 0), first.groups, first.optimizer)
    assert read_state(states_of(tmp_path)[-1], second.groups, second.optimizer)
    run_loop(second, 3, Events(again.append), lambda step: False)
    assert torch.equal(weights(second), weights(whole))
    assert again == told


def test_the_rate_that_is_told_is_the_one_that_is_found(dataset: Path) -> None:
    told: list[Event] = []
    baked = bake(dataset, {"name": "dadapt-adam"}, schedule={"name": "linear"})
    baked.optimizer.param_groups[0]["d"] = 1e-4  # as after many steps
    run_loop(baked, 3, Events(told.append), lambda step: step == 4)
    assert told[0]["lr"] == {"denoiser": pytest.approx(0.5e-4), "text_encoder": pytest.approx(0.5e-4)}


def trained(dataset: Path, into: Path, **settings: Any) -> Path:
    """The run folder of a whole run with these settings; double underscores stand for dots."""
    raw: dict[str, dict[str, Any]] = {}
    given = {
        "model__base": str(dataset.with_name("base")),
        "data__folder": str(dataset),
        "adapter__rank": 2,
        "train__batch_size": 2,
        "train__device": "cpu",
        "output__name": "mira",
    }
    for name, value in {**given, **settings}.items():
        section, _, key = name.partition("__")
        raw.setdefault(section, {})[key] = value
    train(check_values(raw), into, Events())
    return into


@pytest.mark.parametrize("name", ["adamw-schedule-free", "prodigy-schedule-free"])
def test_files_of_averaging_optimizers_hold_the_average(
    dataset: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"optimizer__name": name, "train__length": "6 steps", "save__dtype": "fp32"}
    often = trained(dataset, tmp_path / "often", save__every="1 steps", **settings)
    once = trained(dataset, tmp_path / "once", save__every="100 steps", **settings)
    assert capfd.readouterr().out == "", "standard output belongs to the command line"
    final = Path("checkpoints", "mira.safetensors")
    assert (often / final).read_bytes() == (once / final).read_bytes()
    state = load_file(max((once / "state").iterdir()))
    trained_on = torch.cat([state["denoiser.values"], state["text_encoder.values"]])
    in_file = torch.cat(
        [values.flatten() for key, values in load_file(once / final).items() if not key.endswith("alpha")]
    )
    assert in_file.numel() == trained_on.numel()
    assert not torch.equal(in_file.sort()[0], trained_on.sort()[0]), "a file holds other weights than those trained on"


@pytest.mark.slow
def test_killed_and_continued(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any, kill_at: Any
) -> None:
    """From the command line, with an optimizer that keeps everything there is: numbers by weight and by group, and another set of weights."""
    words = options(optimizer__name="prodigy-schedule-free", train__length="8 steps", save__every="3 steps")
    assert oven.run("train", dataset, "--into", tmp_path / "whole", *words).code == 0
    pid = oven.start("train", dataset, "--into", tmp_path / "cut", *words)
    log = tmp_path / "cut" / "events.jsonl"
    killed = kill_at(pid, lambda: log.exists() and log.read_bytes().count(b'"kind": "step"') >= 4)
    oven.end()
    assert killed
    done = oven.run("train", dataset, "--into", tmp_path / "cut", *words)
    assert done.code == 0, done.err
    assert result(tmp_path / "cut").differences(result(tmp_path / "whole")) == []


def test_the_file_tells_the_optimizer_and_the_schedule(dataset: Path, tmp_path: Path) -> None:
    folder = trained(
        dataset, tmp_path, optimizer__name="prodigy", optimizer__d_coef=2.0, train__length="4 steps",
        schedule__name="rex-warm-restarts", schedule__first_cycle="2 steps", schedule__warmup="1 steps",
    )  # fmt: skip
    with safe_open(folder / "checkpoints" / "mira.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_optimizer"].startswith(
        "prodigyopt.prodigy.Prodigy(betas=(0.9, 0.999),eps=1e-08,weight_decay=0.01,"
    )
    assert "d_coef=2.0" in metadata["ss_optimizer"] and "growth_rate=inf" in metadata["ss_optimizer"]
    assert (metadata["ss_learning_rate"], metadata["ss_unet_lr"], metadata["ss_text_encoder_lr"]) == (
        "1.0",
        "1.0",
        "1.0",
    )
    assert metadata["ss_lr_scheduler"] == "RexAnnealingWarmRestarts" and metadata["ss_lr_warmup_steps"] == "1"
    assert json.loads(metadata["ss_lr_scheduler_args"]) == {"first_cycle": "2 steps"}
    steps = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [step["lr"]["denoiser"] < 0.01 for step in steps if step["kind"] == "step"] == [True] * 4


def test_a_warm_up_that_never_ends_is_refused(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup +6 steps, and the whole run has 6"):
        bake(dataset, {"name": "adamw"}, schedule={"warmup": "6 steps"})
