"""Weights in few bits: what is stored, how far it is from what it stands for, and products of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabake.families.networks.quantised import QuantisedLinear, stored
from lorabake.families.networks.residence import STORED
from lorabake.protocols.family import ComputedWeight

KINDS: tuple[Any, ...] = ("int8", "fp8", "nf4")


def weights(rows: int = 24, columns: int = 40) -> Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return drawn * torch.linspace(0.1, 3, rows)[:, None]


def quantised(layer: nn.Linear, kind: Any) -> QuantisedLinear:
    layer.requires_grad_(False)
    layer.__dict__[STORED] = stored(layer.weight, kind)
    layer._parameters["weight"] = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    layer.__class__ = QuantisedLinear
    assert isinstance(layer, QuantisedLinear)
    return layer


def test_int8_by_hand() -> None:
    found = stored(torch.tensor([[1.27, -0.634, 0.0], [-254.0, 1.9, 3.0]]), "int8")
    assert found.values.tolist() == [[127, -63, 0], [-127, 1, 2]]  # 1.5 rounds to the even 2
    torch.testing.assert_close(found.weight(), torch.tensor([[1.27, -0.63, 0.0], [-254.0, 2.0, 4.0]]))
    assert found.nbytes == 6 + 2 * 4


def test_fp8_by_hand() -> None:
    """Three bits behind the point: between 256 and 448 every 32nd number, and so on downwards."""
    found = stored(torch.tensor([[448.0, 280.0, 17.0, -1.0625]]), "fp8")
    assert found.weight().tolist() == [[448.0, 288.0, 16.0, -1.0]]
    twice = stored(torch.tensor([[896.0, -2.0]]), "fp8")
    assert twice.weight().tolist() == [[896.0, -2.0]] and twice.nbytes == 2 + 4


def test_nf4_by_hand() -> None:
    row = torch.zeros(1, 66)
    row[0, :4] = torch.tensor([2.0, -2.0, 1.44, 0.1])
    row[0, 64] = -0.5  # the second block
    found = stored(row, "nf4")
    assert found.scale.tolist() == [[2.0], [0.5]]
    assert found.values[:2].tolist() == [15 * 16 + 0, 14 * 16 + 8]  # two in a byte; 0.05 is nearer to 0.0796 than to 0
    weight = found.weight()
    assert weight.shape == (1, 66)
    torch.testing.assert_close(weight[0, :4], torch.tensor([2.0, -2.0, 2 * 0.7229568, 2 * 0.0795803]))
    assert weight[0, 64] == -0.5 and weight[0, 4:64].abs().max() == 0


def test_nf4_is_that_of_the_package_it_is_known_from() -> None:
    theirs: Any = pytest.importorskip("bitsandbytes").functional
    weight = weights(64, 64)
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = stored(weight, "nf4")
    assert torch.equal(ours.values, packed.flatten())
    torch.testing.assert_close(ours.weight(), theirs.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_how_far_it_may_be_off(kind: Any, dtype: torch.dtype) -> None:
    weight = weights().to(dtype)
    found = stored(weight, kind)
    assert found.weight().dtype == dtype and found.weight().shape == weight.shape
    error, exact = (found.weight().float() - weight.float()).abs(), weight.float().abs()
    row_most = exact.amax(1, keepdim=True)
    rounding = exact * torch.finfo(dtype).eps
    if kind == "int8":
        assert (error <= row_most / 254 + rounding + 1e-6).all()
    elif kind == "fp8":
        assert (error <= exact / 16 + row_most / 448 / 512 + rounding + 1e-6).all()
    else:
        block_most = exact.flatten().view(-1, 64).amax(1, keepdim=True)
        assert (error.flatten().view(-1, 64) <= 0.152 * block_most + rounding.flatten().view(-1, 64)).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: Any) -> None:
    assert not stored(torch.zeros(3, 70), kind).weight().any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_as_little_as_is_promised(kind: Any) -> None:
    weight = torch.randn(256, 512)
    assert stored(weight, kind).nbytes / weight.numel() <= {"int8": 1.01, "fp8": 1.01, "nf4": 0.5625}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_weight_it_stands_for(kind: Any) -> None:
    layer = quantised(nn.Linear(40, 24), kind)
    plain = nn.Linear(40, 24).requires_grad_(False)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert isinstance(layer, nn.Linear) and isinstance(layer, ComputedWeight)
    x = torch.randn(2, 3, 40)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    y, expected = layer(ours), plain(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_not_kept_for_the_backward_pass(kind: Any) -> None:
    layer, kept = quantised(nn.Linear(64, 64), kind), list[int]()
    x = torch.randn(1, 64, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(kept) < 64
