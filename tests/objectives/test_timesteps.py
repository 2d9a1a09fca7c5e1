"""Which timesteps are trained: every rule's range, its shape by hand, and what the rest of the field computes."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorabake.base.cards import cards
from lorabake.objectives.flow import FlowSettings
from lorabake.objectives.timesteps import SHIFT, Draw, shifted, size_shift
from lorabake.protocols.objective import RuleCard

RULES = sorted(cards("timesteps"))


def shares(rule: str, count: int = 1000, tokens: int = 4096, sampler: dict[str, Any] | None = None, seed: int = 1, **settings: Any) -> Tensor:  # fmt: skip
    shape = (count, 16, 2 * (tokens // 64), 2 * 64)
    made = FlowSettings(timesteps=rule, **settings)
    draw = Draw.of(shape, 1 << 24, sampler or {}, made, torch.Generator().manual_seed(seed))
    assert draw.tokens == tokens // 64 * 64
    return cards("timesteps")[rule].load()(draw)


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32), scale=st.floats(0.05, 10), shift=st.floats(0.01, 100), mean=st.floats(-10, 10))
def test_shares_are_shares(rule: str, seed: int, scale: float, shift: float, mean: float) -> None:
    drawn = shares(rule, 64, seed=seed, sigmoid_scale=scale, shift=shift, logit_mean=mean, logit_std=scale)
    assert drawn.shape == (64,) and drawn.dtype == torch.float64
    assert bool(((drawn >= 0) & (drawn <= 1)).all())


@pytest.mark.parametrize("rule", RULES)
def test_shares_are_the_generators_alone(rule: str) -> None:
    torch.manual_seed(1)
    first = shares(rule)
    torch.manual_seed(2)
    assert torch.equal(first, shares(rule)) and not torch.equal(first, shares(rule, seed=2))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_goes_by_what_its_card_says_and_by_nothing_else(rule: str) -> None:
    changed: dict[str, Any] = {"sigmoid_scale": 0.5, "shift": 2.0, "logit_mean": 0.5, "logit_std": 0.5}
    changed["stratified"] = True
    card = cast(RuleCard, cards("timesteps")[rule])
    for name, value in changed.items():
        assert torch.equal(shares(rule), shares(rule, **{name: value})) != (name in card.reads), name


def test_uniform_by_hand() -> None:
    drawn = shares("uniform", 20000)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01) and float(drawn.std()) == pytest.approx(
        12**-0.5, abs=0.01
    )
    draw = Draw(500, 4, 1, {}, FlowSettings(), torch.Generator().manual_seed(1))
    assert set(cards("timesteps")["uniform"].load()(draw).tolist()) == {0.125, 0.375, 0.625, 0.875}


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_a_stratified_batch_covers_the_range_evenly(count: int, seed: int) -> None:
    """One in each n-th of the range, all as far apart."""
    drawn = sorted(shares("stratified", count, seed=seed).tolist())
    assert [int(share * count + 1e-9) for share in drawn] == list(range(count))
    assert all(high - low == pytest.approx(1 / count) for low, high in itertools.pairwise(drawn))


def test_every_place_of_a_stratified_batch_is_uniform() -> None:
    batches = torch.stack([shares("stratified", 4, seed=seed) for seed in range(4000)])
    points = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for place in range(4):
        torch.testing.assert_close(batches[:, place].quantile(points), points, rtol=0, atol=0.03)


SPREAD = [rule for rule in RULES if rule != "stratified"]
GIVEN: dict[str, Any] = {"sigmoid_scale": 0.7, "shift": 2.5, "logit_mean": 0.4, "logit_std": 0.8}
SHIFTS = {"shift": 2.5, "resolution-shift": 2.5 * 0.5, "flux-shift": size_shift(1024, {})}


def cumulative(rule: str, share: Tensor) -> Tensor:
    """The distribution function of each rule at 1024 tokens with ``GIVEN``, in closed form."""
    if rule == "uniform":
        return share
    unshifted = shifted(share, 1 / SHIFTS.get(rule, 1.0))
    logit = torch.log(unshifted / (1 - unshifted))
    mean, width = (0.4, 0.8) if rule == "logit-normal" else (0.0, 0.7)
    return (1 + torch.erf((logit - mean) / width / math.sqrt(2))) / 2


@pytest.mark.parametrize("rule", SPREAD)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_any_rule_covers_its_distribution_evenly(rule: str, count: int, seed: int) -> None:
    """One in each n-th of the distribution, all as far apart in it; put back through the distribution function it is the evenly spread batch."""
    drawn = shares(rule, count, tokens=1024, seed=seed, stratified=True, **GIVEN)
    even = shares("stratified", count, seed=seed)
    torch.testing.assert_close(cumulative(rule, drawn), even, rtol=0, atol=1e-9)
    assert sorted((cumulative(rule, drawn) * count + 1e-7).int().tolist()) == list(range(count))


@pytest.mark.parametrize("rule", SPREAD)
def test_a_spread_rule_draws_from_the_same_distribution(rule: str) -> None:
    """Unspread draws follow the closed form, and so does every place of spread batches (Kolmogorov and Smirnov's distance)."""
    batches = torch.stack([shares(rule, 4, tokens=1024, seed=seed, stratified=True, **GIVEN) for seed in range(4000)])
    for drawn in (shares(rule, 4000, tokens=1024, **GIVEN), *batches.T):
        ranks = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        assert float((cumulative(rule, drawn.sort().values) - ranks).abs().max()) < 1.95 / math.sqrt(4000)  # p = 0.001


def test_spread_uniform_is_stratified() -> None:
    assert torch.equal(shares("uniform", 8, stratified=True), shares("stratified", 8))
    assert torch.equal(shares("stratified", 8, stratified=True), shares("stratified", 8))


def test_resolution_shift_by_hand() -> None:
    """A picture of four times the pixels has twice the shift, at the model's own size it is shift itself."""
    plain = shares("sigmoid")
    for tokens, factor in ((1024, 0.5), (4096, 1.0), (16384, 2.0)):
        torch.testing.assert_close(shares("resolution-shift", tokens=tokens, shift=3.0), shifted(plain, 3.0 * factor))
    assert torch.equal(shares("resolution-shift"), shares("shift"))
    draw = Draw.of((8, 16, 32, 32), 1000, {}, FlowSettings(), torch.Generator().manual_seed(1), usual_tokens=256)
    alike = Draw.of((8, 16, 32, 32), 1000, {}, FlowSettings(), torch.Generator().manual_seed(1))
    assert torch.equal(cards("timesteps")["resolution-shift"].load()(draw), cards("timesteps")["shift"].load()(alike))


def test_sigmoid_by_hand() -> None:
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(shares("sigmoid"), 1 / (1 + torch.exp(-normal)))
    torch.testing.assert_close(shares("sigmoid", sigmoid_scale=0.5), 1 / (1 + torch.exp(-normal / 2)))
    torch.testing.assert_close(shares("logit-normal", logit_mean=1, logit_std=2), 1 / (1 + torch.exp(-1 - 2 * normal)))
    assert torch.equal(shares("logit-normal"), shares("sigmoid"))


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0.05, 20))
def test_a_shift_keeps_order_and_ends_and_can_be_undone(one: float, other: float, shift: float) -> None:
    low, high = sorted((one, other))
    assert shifted(0.0, shift) == 0 and shifted(1.0, shift) == 1
    assert 0 < shifted(low, shift) <= shifted(high, shift) < 1
    assert shifted(shifted(low, shift), 1 / shift) == pytest.approx(low)
    assert (shifted(low, shift) > low) == (shift > 1) or shift == pytest.approx(1)
    assert shifted(low, 1.0) == pytest.approx(low)


