"""Whole runs: the same bytes every time, and nothing that is said not to matter matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

Options = Callable[..., list[str]]


def run(oven: Any, dataset: Path, into: Path, words: list[str]) -> Path:
    done = oven.run("train", dataset, "--into", into, *words)
    assert done.code == 0, done.err
    return into


def final(into: Path) -> bytes:
    return (into / "checkpoints" / "mira.safetensors").read_bytes()


def events(into: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (into / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(oven: Any, drawings: list, options: Options, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and a run of two epochs on it."""
    from lorabake.sampling.infotext import save_png

    folder = tmp_path_factory.mktemp("first")
    for index, (image, caption) in enumerate(drawings):
        path = folder / "mira" / "1_mira" / f"{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(caption)
    return folder / "mira", run(oven, folder / "mira", folder / "run", options(train__length="2 epochs"))


def test_the_same_recipe_elsewhere_gives_the_same_bytes(
    oven: Any, first: tuple[Path, Path], options: Options, result: Any, tmp_path: Path
) -> None:
    dataset, before = first
    moved = tmp_path / "another place" / "mira"
    shutil.copytree(dataset, moved)
    again = run(oven, moved, tmp_path / "another run", options(train__length="2 epochs"))
    assert result(again).differences(result(before)) == []


def test_an_empty_cache_changes_nothing(
    oven: Any, first: tuple[Path, Path], options: Options, result: Any, tmp_path: Path
) -> None:
    dataset, before = first
    shutil.copytree(dataset, tmp_path / "mira", ignore=shutil.ignore_patterns(".lorabake"))
    again = run(oven, tmp_path / "mira", tmp_path / "run", options(train__length="2 epochs"))
    assert result(again).differences(result(before)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"sample__prompts": ["1girl --s 2 --d 1", "forest --s 2 --d 2"]},
        {"save__state_every": 1e6},
        {"save__every": "1 steps"},
        {"train__gradient_checkpointing": True},
    ],
    ids=str,
)
def test_what_does_not_train_does_not_change_the_weights(
    oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path, change: dict[str, Any]
) -> None:
    dataset, before = first
    after = run(oven, dataset, tmp_path / "run", options(train__length="2 epochs", **change))
    if "train__gradient_checkpointing" in change:  # it is in the metadata
        ours, theirs = (load_file(folder / "checkpoints" / "mira.safetensors") for folder in (after, before))
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    else:
        assert final(after) == final(before)
    losses = [[event["loss"] for event in events(folder) if event["kind"] == "step"] for folder in (after, before)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "change",
    [
        {"train__seed": 7},
        {"optimizer__lr": 1e-3},
        {"adapter__dropout": 0.2},
        {"data__flip": True},
        {"data__captions__shuffle": True},
        {"schedule__name": "linear"},
        {"objective__weighting": "none"},
    ],
    ids=str,
)
def test_what_trains_changes_the_weights(
    oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path, change: dict[str, Any]
) -> None:
    dataset, before = first
    after = run(oven, dataset, tmp_path / "run", options(train__length="2 epochs", **change))
    ours, theirs = (load_file(folder / "checkpoints" / "mira.safetensors") for folder in (after, before))
    assert ours.keys() == theirs.keys()
    assert any(not ours[name].equal(theirs[name]) for name in theirs)


def test_what_a_run_leaves(first: tuple[Path, Path]) -> None:
    _, folder = first
    told = events(folder)
    kinds = [event["kind"] for event in told]
    assert kinds == ["step"] * 3 + ["checkpoint"] + ["step"] * 3 + ["checkpoint", "picture_losses", "finished"]
    steps = [event for event in told if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event["epoch"] for event in steps] == [1, 1, 1, 2, 2, 2]
    assert all(event["images"] == 2 and 0 < event["loss"] < 10 and event["grad_norm"] > 0 for event in steps)
    assert [event["file"] for event in told if event["kind"] == "checkpoint"] == [
        "checkpoints/mira-000001.safetensors",
        "checkpoints/mira.safetensors",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "events.jsonl",
        "losses.csv",
        "pictures.json",
        "recipe.toml",
        "run.json",
        "state",
    ]
    assert not list(folder.rglob("*.part"))
    with safe_open(folder / "checkpoints" / "mira.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_network_dim"]) == ("6", "2", "2")


def test_the_frozen_recipe_is_the_run(oven: Any, first: tuple[Path, Path], result: Any, tmp_path: Path) -> None:
    _, before = first
    again = run(oven, before / "recipe.toml", tmp_path / "run", [])
    assert result(again).differences(result(before)) == []


