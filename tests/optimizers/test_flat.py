"""One buffer for many weights, and nobody notices."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lorabake.base.cards import cards
from lorabake.optimizers._build import build
from lorabake.optimizers._flat import FlatGroup, clip_gradients
from lorabake.optimizers.adamw import AdamW, AdamWSettings
from lorabake.protocols.optimizer import OptimizerCard, OptimizerSettings, Sight

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": (2, 3, 1, 1), "d": ()}


def weights(seed: int = 1, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def loss(parameters: dict[str, nn.Parameter], step: int) -> Tensor:
    """Something with a different gradient for every weight and step."""
    generator = torch.Generator().manual_seed(100 + step)
    terms = [(p * torch.randn(p.shape, generator=generator)).sin().sum() for p in parameters.values()]
    return torch.stack(terms).sum()


SETTINGS = pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.0}, {"betas": (0.9, 0.99), "weight_decay": 0.1}], ids=str
)


def trained(group: FlatGroup, parameters: dict[str, nn.Parameter], optimizer: Any, steps: int = 6) -> FlatGroup:
    """The group after some steps of an optimizer on it."""
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        group.zero_gradient()
        loss(parameters, step).backward()
        optimizer.step()
    return group


def ours_and_torchs(
    parameters: dict[str, nn.Parameter], settings: dict[str, Any]
) -> tuple[FlatGroup, AdamW, torch.optim.AdamW]:
    """Ours on the flat buffer of ``parameters``, and torch's on each of them apart."""
    chosen: dict[str, Any] = {**AdamWSettings().model_dump(), **settings}
    apart = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in parameters.values()], fused=True, **chosen)
    group = FlatGroup("denoiser", parameters)
    return group, AdamW([{"params": [group.values], "lr": 0.01}], **chosen), apart


@SETTINGS
def test_adamw_is_torchs_bit_for_bit(settings: dict[str, Any]) -> None:
    """Ours calls the kernel itself; on the same buffer torch's optimizer gives the same bytes."""
    ours, theirs = weights(), weights()
    group, optimizer, _ = ours_and_torchs(ours, settings)
    same = FlatGroup("denoiser", theirs)
    chosen: dict[str, Any] = {**AdamWSettings().model_dump(), **settings}
    torchs = torch.optim.AdamW([same.values], fused=True, **chosen)
    trained(group, ours, optimizer)
    trained(same, theirs, torchs)
    assert torch.equal(group.values, same.values)
    state, expected = optimizer.state[group.values], torchs.state[same.values]
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@SETTINGS
@pytest.mark.parametrize("whole", [True, False])
def test_adamw_on_the_flat_buffer_is_adamw_on_each_weight(settings: dict[str, Any], whole: bool) -> None:
    """Bit for bit where weights fill the processor's registers; else the kernel rounds its tail in another order."""
    shapes = {"a": (8, 16), "b": (64,), "c": (4, 16, 1, 1)} if whole else SHAPES
    parameters = weights(shapes=shapes)
    group, optimizer, apart = ours_and_torchs(parameters, settings)
    theirs = dict(zip(shapes, apart.param_groups[0]["params"], strict=True))
    trained(group, parameters, optimizer)
    for step in range(6):
        apart.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
        apart.zero_grad()
        loss(theirs, step).backward()
        apart.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), theirs[name].detach(), rtol=0 if whole else 1e-6, atol=0)


@pytest.mark.parametrize("name", cards("optimizer"))
def test_every_optimizer_steps_the_weights_in_their_places(name: str) -> None:
    parameters = weights()
    group = FlatGroup("denoiser", parameters)
    card = cast(OptimizerCard, cards("optimizer")[name])
    optimizer = build(card, cast(OptimizerSettings, card.settings()), [group], [0.01])
    places = {key: (p.data_ptr(), p.grad.data_ptr()) for key, p in parameters.items() if p.grad is not None}
    held = group.gradient
    for step in range(3):
        group.zero_gradient()
        before = group.values.detach().clone()
        loss(parameters, step).backward()
        assert torch.equal(
            group.gradient, torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
        )
        optimizer.step()
        assert not torch.equal(before, group.values)
        assert torch.equal(group.values, torch.cat([p.flatten() for p in parameters.values()]))
    assert group.gradient is held
    assert places == {key: (p.data_ptr(), p.grad.data_ptr()) for key, p in parameters.items() if p.grad is not None}
    assert len(places) == len(SHAPES)


def test_packing_keeps_values_and_shapes() -> None:
    parameters, same = weights(), weights()
    group = FlatGroup("denoiser", parameters)
    assert group.values.numel() == 3 * 4 + 5 + 6 + 1
    assert all(torch.equal(parameters[name], same[name]) and parameters[name].shape == SHAPES[name] for name in SHAPES)
    with torch.no_grad():
        group.values.zero_()
    assert all(not p.any() for p in parameters.values())


@pytest.mark.parametrize(
    ("sight", "shapes"),
    [("flat", [(24,)]), ("tensors", [(3, 4), (5,), (2, 3), ()]), ("matrices", [(3, 4), (1, 5), (2, 3), (1, 1)])],
)
def test_as_an_optimizer_sees_them(sight: Sight, shapes: list[tuple[int, ...]]) -> None:
    """Always the same memory: what is changed in a view is changed in the weights."""
    parameters = weights()
    group = FlatGroup("denoiser", parameters)
    seen = group.as_seen(sight)
    assert [tuple(view.shape) for view in seen] == shapes
    loss(parameters, 1).backward()
    gradients = [view.grad for view in seen if view.grad is not None]
    assert torch.equal(torch.cat([gradient.flatten() for gradient in gradients]), group.gradient)
    with torch.no_grad():
        for view in seen:
            view.mul_(2.0)
    before = torch.cat([parameter.detach().flatten() for parameter in weights().values()])
    assert torch.equal(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]), 2 * before)


def test_channels_last_and_sixteen_bit_weights_are_packed() -> None:
    odd = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).bfloat16())
    before = odd.detach().float()
    group = FlatGroup("denoiser", {"x": odd})
    assert odd.dtype == torch.float32 and torch.equal(odd, before) and odd.is_contiguous()
    assert group.values.numel() == 48


def test_what_lies_column_by_column_stays_so() -> None:
    """A LoRA's B does; its gradient is made that way."""
    up = nn.Parameter(torch.randn(2, 6).t())
    before = up.detach().clone()
    group = FlatGroup("denoiser", {"x": up})
    assert torch.equal(up, before) and up.grad is not None and up.stride() == up.grad.stride() == (1, 6)
    assert torch.equal(group.values.detach().view(2, 6).t(), before)
    up.grad.copy_(before)
    assert torch.equal(group.gradient.view(2, 6).t(), before)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6, 0.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    ours, theirs = [weights(1), weights(2)], [weights(1), weights(2)]
    groups = [FlatGroup(name, parameters) for name, parameters in zip(("denoiser", "text_encoder"), ours, strict=True)]
    for pair in (ours, theirs):
        for parameters in pair:
            loss(parameters, 3).backward()
    flat = [p for parameters in theirs for p in parameters.values()]
    before = [p.grad.clone() for p in flat if p.grad is not None]
    norm = clip_gradients(groups, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(flat, max_norm or float("inf"))
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    clipped = [p.grad for parameters in ours for p in parameters.values()]
    for a, p, untouched in zip(clipped, flat, before, strict=True):
        assert a is not None and p.grad is not None
        torch.testing.assert_close(a, p.grad, rtol=1e-6, atol=1e-9)
        if max_norm in (0.0, 1e6):
            assert torch.equal(a, untouched)
