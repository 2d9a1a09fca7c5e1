"""Which noise pictures are trained with, by hand."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Generator, Tensor

from lorabake.base.cards import cards
from lorabake.base.streams import torch_stream
from lorabake.objectives.diffusion import Diffusion, DiffusionSettings
from lorabake.objectives.flow import Flow, FlowSettings
from lorabake.objectives.noise import perturbed
from lorabake.protocols.objective import RuleCard

BETAS_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
NOISES = sorted(cards("noise"))


def stream(name: str, slot: int) -> Generator:
    return torch_stream(7, name, slot)


def never(name: str, slot: int) -> Generator:
    raise AssertionError("nothing is to be drawn")


def sample(count: int = 3, height: int = 6, width: int = 10) -> tuple[Tensor, Tensor]:
    """Noise and latents."""
    generator = torch.Generator().manual_seed(1)
    noise, latents = (torch.randn(count, 4, height, width, generator=generator) for _ in range(2))
    return noise, latents


def made(rule: str, given: tuple[Tensor, Tensor], **settings: Any) -> Tensor:
    return cards("noise")[rule].load()(*given, DiffusionSettings(**settings), stream)


def drawn(name: str, slot: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=stream(name, slot))


def test_an_offset_by_hand() -> None:
    given = sample()
    found = made("offset", given, noise_offset=0.25)
    for slot in range(3):
        expected = given[0][slot] + 0.25 * drawn("noise_offset", slot, 4, 1, 1)
        torch.testing.assert_close(found[slot], expected)


def test_an_adaptive_offset_by_hand() -> None:
    """By the absolute mean of the picture's channel; below zero there is none."""
    noise, latents = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 2.0]], [[-4.0, 1.0]]]])  # means 1.5 and -1.5
    eta = drawn("noise_offset", 0, 2).view(2, 1).expand(2, 2)
    found = made("offset", (noise, latents), noise_offset=0.1, noise_offset_adaptive=0.2)
    torch.testing.assert_close(found[0, :, 0], (0.1 + 0.2 * 1.5) * eta)
    assert torch.equal(made("offset", (noise, latents), noise_offset=0.1, noise_offset_adaptive=-1.0), noise)


def test_a_random_offset_is_between_none_and_all_of_it() -> None:
    given = sample(200, 1, 1)
    whole, some = (
        made("offset", given, noise_offset=0.5, noise_offset_random=chosen) - given[0] for chosen in (False, True)
    )
    shares = (some / whole)[:, :, 0, 0]
    torch.testing.assert_close(shares, shares[:, :1].expand(200, 4), rtol=1e-3, atol=1e-3)
    assert float(shares.min()) > -1e-3 and float(shares.max()) < 1.001
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.06)
    expected = torch.rand((), generator=stream("noise_offset_strength", 3))
    assert float(shares[3, 0]) == pytest.approx(float(expected), abs=1e-3)


def test_a_pyramid_of_two_cells_by_hand() -> None:
    """The first grain is as fine as the noise; the second is at most half of 2 × 2: one number a channel."""
    noise, latents = sample(2, 2, 2)
    found = made("pyramid", (noise, latents), pyramid_discount=0.5, pyramid_iterations=9)
    for slot in range(2):
        generator = stream("noise_pyramid", slot)
        torch.rand((), generator=generator, dtype=torch.float64)
        fine = torch.randn(4, 2, 2, generator=generator)
        torch.rand((), generator=generator, dtype=torch.float64)
        coarse = torch.randn(4, 1, 1, generator=generator)
        total = noise[slot] + fine + 0.5 * coarse
        torch.testing.assert_close(found[slot], total / total.std())


def test_a_pyramid_of_one_is_plain_noise_again() -> None:
    given = sample(50, 16, 16)
    found = made("pyramid", given, pyramid_iterations=1)
    torch.testing.assert_close(found.std(dim=(1, 2, 3)), torch.ones(50))
    neighbours = (found[..., 1:] * found[..., :-1]).mean()
    assert abs(float(neighbours)) < 0.02, "cells know nothing of each other"
    correlation = (found * given[0]).mean()
    assert float(correlation) == pytest.approx(0.5**0.5, abs=0.02), "half of it is the noise that was given"


def test_a_pyramid_is_coarse_and_as_strong_as_noise() -> None:
    given = sample(100, 16, 24)
    wide, narrow = (made("pyramid", given, pyramid_discount=discount) for discount in (0.8, 0.3))
    for found in (wide, narrow):
        torch.testing.assert_close(found.std(dim=(1, 2, 3)), torch.ones(100))
    means = [float(noise.mean((2, 3)).std()) for noise in (given[0], narrow, wide)]
    assert means[0] < means[1] / 1.5 and means[1] < means[2] / 1.5, "the larger the grain, the less it averages out"


