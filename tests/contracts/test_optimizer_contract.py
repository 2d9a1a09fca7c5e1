"""What every optimizer promises, whichever package it comes from."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lorabake.base.cards import cards
from lorabake.optimizers._build import build, finished_weights
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.optimizer import AveragingOptimizer, Optimizer, OptimizerCard, OptimizerSettings
from lorabake.train.state import Progress, read_state, save_state, states_of

CARDS = [cast(OptimizerCard, card) for card in cards("optimizer").values()]
every = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)

SHAPES = {"down": (4, 96), "up": (64, 4), "conv": (8, 4, 3, 3), "vector": (33,), "number": ()}
RATES = {
    "muon": 0.3,
    "adafactor": 0.1,
    "came": 0.1,
    "lion": 0.02,
    "dadapt-adam": 1.0,
    "prodigy": 1.0,
    "prodigy-schedule-free": 1.0,
}
"""That learn well in a few steps; 0.1 for the others."""


class Bowl:
    """A quadratic in weights of all shapes, in two groups: nearest to ``goals`` is best."""

    def __init__(self, card: OptimizerCard, settings: OptimizerSettings | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.parameters = [
            {name: nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
            | {"column by column": nn.Parameter(0.1 * torch.randn(4, 24, generator=generator).t())}
            for _ in range(2)
        ]
        self.goals = [torch.randn(p.shape, generator=generator) for named in self.parameters for p in named.values()]
        self.groups = [
            FlatGroup(name, named) for name, named in zip(("denoiser", "text"), self.parameters, strict=True)
        ]
        self.rate = RATES.get(card.name, 0.1)
        chosen = settings or cast(OptimizerSettings, card.settings())
        self.optimizer: Optimizer = build(card, chosen, self.groups, [self.rate, self.rate])

    def loss(self) -> Tensor:
        flat = [p for named in self.parameters for p in named.values()]
        return torch.stack([(p - goal).square().sum() for p, goal in zip(flat, self.goals, strict=True)]).sum()

    def steps(self, first: int, last: int) -> Bowl:
        for step in range(first, last):
            for group, param_group in zip(self.groups, self.optimizer.param_groups, strict=True):
                group.zero_gradient()
                param_group["lr"] = self.rate * (1 - 0.01 * step)
            loss = self.loss()
            (loss * (1 + 0.1 * torch.sin(torch.tensor(float(step))))).backward()
            self.optimizer.step()
        return self

    def weights(self) -> Tensor:
        return torch.cat([group.values.detach() for group in self.groups]).clone()


@every
def test_its_card(card: OptimizerCard) -> None:
    assert isinstance(card, OptimizerCard) and issubclass(card.settings, OptimizerSettings)
    bowl = Bowl(card)
    assert isinstance(bowl.optimizer, AveragingOptimizer) == card.averages
    assert len(bowl.optimizer.param_groups) == 2
    assert all(("d" in group and card.rate(group) == group["d"] * group["lr"]) if card.adapts else card.rate(group) == group["lr"]
               for group in bowl.optimizer.param_groups)  # fmt: skip


@every
def test_it_goes_downhill(card: OptimizerCard) -> None:
    bowl = Bowl(card, cast(OptimizerSettings, card.settings.model_validate({"d0": 1e-2})) if card.adapts else None)
    before = float(bowl.loss().detach())
    bowl.steps(0, 90)
    with finished_weights(bowl.optimizer, bowl.groups):
        assert float(bowl.loss().detach()) < 0.5 * before


@every
def test_it_says_nothing(card: OptimizerCard, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to the command line, which may be writing JSON there."""
    Bowl(card).steps(0, 2)
    assert capsys.readouterr().out == ""


@every
def test_a_rate_of_zero_moves_nothing(card: OptimizerCard) -> None:
    bowl = Bowl(card)
    before = bowl.weights()
    bowl.rate = 0.0
    bowl.steps(0, 2)
    assert torch.equal(bowl.weights(), before)
    bowl.rate = RATES.get(card.name, 0.1)
    bowl.steps(2, 4)
    assert not torch.equal(bowl.weights(), before)


@every
@pytest.mark.parametrize("done", [0, 1, 7])
def test_it_goes_on_to_the_same_bytes(card: OptimizerCard, done: int, tmp_path: Path) -> None:
    whole, first, second = (Bowl(card) for _ in range(3))
    whole.steps(0, 12)
    first.steps(0, done)
    save_state(tmp_path, Progress(done, 3), first.groups, first.optimizer)
    assert read_state(states_of(tmp_path)[-1], second.groups, second.optimizer) == Progress(done, 3)
    second.steps(done, 12)
    assert torch.equal(second.weights(), whole.weights())
    for name, bowl in (("one", whole), ("other", second)):
        save_state(tmp_path / name, Progress(12, 3), bowl.groups, bowl.optimizer)
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in ("one", "other"))
    assert one.name == other.name and one.read_bytes() == other.read_bytes()