def test_a_part_with_rate_zero_is_not_in_the_file(
    oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path
) -> None:
    dataset, _ = first
    for rates, prefix in (
        ({"optimizer__text_encoder_lr": 0.0}, "lora_unet"),
        ({"optimizer__lr": 0.0, "optimizer__text_encoder_lr": 1e-3}, "lora_te"),
    ):
        folder = run(oven, dataset, tmp_path / prefix, options(train__length="2 steps", **rates))
        names = load_file(folder / "checkpoints" / "mira.safetensors")
        assert names and all(name.startswith(prefix) for name in names)


@pytest.mark.slow
def test_a_loss_goes_down(oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path) -> None:
    """Not a measure of quality: only that steps go in the right direction. One picture, learned by heart."""
    dataset, _ = first
    only = tmp_path / "one"
    shutil.copytree(dataset, only, ignore=shutil.ignore_patterns(".lorabake", *(f"00{i}.*" for i in range(1, 6))))
    words = options(train__length="40 steps", optimizer__lr=1e-2, train__batch_size=1, objective__min_timestep=400, objective__max_timestep=401,
                    schedule__name="constant", save__every="100 steps", save__state_every=1e6)  # fmt: skip
    losses = [event["loss"] for event in events(run(oven, only, tmp_path / "run", words)) if event["kind"] == "step"]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


# ---- when it blows up


def test_an_exploding_run_stops_and_says_why(
    oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path
) -> None:
    dataset, _ = first
    words = options(train__length="60 steps", optimizer__lr=10, optimizer__text_encoder_lr=0, schedule__warmup=0.1, save__every="2 steps",
                    save__dtype="fp32", train__max_grad_norm=0)  # fmt: skip
    spoil = """
import lorabake.train.loop as loop
real = loop.batch_loss
loop.batch_loss = lambda bake, step, micro, batch: real(bake, step, micro, batch) * (float("nan") if step == 4 else 1)
"""
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=spoil)
    assert done.code == 3, done.err
    assert "Step 5: the loss is not finite." in done.err and "Traceback" not in done.err
    assert "1_mira/00" in done.err and "try a tenth of it" in done.err and "last good files are kept" in done.err
    assert [event["step"] for event in events(tmp_path / "run") if event["kind"] == "step"] == [1, 2, 3, 4]
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 2 and all(bool(tensor.isfinite().all()) for path in kept for tensor in load_file(path).values())
    again = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=spoil)
    assert again.code == 3 and "Step 5: the loss is not finite." in again.err


def test_a_real_explosion_is_caught(oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path) -> None:
    dataset, _ = first
    words = options(train__length="60 steps", optimizer__lr=10, optimizer__text_encoder_lr=10, save__every="100 steps", save__state_every=1e6,
                    train__max_grad_norm=0, adapter__alpha=1e6, schedule__name="constant")  # fmt: skip
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words)
    assert done.code == 3, done.err
    assert "is not finite" in done.err and "Pictures in it: 1_mira/00" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_infinite_gradient_is_told_from_an_infinite_loss(
    oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path
) -> None:
    dataset, _ = first
    spoil = """
import lorabake.train.loop as loop
real = loop.clip_gradients
def clip(groups, most):
    groups[0].gradient[3] = float("inf")
    return real(groups, most)
loop.clip_gradients = clip
"""
    done = oven.run("train", dataset, "--into", tmp_path / "run", *options(train__length="3 steps"), before=spoil)
    assert done.code == 3 and "Step 1: the gradient is not finite." in done.err


def test_weights_too_large_for_the_file_are_named(
    oven: Any, first: tuple[Path, Path], options: Options, tmp_path: Path
) -> None:
    dataset, _ = first
    spoil = """
import lorabake.train.run as run
real = run.write_checkpoint
def write(folder, checked, bake, step):
    bake.groups[0].values.data[0] = 1e6
    return real(folder, checked, bake, step)
run.write_checkpoint = write
"""
    done = oven.run("train", dataset, "--into", tmp_path / "run", *options(train__length="1 steps"), before=spoil)
    assert done.code == 3 and "not finite as fp16" in done.err and "bf16 or fp32" in done.err
    assert not list((tmp_path / "run").rglob("mira.safetensors*"))


def test_a_disk_that_fills_up_ends_the_run_with_its_name(
    oven: Any, first: tuple[Path, Path], options: Options, result: Any, tmp_path: Path
) -> None:
    """Then there is space again, and the same command goes on to the same bytes."""
    dataset, before = first
    full = """
import errno, os
count, real = [0], os.replace
def replace(source, target):
    if "state" in str(target) and ".safetensors" in str(target):
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(source, target)
os.replace = replace
"""
    words = options(train__length="2 epochs")
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=full)
    assert done.code == 3 and "No space left on device" in done.err and "Traceback" not in done.err
    again = oven.run("train", dataset, "--into", tmp_path / "run", *words)
    assert again.code == 0 and "at step 2 of 6" in again.err
    assert result(tmp_path / "run").differences(result(before)) == []
