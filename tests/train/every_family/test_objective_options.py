"""What objectives offer, in runs of tiny models: it can be interrupted, is told in the file, and draws as it trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from lorabake.base.events import Events
from lorabake.recipe import check
from lorabake.train.run import train

CASES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "noise of its own": (
        "sd1",
        ["noise='offset'", "noise_offset_random=true", "noise_offset_adaptive=0.1", "input_perturbation=0.1",
         "input_perturbation_random=true", "loss='huber'"],
        {"ss_noise_offset": "0.05", "ss_noise_offset_random_strength": "True", "ss_adaptive_noise_scale": "0.1", "ss_ip_noise_gamma": "0.1",
         "ss_ip_noise_gamma_random_strength": "True", "ss_loss_type": "huber", "ss_huber_schedule": "snr", "ss_huber_c": "0.1"},
    ),
    "pyramid": (
        "sd1",
        ["noise='pyramid'", "weighting='p2'"],
        {"ss_multires_noise_iterations": "6", "ss_multires_noise_discount": "0.3", "ss_weighting_scheme": "p2", "ss_min_snr_gamma": "None"},
    ),
    "no signal at the end": (
        "sd2-v",
        ["zero_terminal_snr=true", "weighting='learned'", "timesteps='stratified'"],
        {"ss_zero_terminal_snr": "True", "ss_timestep_sampling": "stratified", "ss_weighting_scheme": "learned"},
    ),
    "as much shift as pixels": (
        "sd3",
        ["timesteps='resolution-shift'", "loss='l1'"],
        {"ss_timestep_sampling": "resolution_shift", "ss_discrete_flow_shift": "3.0", "ss_loss_type": "l1", "ss_huber_c": "None"},
    ),
    "flow": (
        "flux",
        ["weighting='learned'", "loss='smooth-l1'", "huber_schedule='exponential'", "input_perturbation=0.1"],
        {"ss_loss_type": "smooth_l1", "ss_huber_schedule": "exponential", "ss_huber_scale": "1.0", "ss_weighting_scheme": "learned"},
    ),
}  # fmt: skip
"""A family, what is set of its objective, and what its file says."""


def run(kitchens: Callable[[str], Any], into: Path, family: str, settings: list[str], stops: int = 0) -> Path:
    """Five steps, the first ones in as many sittings of a single step."""
    words = ["train.length='5 steps'", "save.state_every=1e6", *(f"objective.{setting}" for setting in settings)]
    checked = check(kitchens(family).recipe, words)
    for _ in range(stops):
        assert not train(checked, into, Events(), stop=lambda: True).finished
    assert train(checked, into, Events()).finished
    return into


def files(folder: Path) -> dict[str, bytes]:
    """Checkpoints, samples, events and the last state."""
    states = sorted((folder / "state").glob("*"))
    wanted = itertools.chain((folder / "checkpoints").iterdir(), (folder / "samples").iterdir(), states[-1:])
    return {path.name: path.read_bytes() for path in [*wanted, folder / "events.jsonl"]}


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_pieces_is_the_same_to_the_last_bit(kitchens: Any, tmp_path: Path, case: str) -> None:
    family, settings, said = CASES[case]
    whole = files(run(kitchens, tmp_path / "whole", family, settings))
    pieces = files(run(kitchens, tmp_path / "pieces", family, settings, stops=3))
    assert whole.keys() == pieces.keys()
    assert [name for name in whole if whole[name] != pieces[name]] == []
    with safe_open(tmp_path / "whole" / "checkpoints" / "mira.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {name: metadata.get(name) for name in said} == said


def test_samples_are_drawn_on_the_schedule_that_is_trained(kitchens: Any, tmp_path: Path) -> None:
    from lorabake.sampling.samplers import DDIM
    from lorabake.train.prepare import prepare

    recipe = kitchens("sd2-v").recipe
    models = [prepare(check(recipe, words), Events()).model for words in ([], ["objective.zero_terminal_snr=true"])]
    first, last = zip(*(DDIM.trajectory(model, 5, 16).legs[::4] for model in models), strict=True)
    assert (first[0].timestep, first[1].timestep) == (801, 999), "leading, and trailing"
    assert first[0].alpha_bar > 0 and first[1].alpha_bar == 0.0
    assert last[0].next_alpha_bar == pytest.approx(last[1].next_alpha_bar), "the clean end stays"


def test_generate_draws_on_the_schedule_that_a_file_was_trained_for(kitchens: Any, tmp_path: Path) -> None:
    import lorabake

    family, settings, _ = CASES["no signal at the end"]
    into = run(kitchens, tmp_path / "run", family, settings)
    base = check(kitchens(family).recipe).recipe.model
    prompts = check(kitchens(family).recipe).recipe.sample.prompts
    drawn = lorabake.generate(prompts, loras=[into / "checkpoints" / "mira.safetensors"], **base.source())
    samples = [Image.open(path) for path in sorted((into / "samples").glob("step00000005_*.png"))]
    assert samples and [image.tobytes() for image in drawn] == [image.tobytes() for image in samples]


def test_a_whole_model_is_saved_with_the_schedule_that_was_trained(kitchens: Any, tmp_path: Path) -> None:
    from lorabake.families import load_model
    from lorabake.train.prepare import prepare

    baked = prepare(check(kitchens("sd2-v").recipe, ["objective.zero_terminal_snr=true"]), Events())
    baked.graft.remove()
    trained = baked.model
    trained.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert trained.betas_T is not None and again.betas_T is not None
    assert again.betas_T.tolist() == trained.betas_T.tolist() and again.betas_T[-1] == 1
    assert again.sampler["timestep_spacing"] == "trailing"