@every
def test_looking_at_the_finished_weights_changes_nothing(card: OptimizerCard) -> None:
    looked_at, left_alone = Bowl(card), Bowl(card)
    for step in range(6):
        looked_at.steps(step, step + 1)
        training = looked_at.weights()
        with finished_weights(looked_at.optimizer, looked_at.groups):
            assert torch.equal(looked_at.weights(), training) != (card.averages and step > 0)
        assert torch.equal(looked_at.weights(), training)
    assert torch.equal(looked_at.weights(), left_alone.steps(0, 6).weights())


@every
def test_a_setting_of_another_optimizer_is_an_error(card: OptimizerCard) -> None:
    for wrong in ({"betaas": (0.9, 0.99)}, {"lr": 1.0}, {"weight_decay": "much"}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError):
            card.settings.model_validate(wrong)


@every
def test_every_setting_reaches_it(card: OptimizerCard) -> None:
    """Whatever is set is what the package's own groups say, or an argument that it takes."""
    import inspect

    taken = inspect.signature(card.load().__init__).parameters
    arguments = cast(OptimizerSettings, card.settings()).arguments()
    assert arguments.keys() <= taken.keys() or any(p.kind is p.VAR_KEYWORD for p in taken.values())
    for group in Bowl(card).optimizer.param_groups:
        for name, value in arguments.items():
            assert name not in group or group[name] == value


ODD: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.9), "weight_decay": 0.1},
    "adamw-8bit": {"betas": (0.8, 0.9), "weight_decay": 0.1},
    "prodigy": {"d_coef": 2.0, "weight_decay": 0.1, "growth_rate": 1.5, "use_bias_correction": False, "slice_p": 1},
    "prodigy-schedule-free": {"d_coef": 2.0, "weight_decay": 0.1, "schedulefree_c": 8.0, "betas": (0.95, 0.98)},
    "dadapt-adam": {"weight_decay": 0.1, "growth_rate": 1.5, "d0": 1e-4},
    "adafactor": {"weight_decay": 0.1, "clip_threshold": 2.0},
    "came": {"weight_decay": 0.1, "betas": (0.8, 0.9, 0.99)},
    "lion": {"weight_decay": 0.1, "betas": (0.95, 0.98)},
    "adamw-schedule-free": {"weight_decay": 0.1, "r": 1.0, "betas": (0.95, 0.98)},
    "muon": {"weight_decay": 0.1, "ns_steps": 3, "nesterov": False},
}


def direct(card: OptimizerCard, settings: OptimizerSettings, parameters: list[list[nn.Parameter]], rate: float) -> Any:
    """The package's own optimizer on weights that nobody has packed."""
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = card.load()(
            [{"params": group, "lr": rate} for group in parameters], lr=rate, **settings.arguments()
        )
    if card.averages:
        optimizer.train()
    return optimizer


@every
@pytest.mark.parametrize("odd", [False, True], ids=["as it is", "set otherwise"])
def test_it_is_the_packages_own_on_unpacked_weights(card: OptimizerCard, odd: bool) -> None:
    """Packing changes nothing but the order of sums. Blocks of eight bits alone cross the borders of packed weights."""
    settings = cast(OptimizerSettings, card.settings(**ODD[card.name] if odd else {}))
    bowl = Bowl(card, settings)
    reshape: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    if card.sees != "flat":
        reshape = lambda tensor: tensor.flatten(1) if tensor.ndim > 2 else tensor  # noqa: E731
    if card.sees == "matrices":
        reshape = lambda tensor: tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)  # noqa: E731
    apart = [
        [nn.Parameter(reshape(p.detach().clone().contiguous())) for p in named.values()] for named in bowl.parameters
    ]
    goals = [reshape(goal) for goal in bowl.goals]
    optimizer = direct(card, settings, apart, bowl.rate)
    for step in range(10):
        bowl.steps(step, step + 1)
        for group in optimizer.param_groups:
            group["lr"] = bowl.rate * (1 - 0.01 * step)
        flat = [p for named in apart for p in named]
        for parameter in flat:
            parameter.grad = None
        loss = torch.stack([(p - goal).square().sum() for p, goal in zip(flat, goals, strict=True)]).sum()
        (loss * (1 + 0.1 * torch.sin(torch.tensor(float(step))))).backward()
        optimizer.step()
    ours = torch.cat([p.detach().flatten() for named in bowl.parameters for p in named.values()])
    theirs = torch.cat([p.detach().flatten() for named in apart for p in named])
    rtol, atol = (0.05, 0.05) if card.name == "adamw-8bit" else (2e-4, 2e-5)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    if card.adapts:
        assert card.rate(bowl.optimizer.param_groups[0]) == pytest.approx(
            card.rate(optimizer.param_groups[0]), rel=1e-3
        )
