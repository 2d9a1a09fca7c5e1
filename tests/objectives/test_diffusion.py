"""The formulas of diffusion, by hand and against diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.families.networks.noise import betas_of
from lorabake.objectives.diffusion import Diffusion, DiffusionSettings

CPU = torch.device("cpu")
BETAS_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


def objective(prediction: Any = "epsilon", betas_T: Tensor = BETAS_T, **settings: Any) -> Diffusion:
    return Diffusion(DiffusionSettings(**settings), betas_T, prediction, CPU)


def sample(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x, ε, t."""
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(count, 4, 3, 3, generator=generator) for _ in range(2))
    return x, noise, torch.tensor([0, 1, 500, 998, 999][:count])


def alpha_bar(t: int) -> float:
    """ᾱ_t by the definition: the product of 1 − β over the first t + 1 levels."""
    product = 1.0
    for i in range(t + 1):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        product *= 1 - root**2
    return product


@pytest.mark.parametrize("t", [0, 1, 37, 500, 999])
def test_signal_and_noise_by_hand(t: int) -> None:
    made = objective()
    assert float(made.signal_T[t]) == pytest.approx(math.sqrt(alpha_bar(t)), rel=1e-6)
    assert float(made.noise_T[t]) == pytest.approx(math.sqrt(1 - alpha_bar(t)), rel=1e-6)


@pytest.mark.parametrize("t", [0, 1, 200, 500, 999])
def test_min_snr_by_hand(t: int) -> None:
    snr = alpha_bar(t) / (1 - alpha_bar(t))
    for gamma in (1.0, 5.0, 20.0):
        epsilon = objective(weighting="min-snr", min_snr_gamma=gamma).weight_T[t]
        v = objective("v", weighting="min-snr", min_snr_gamma=gamma).weight_T[t]
        assert float(epsilon) == pytest.approx(min(snr, gamma) / snr, rel=1e-5)
        assert float(v) == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-5)


def test_min_snr_known_numbers() -> None:
    """ᾱ_0 = 0.99915, so SNR = 1175.47: ε weighs 5/1175.47, v weighs 5/1176.47."""
    assert float(objective().weight_T[0]) == pytest.approx(0.0042536, rel=1e-4)
    assert float(objective("v").weight_T[0]) == pytest.approx(0.00425, rel=1e-4)
    assert float(objective().weight_T[999]) == 1.0
    assert float(objective("v").weight_T[999]) == pytest.approx(0.0046600 / 1.0046600, rel=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_without_weighting_all_timesteps_count_alike(prediction: str) -> None:
    assert torch.equal(objective(prediction, weighting="none").weight_T, torch.ones(1000))


def test_x_is_recovered_from_its_target() -> None:
    x, noise, t = sample()
    for prediction in ("epsilon", "v"):
        made = objective(prediction)
        noisy, target = made.corrupt(x, noise, t), made.target(x, noise, t)
        signal, level = (table[t][:, None, None, None] for table in (made.signal_T, made.noise_T))
        found = (noisy - level * target) / signal if prediction == "epsilon" else signal * noisy - level * target
        torch.testing.assert_close(found, x, rtol=1e-4, atol=2e-5)


def test_the_target_of_epsilon_is_the_noise_itself() -> None:
    x, noise, t = sample()
    assert objective().target(x, noise, t) is noise


def test_variance_is_kept() -> None:
    made = objective()
    torch.testing.assert_close(made.signal_T.square() + made.noise_T.square(), torch.ones(1000))


def test_the_loss_of_a_sample_by_hand() -> None:
    prediction, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]])
    made = objective(weighting="min-snr")
    t = torch.tensor([999, 0])
    loss = made.weigh(made.error(prediction, target, t).mean((1, 2, 3)), t)
    assert loss.tolist() == pytest.approx([5.0 * 1.0, 2.0 * float(made.weight_T[0])])
    assert made.error(prediction.bfloat16(), target.bfloat16(), t).dtype == torch.float32


def test_timesteps_are_within_bounds_and_all_drawn() -> None:
    drawn = objective(min_timestep=100, max_timestep=110).draw_timesteps(
        (2000, 4, 8, 8), torch.Generator().manual_seed(1)
    )
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == set(range(100, 110))
    everything = objective().draw_timesteps((20000, 4, 8, 8), torch.Generator().manual_seed(1))
    assert everything.min() == 0 and everything.max() == 999
    assert float(everything.float().mean()) == pytest.approx(499.5, rel=0.02)