def test_a_shift_multiplies_the_ratio_of_noise_to_picture() -> None:
    """s/(1 − s) of 1/4 is 1/3; three times that is 1, which is half and half."""
    assert shifted(0.25, 3.0) == pytest.approx(0.5)
    assert shifted(0.5, 3.0) == pytest.approx(0.75)


def test_whose_shift_it_is() -> None:
    plain = shares("sigmoid")
    torch.testing.assert_close(shares("shift", shift=2.0, sampler={"shift": 5.0}), shifted(plain, 2.0))
    torch.testing.assert_close(shares("shift", sampler={"shift": 5.0}), shifted(plain, 5.0))
    torch.testing.assert_close(shares("shift"), shifted(plain, SHIFT))
    assert float(shares("shift", 20000).median()) == pytest.approx(0.75, abs=0.02)


def test_the_shift_of_a_size_by_hand() -> None:
    """At 256 px Flux has 256 tokens and μ = 0.5, at 1024 px 4096 and 1.15; 768 px lies on the line between."""
    assert size_shift(256, {}) == pytest.approx(math.exp(0.5))
    assert size_shift(4096, {}) == pytest.approx(math.exp(1.15)) == pytest.approx(3.1582, abs=1e-4)
    assert math.log(size_shift(2304, {})) == pytest.approx(0.5 + 0.65 * 2048 / 3840)
    assert math.log(size_shift(100, {"base_image_seq_len": 0, "max_image_seq_len": 200, "base_shift": 1, "max_shift": 3})) == 2  # fmt: skip


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_larger_pictures_get_more_shift(one: int, other: int) -> None:
    assert (size_shift(one, {}) < size_shift(other, {})) == (one < other)


def test_flux_shift_is_for_the_size_that_is_trained() -> None:
    for tokens in (256, 1024, 4096):
        torch.testing.assert_close(
            shares("flux-shift", tokens=tokens), shifted(shares("sigmoid"), size_shift(tokens, {}))
        )


def test_flux_shift_is_diffusers() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (64, 256, 1024, 4096, 8192):
        expected = theirs.time_shift(calculate_shift(tokens), 1.0, shares("sigmoid"))
        torch.testing.assert_close(shares("flux-shift", tokens=tokens), expected)


def test_logit_normal_is_diffusers() -> None:
    """Their draws differ; their distribution is the same."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(3)
    theirs = compute_density_for_timestep_sampling("logit_normal", 40000, 0.5, 0.8, generator=generator)
    ours = shares("logit-normal", 40000, logit_mean=0.5, logit_std=0.8)
    points = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(ours.quantile(points), theirs.double().quantile(points), rtol=0.02, atol=0)
