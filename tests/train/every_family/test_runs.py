"""Every family from the recipe to a drawn picture, through the command line: what is written, and that a kill changes no byte of it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from lorabake.base.header import read_header
from lorabake.formats.kohya import network_type, read_lora

needs_kill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def test_a_recipe_is_fine_before_and_after(oven: Any, kitchen: Any, whole: Path) -> None:
    for recipe in (kitchen.recipe, whole / "recipe.toml"):
        said = oven.run("validate", recipe)
        assert said.code == 0 and f"{recipe} is fine." in said.out, said.err


def test_the_file_says_what_it_is_and_for_which_base(kitchen: Any, whole: Path) -> None:
    family, path = kitchen.family, whole / "checkpoints" / "mira.safetensors"
    assert sorted(file.name for file in path.parent.iterdir()) == ["mira-000003.safetensors", "mira.safetensors"]
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    expected = {
        "ss_base_model_version": family.base_version,
        "ss_v2": str(family.base_version.startswith("sd_v2")),  # web UIs show a LoRA among those of SD2 by it
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.prediction_type": family.prediction,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_steps": "20",
        "ss_epoch": "5",
        "ss_num_train_images": "6",
        "ss_output_name": "mira",
        "sshs_model_hash": read_header(path).payload_sha256[:12],
    }
    assert {key: said.get(key) if key != "sshs_model_hash" else said[key][:12] for key in expected} == expected
    buckets = json.loads(said["ss_bucket_info"])["buckets"].values()
    assert [(bucket["resolution"], bucket["count"]) for bucket in buckets] == [([64, 96], 3), ([80, 80], 3)]


def test_every_layer_that_is_usual_is_trained_and_none_else(kitchen: Any, whole: Path) -> None:
    path = whole / "checkpoints" / "mira.safetensors"
    layers = read_lora(path).layers
    assert network_type(layers) == "lora"
    assert {"_".join(name.split("_")[:2]) for name in layers} == kitchen.family.layers
    idle = {name for name in layers if kitchen.family.idle and name.startswith(kitchen.family.idle)}
    assert bool(idle) == bool(kitchen.family.idle)
    before = read_lora(path.with_name("mira-000003.safetensors")).layers
    up = "lora_up.weight"
    assert {name for name, tensors in layers.items() if tensors[up].equal(before[name][up])} == idle


def test_generate_draws_with_the_file_what_the_live_adapter_draws(
    oven: Any, kitchen: Any, whole: Path, tmp_path: Path
) -> None:
    """Samples of a run are drawn by the adapter as it is in memory: before the first step it changes nothing.

    At most 1 of 255 in any pixel: sums go by where in memory the adapter's weights lie.
    """
    lora = ["--lora", whole / "checkpoints" / "mira.safetensors"]
    for name, words in {"base": [], "lora": lora}.items():
        said = oven.run(
            "generate", kitchen.prompt, "--base", kitchen.folder / "model", *words, "--out", tmp_path / f"{name}.png"
        )
        assert said.code == 0, said.err
    base, drawn = pixels(tmp_path / "base.png"), pixels(tmp_path / "lora.png")
    before, after_all = (pixels(whole / "samples" / f"step{step:08d}_00.png") for step in (0, 20))
    assert np.abs(base - before).max() <= 1 and np.abs(drawn - after_all).max() <= 1
    assert np.abs(drawn - base).mean() > 2, "the LoRA is seen"


def test_the_same_recipe_elsewhere_gives_the_same_bytes(
    oven: Any, kitchen: Any, whole: Path, result: Any, tmp_path: Path
) -> None:
    shutil.copytree(kitchen.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("whole", ".lorabake"))
    done = oven.run("train", "recipe.toml", cwd=tmp_path / "moved")
    assert done.code == 0, done.err
    assert result(tmp_path / "moved" / "runs" / "mira").differences(result(whole)) == []


def steps_done(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_bytes().count(b'"kind": "step"') if events.exists() else 0


def cut(oven: Any, recipe: Path, into: Path, moments: list[Callable[[], bool]], kill_at: Any) -> int:
    """Run a recipe to its end, killed at each of the moments; how many kills came before the end."""
    kills = 0
    for moment in moments:
        kills += kill_at(oven.start("train", recipe, "--into", into), moment)
        oven.end()
    done = oven.run("train", recipe, "--into", into)
    assert done.code == 0, done.err
    return kills


def after(seconds: float) -> Callable[[], bool]:
    """The moment so many seconds after it is first asked for."""
    began: list[float] = []

    def passed() -> bool:
        began.append(time.monotonic())
        return began[-1] - began[0] > seconds

    return passed


@needs_kill
def test_killed_twice_it_ends_with_the_same_bytes(
    oven: Any, kitchen: Any, whole: Path, result: Any, kill_at: Any, tmp_path: Path
) -> None:
    rng, into = random.Random(kitchen.name), tmp_path / "cut"
    step, pause = rng.randint(2, 12), after(rng.uniform(0, 0.03))
    moments = [after(rng.uniform(0, 0.3)), lambda: steps_done(into) >= step and pause()]
    assert cut(oven, kitchen.recipe, into, moments, kill_at) == 2
    assert result(into).differences(result(whole)) == []


@pytest.mark.slow
@needs_kill
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_killed_many_times_it_ends_with_the_same_bytes(
    oven: Any, kitchens: Any, result: Any, kill_at: Any, tmp_path: Path, name: str
) -> None:
    kitchen, whole, began = kitchens(name), tmp_path / "whole", time.monotonic()
    assert oven.run("train", kitchen.recipe, "--into", whole).code == 0
    seconds = time.monotonic() - began
    rng, into = random.Random(f"many {name}"), tmp_path / "cut"
    moments = [after(rng.uniform(0, 0.4 * seconds)) for _ in range(8)]
    assert cut(oven, kitchen.recipe, into, moments, kill_at) >= 3
    assert result(into).differences(result(whole)) == []