def test_rules_of_timesteps_are_for_whole_ones_too() -> None:
    for rule, middle in (("sigmoid", 0.68), ("logit-normal", 0.68), ("stratified", 0.46)):
        made = objective("v", timesteps=rule)
        drawn = made.draw_timesteps((20000, 4, 8, 8), torch.Generator().manual_seed(1))
        assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
        between = ((drawn >= 269) & (drawn < 731)).float().mean()  # logistic(±1), one deviation to either side
        assert float(between) == pytest.approx(middle, abs=0.01)
    drawn = objective(timesteps="stratified").draw_timesteps((1000, 4, 8, 8), torch.Generator().manual_seed(1))
    assert sorted(drawn.tolist()) == list(range(1000))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [None, None, None]),
        ({"timesteps": "stratified"}, ["stratified", None, None]),
        ({"timesteps": "sigmoid", "sigmoid_scale": 0.5}, ["sigmoid", 0.5, None]),
        ({"timesteps": "logit-normal", "logit_mean": 0.5}, ["logit_normal", None, 0.5]),
    ],
)
def test_files_say_how_timesteps_were_drawn(settings: dict[str, Any], expected: list[Any]) -> None:
    said = DiffusionSettings(**settings).metadata()
    assert [said[name] for name in ("timestep_sampling", "sigmoid_scale", "logit_mean")] == expected


def test_a_shorter_schedule_bounds_the_timesteps() -> None:
    drawn = objective(betas_T=BETAS_T[:20]).draw_timesteps((500, 4, 8, 8), torch.Generator().manual_seed(1))
    assert set(drawn.tolist()) == set(range(20))


def test_timesteps_are_the_generators_alone() -> None:
    torch.manual_seed(1)
    first = objective().draw_timesteps((8, 4, 8, 8), torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(first, objective().draw_timesteps((8, 4, 8, 8), torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    ("low", "high", "levels"), [(0, 1000, 1000), (100, 900, 1000), (7, 8, 1000), (0, 1000, 20), (50, 1000, 20)]
)
def test_the_stream_of_timesteps_is_what_it_always_was(low: int, high: int, levels: int) -> None:
    """Runs that were started long ago must go on to the same bytes."""
    made = objective(betas_T=BETAS_T[:levels], min_timestep=low, max_timestep=high)
    for seed in range(50):
        drawn = made.draw_timesteps((7, 4, 8, 8), torch.Generator().manual_seed(seed))
        top = min(high, levels)
        expected = torch.randint(min(low, top - 1), top, (7,), generator=torch.Generator().manual_seed(seed))
        assert drawn.dtype == expected.dtype and torch.equal(drawn, expected)


@pytest.mark.parametrize(("low", "high"), [(500, 500), (900, 100)])
def test_an_empty_range_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="nothing lies between"):
        DiffusionSettings(min_timestep=low, max_timestep=high)


@pytest.mark.parametrize("field", ["loss", "weighting", "timesteps"])
def test_a_rule_that_is_not_there(field: str) -> None:
    with pytest.raises(UserError, match="'no-such' is not a known"):
        rule: dict[str, Any] = {field: "no-such"}
        objective(**rule)


# ---- zero terminal SNR


@pytest.mark.parametrize("weighting", ["none", "min-snr", "soft-min-snr", "p2", "debiased", "epsilon-like", "learned"])
def test_the_last_timestep_may_be_noise_alone(weighting: str) -> None:
    """Then v is −x, and SNR 0 is no trouble: weights are those of the rescaled schedule."""
    betas_T = betas_of({"trained_betas": BETAS_T.tolist(), "num_train_timesteps": 1000, "rescale_betas_zero_snr": True,
                        "prediction_type": "v_prediction"})  # fmt: skip
    made = objective("v", betas_T, weighting=weighting)
    x, noise, t = sample()
    assert torch.equal(made.corrupt(x, noise, t)[-1], noise[-1]) and torch.equal(made.target(x, noise, t)[-1], -x[-1])
    assert bool(torch.isfinite(made.weigh(torch.ones(5), t)).all())
    at_the_end = {"none": 1.0, "learned": 1.0, "debiased": 1.0}.get(weighting, 0.0)
    assert float(made.weight_T[-1]) == at_the_end
    snr = 1 / (1 / ((1 - betas_T).cumprod(0)[900]) - 1)
    assert weighting != "min-snr" or float(made.weight_T[900]) == pytest.approx(float(snr / (snr + 1)), rel=1e-5)


# ---- against diffusers


def test_the_schedule_is_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    model = load_model("pocket")
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    assert model.betas_T is not None
    torch.testing.assert_close(model.betas_T.float(), theirs.betas, rtol=0, atol=0)
    ours = (1 - model.betas_T).cumprod(0)
    torch.testing.assert_close(ours.float(), theirs.alphas_cumprod, rtol=2e-5, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noise_and_targets_are_diffusers(prediction: str) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    x, noise, t = sample()
    steps: Any = t
    made = objective(prediction)
    torch.testing.assert_close(made.corrupt(x, noise, t), theirs.add_noise(x, noise, steps), rtol=1e-5, atol=1e-5)
    if prediction == "v":
        torch.testing.assert_close(made.target(x, noise, t), theirs.get_velocity(x, noise, steps), rtol=1e-5, atol=1e-5)


def test_min_snr_is_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import compute_snr

    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    snr = compute_snr(theirs, torch.arange(1000))
    torch.testing.assert_close(objective().weight_T, snr.clamp(max=5) / snr, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(objective("v").weight_T, snr.clamp(max=5) / (snr + 1), rtol=1e-3, atol=1e-6)
