"""How much each timestep counts, by hand; and weights that are learned."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lorabake.base.cards import cards
from lorabake.objectives._learned import LearnedWeights
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.objectives.diffusion import Diffusion, DiffusionSettings
from lorabake.objectives.flow import Flow, FlowSettings
from lorabake.protocols.objective import LearningObjective, RuleCard
from lorabake.train.beside import Beside

CPU = torch.device("cpu")
BETAS_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SNR = torch.tensor([0.25, 1.0, 4.0, 9.0, 3000.0], dtype=torch.float64)
WEIGHTINGS = sorted(cards("weighting"))


def weights(weighting: str, prediction: str = "epsilon", **settings: Any) -> list[float]:
    """Weights at :data:`SNR`."""
    return cards("weighting")[weighting].load()(SNR, prediction, DiffusionSettings(**settings)).tolist()


def test_by_hand_for_epsilon() -> None:
    assert weights("min-snr", min_snr_gamma=4) == pytest.approx([1, 1, 1, 4 / 9, 4 / 3000])
    assert weights("soft-min-snr", min_snr_gamma=4) == pytest.approx([4 / 4.25, 4 / 5, 1 / 2, 4 / 13, 4 / 3004])
    assert weights("p2") == pytest.approx([0.8, 0.5, 0.2, 0.1, 1 / 3001])
    assert weights("p2", p2_k=7, p2_gamma=0.5) == pytest.approx([7.25**-0.5, 8**-0.5, 11**-0.5, 0.25, 3007**-0.5])
    assert weights("debiased") == pytest.approx([2, 1, 1 / 2, 1 / 3, 1000**-0.5])


def test_by_hand_for_v() -> None:
    assert weights("min-snr", "v", min_snr_gamma=4) == pytest.approx([0.2, 0.5, 0.8, 0.4, 4 / 3001])
    assert weights("soft-min-snr", "v", min_snr_gamma=4) == pytest.approx(
        [4 / 4.25 / 5, 4 / 5 / 2, 1 / 2 * 4 / 5, 4 / 13 * 9 / 10, 4 / 3004 * 3000 / 3001]
    )
    assert weights("p2", "v") == pytest.approx([0.8 * 0.2, 0.25, 0.16, 0.09, 3000 / 3001**2])
    assert weights("debiased", "v") == pytest.approx([0.8, 0.5, 0.2, 0.1, 1 / 1001])
    assert weights("epsilon-like", "v") == pytest.approx([0.2, 0.5, 0.8, 0.9, 1000 / 1001])


@pytest.mark.parametrize("weighting", ["min-snr", "soft-min-snr", "p2"])
def test_an_error_of_v_counts_as_the_same_error_of_epsilon_would(weighting: str) -> None:
    """v̂ = √ᾱ ε̂ − √(1 − ᾱ) x̂ with the picture x̂ = (x_t − √(1 − ᾱ) ε̂) / √ᾱ: one answer, two ways of saying it."""
    generator = torch.Generator().manual_seed(1)
    x, noise, guess = (torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 100, 300, 600, 900, 999])
    made = {name: Diffusion(DiffusionSettings(weighting=weighting), BETAS_T, name, CPU) for name in ("epsilon", "v")}
    signal, level = (table[t][:, None, None, None].double() for table in (made["v"].signal_T, made["v"].noise_T))
    picture = (signal * x + level * noise - level * guess) / signal
    answers = {"epsilon": guess, "v": signal * guess - level * picture}
    losses = [
        one.weigh(one.error(answers[name], one.target(x, noise, t), t).mean((1, 2, 3)), t) for name, one in made.items()
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


def test_soft_min_snr_is_min_snr_far_from_the_kink() -> None:
    """And half of it there."""
    snr = torch.tensor([1e-4, 5.0, 1e4], dtype=torch.float64)
    settings = DiffusionSettings()
    hard, soft = (cards("weighting")[name].load()(snr, "epsilon", settings) for name in ("min-snr", "soft-min-snr"))
    assert (soft / hard).tolist() == pytest.approx([1, 0.5, 1], rel=1e-3)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_rule_goes_by_what_its_card_says_and_by_nothing_else(weighting: str) -> None:
    changed = {"min_snr_gamma": 2.0, "p2_k": 2.0, "p2_gamma": 0.5, "learned_lr": 0.1}
    card = cast(RuleCard, cards("weighting")[weighting])
    for name, value in changed.items():
        for prediction in {"epsilon", "v"} & set(card.predictions):
            moved = weights(weighting, prediction, **{name: value}) != weights(weighting, prediction)
            assert moved == (name in card.reads and name != "learned_lr"), (prediction, name)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [5.0, False, None, None, None]),
        ({"weighting": "none"}, [None, False, None, None, None]),
        ({"weighting": "debiased"}, [None, True, None, None, None]),
        ({"weighting": "soft-min-snr", "min_snr_gamma": 3.0}, [3.0, False, "soft-min-snr", None, None]),
        ({"weighting": "p2"}, [None, False, "p2", 1.0, 1.0]),
        ({"weighting": "learned"}, [None, False, "learned", None, None]),
    ],
)
def test_files_say_how_timesteps_count(settings: dict[str, Any], expected: list[Any]) -> None:
    said = DiffusionSettings(**settings).metadata()
    names = ("min_snr_gamma", "debiased_estimation", "weighting_scheme", "p2_gamma", "p2_k")
    assert [said[name] for name in names] == expected


# ---- learned


def learning(kind: str, **settings: Any) -> Diffusion | Flow:
    if kind == "flow":
        return Flow(FlowSettings(weighting="learned", **settings), {})
    return Diffusion(DiffusionSettings(weighting="learned", **settings), BETAS_T, cast(Any, kind), CPU)


KINDS = ["epsilon", "v", "flow"]


def some(kind: str) -> tuple[Tensor, Tensor]:
    """Errors and timesteps of five samples."""
    t = torch.tensor([0, 200, 500, 800, 999])
    return torch.tensor([0.5, 2.0, 0.1, 1.0, 0.03]), t.float() if kind == "flow" else t


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_start_as_the_plain_loss(kind: str) -> None:
    error_B, t = some(kind)
    made = learning(kind)
    assert torch.equal(made.weigh(error_B, t), error_B)
    assert isinstance(made, LearningObjective) and [value.numel() for value in made.parameters().values()] == [16]


@pytest.mark.parametrize("kind", KINDS)
def test_without_what_was_learned_it_is_the_plain_loss_again(kind: str) -> None:
    error_B, t = some(kind)
    made = learning(kind)
    with torch.no_grad():
        made.parameters()["weights"].fill_(0.5)
    assert not torch.equal(made.weigh(error_B, t), error_B)
    assert torch.equal(made.unlearned().weigh(error_B, t), error_B)
    assert made.parameters(), "the one that learns still does"


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_by_hand(kind: str) -> None:
    """u = a₀ + a₁ cos(π s) + a₂ cos(2π s), s = σ / (1 + σ): loss and gradients are those of L / exp(u) + u."""
    error_B, t = some(kind)
    made, levels = learning(kind), learning(kind).levels(t)
    (a,) = made.parameters().values()
    with torch.no_grad():
        a[:3] = torch.tensor([-1.0, 0.5, 0.25])
    error_B.requires_grad_()
    loss_B = made.weigh(error_B, t)
    loss_B.sum().backward()
    assert error_B.grad is not None and a.grad is not None
    expected = [0.0, 0.0, 0.0]
    losses = loss_B.tolist()
    for index, share in enumerate(levels[1].tolist()):
        u = -1 + 0.5 * math.cos(math.pi * share) + 0.25 * math.cos(2 * math.pi * share)
        assert losses[index] == pytest.approx(float(error_B[index].detach()) / math.exp(u) + u, rel=1e-5)
        assert float(error_B.grad[index]) == pytest.approx(math.exp(-u), rel=1e-5), "what the adapter learns by"
        for wave in range(3):
            expected[wave] += (1 - float(error_B[index].detach()) / math.exp(u)) * math.cos(wave * math.pi * share)
    assert a.grad[:3].tolist() == pytest.approx(expected, rel=1e-4)


def test_shares_of_noise_by_hand() -> None:
    position, share = learning("flow").levels(torch.tensor([0.0, 250.0, 1000.0]))
    assert position.tolist() == share.tolist() == [0.0, 0.25, 1.0]
    position, share = learning("epsilon").levels(torch.tensor([0, 500, 999]))
    sigma = [math.sqrt(1 / float((1 - BETAS_T[: t + 1]).prod()) - 1) for t in (0, 500, 999)]
    assert position.tolist() == pytest.approx([0.0, 0.5, 0.999])
    assert share.tolist() == pytest.approx([value / (1 + value) for value in sigma], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_is_how_hard_each_level_is(kind: str) -> None:
    """Errors that differ 300-fold come to count alike: u finds the logarithm of their mean."""
    made, generator = learning(kind), torch.Generator().manual_seed(1)
    beside = Beside.of(made)
    assert beside is not None and beside.optimizer.param_groups[0]["lr"] == 0.01
    steps = 1000 if kind == "flow" else 999
    every = torch.linspace(0, steps, 100) if kind == "flow" else torch.arange(0, 1000, 10)
    expected = (0.003 + 0.9 * (1 - made.levels(every)[1]) ** 4).log()
    for _ in range(600):
        at = torch.randint(0, 100, (4,), generator=generator)
        spread = (0.5 * torch.randn(4, generator=generator)).exp() / math.exp(0.125)
        beside.group.zero_gradient()
        made.weigh(expected[at].exp() * spread, every[at]).mean().backward()
        beside.optimizer.step()
    with torch.no_grad():
        loss_B = made.weigh(expected.exp(), every)
    assert float((loss_B - 1 - expected).abs().mean()) < 0.15, "L / exp(ln L) + ln L"


def test_nothing_is_learned_where_nothing_is_to_be() -> None:
    for weighting in set(WEIGHTINGS) - {"learned"}:
        assert Beside.of(Diffusion(DiffusionSettings(weighting=weighting), BETAS_T, "v", CPU)) is None


def test_no_weight_is_decayed() -> None:
    """Only errors move them: a level that is not drawn keeps what it has."""
    made = LearnedWeights("cpu")
    assert float(made.u(torch.tensor([0.3])).detach()) == 0.0
    beside = Beside.of(learning("epsilon", learned_lr=0.05))
    assert beside is not None
    assert beside.optimizer.param_groups[0]["weight_decay"] == 0 and beside.optimizer.param_groups[0]["lr"] == 0.05
    assert ObjectiveSettings(weighting="learned").used("learned_lr") == 0.01