def test_a_pyramid_ends_where_a_grain_is_a_single_cell() -> None:
    given = sample(3, 8, 16)
    assert torch.equal(made("pyramid", given, pyramid_iterations=4), made("pyramid", given, pyramid_iterations=20))
    assert not torch.equal(made("pyramid", given, pyramid_iterations=1), made("pyramid", given, pyramid_iterations=2))


def test_perturbed_by_hand() -> None:
    noise, _ = sample()
    found = perturbed(noise, DiffusionSettings(input_perturbation=0.1), stream)
    for slot in range(3):
        torch.testing.assert_close(found[slot], noise[slot] + 0.1 * drawn("input_perturbation", slot, 4, 6, 10))
    some = perturbed(noise, DiffusionSettings(input_perturbation=0.1, input_perturbation_random=True), stream)
    for slot in range(3):
        share = torch.rand((), generator=stream("input_perturbation_strength", slot))
        torch.testing.assert_close(some[slot], noise[slot] + share * (found[slot] - noise[slot]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", sorted(set(NOISES) - {"gaussian"}))
def test_a_picture_gets_the_same_in_any_company(rule: str) -> None:
    noise, latents = sample()
    together = made(rule, (noise, latents))
    order = [2, 0, 1]
    shuffled = cards("noise")[rule].load()(noise[order], latents[order], DiffusionSettings(), lambda name, slot: stream(name, order[slot]))  # fmt: skip
    assert torch.equal(shuffled, together[order])
    assert torch.equal(made(rule, (noise[:1], latents[:1])), together[:1])
    assert not torch.equal(together, noise) and together.dtype == torch.float32 and together.is_contiguous()


@pytest.mark.parametrize("rule", NOISES)
def test_a_rule_goes_by_what_its_card_says_and_by_nothing_else(rule: str) -> None:
    changed: dict[str, Any] = {
        "noise_offset": 0.2, "noise_offset_adaptive": 0.1, "noise_offset_random": True, "pyramid_iterations": 2,
        "pyramid_discount": 0.7, "input_perturbation": 0.1, "input_perturbation_random": True,
    }  # fmt: skip
    card, given = cast(RuleCard, cards("noise")[rule]), sample(2, 16, 16)
    for name, value in changed.items():
        assert torch.equal(made(rule, given), made(rule, given, **{name: value})) != (name in card.reads), name


def objectives(**settings: Any) -> list[Diffusion | Flow]:
    return [
        *(
            Diffusion(DiffusionSettings(**settings), BETAS_T, prediction, torch.device("cpu"))
            for prediction in ("epsilon", "v")
        ),
        Flow(FlowSettings(**settings), {}),
    ]


def test_plain_noise_is_left_alone() -> None:
    noise, latents = sample()
    for objective in objectives():
        found = objective.noise(noise, latents, never)
        assert found.keys() == {"noise_BCHW"} and found["noise_BCHW"] is noise


def test_what_is_mixed_in_and_what_is_asked_for() -> None:
    """Perturbation comes on top of whatever noise there is, and is not asked for."""
    noise, latents = sample()
    for objective in objectives(noise="offset", input_perturbation=0.2):
        found = objective.noise(noise, latents, stream)
        assert torch.equal(found["noise_BCHW"], made("offset", (noise, latents)))
        settings = DiffusionSettings(input_perturbation=0.2)
        assert torch.equal(found["mixed_BCHW"], perturbed(found["noise_BCHW"], settings, stream))


@pytest.mark.parametrize("kind", [DiffusionSettings, FlowSettings])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [None, False, None, None, None, None, False]),
        ({"noise": "offset"}, [0.05, False, None, None, None, None, False]),
        ({"noise": "offset", "noise_offset": 0.1, "noise_offset_random": True, "noise_offset_adaptive": 0.2},
         [0.1, True, 0.2, None, None, None, False]),
        ({"noise": "pyramid"}, [None, False, None, 6, 0.3, None, False]),
        ({"input_perturbation": 0.1}, [None, False, None, None, None, 0.1, False]),
        ({"input_perturbation": 0.1, "input_perturbation_random": True}, [None, False, None, None, None, 0.1, True]),
        ({"input_perturbation_random": True}, [None, False, None, None, None, None, False]),
    ],
)  # fmt: skip
def test_files_say_which_noise(kind: Any, settings: dict[str, Any], expected: list[Any]) -> None:
    said = kind(**settings).metadata()
    assert [
        said[name]
        for name in (
            "noise_offset",
            "noise_offset_random_strength",
            "adaptive_noise_scale",
            "multires_noise_iterations",
            "multires_noise_discount",
            "ip_noise_gamma",
            "ip_noise_gamma_random_strength",
        )
    ] == expected
