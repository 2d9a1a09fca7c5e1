"""Frozen linear layers whose weights are stored in 8 or 4 bits, and computed anew whenever they are used.

int8  each row divided by its largest value, in steps of 1/127 of it: 1 byte a weight
fp8   each row scaled to the range of torch.float8_e4m3fn: 1 byte
nf4   blocks of 64 weights divided by their largest, and the nearest of 16 values that a normal distribution is cut into equal parts by
      (Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E): 4.5 bits

A product keeps its input's gradient computable without keeping the weight: it is computed once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.residence import STORED, residence_of
from lorabake.protocols.family import ComputedWeight, Layer, Model, Quantisation

_FP8_MOST = 448.0
"""The largest number of float8_e4m3fn."""
_BLOCK = 64
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight in few bits."""

    kind: Quantisation
    values: Tensor
    """As stored; for nf4 two in a byte, the first in the upper half."""
    scale: Tensor
    """float32: of each row (O1), or of each block (N1)."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the weight as it is computed with."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + self.scale.nbytes

    def weight(self) -> Tensor:
        """The weight, OI, in the type that is computed in."""
        if self.kind != "nf4":
            return (self.values.float() * self.scale).to(self.dtype)
        pairs = F.embedding(self.values.int(), _pairs(self.values.device))
        numbers = pairs.view(-1, _BLOCK) * self.scale
        count = self.shape[0] * self.shape[1]
        return numbers.flatten()[:count].view(self.shape).to(self.dtype)


def stored(weight_OI: Tensor, kind: Quantisation) -> Stored:
    """A weight in few bits. Rows or blocks that are all zero stay zero."""
    shape, weight = tuple(weight_OI.shape), weight_OI.float()
    if kind == "nf4":
        flat = F.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
        scale = flat.abs().amax(1, keepdim=True)
        table = torch.tensor(_NF4, device=weight.device)
        codes = torch.bucketize(flat / scale.clamp(min=1e-38), (table[1:] + table[:-1]) / 2).to(torch.uint8).flatten()
        return Stored(kind, codes[0::2] * 16 + codes[1::2], scale, shape, weight_OI.dtype)
    largest = weight.abs().amax(1, keepdim=True)
    scale = (largest / (127.0 if kind == "int8" else _FP8_MOST)).clamp(min=1e-38)
    scaled = weight / scale
    values = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return Stored(kind, values, scale, shape, weight_OI.dtype)


def stored_size(weight_OI: Tensor, kind: Quantisation) -> int:
    """Bytes of a weight in few bits, scales included. Its shape is enough: it may be on the meta device."""
    if kind == "nf4":
        return -(-weight_OI.numel() // _BLOCK) * (_BLOCK // 2 + 4)
    return weight_OI.numel() + 4 * len(weight_OI)


class QuantisedLinear(ComputedWeight, nn.Linear):
    """A linear layer whose weight is stored in few bits. ``weight`` computes it, frozen."""

    @property
    def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """OI, in the type of the model; without storage while the network rests."""
        found: Stored | None = self.__dict__.get(STORED)
        return self._parameters["weight"] if found is None else found.weight()

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ + b, keeping nothing of W."""
        product: Tensor = _Product.apply(input, self)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x.new_empty(0))
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = (
            ctx.saved_tensors
        )  # where blocks are recomputed they are called again by this, and what waits elsewhere comes back
        return gradient @ ctx.layer.weight, None


def quantise(model: Model, kind: Quantisation) -> None:
    """Have the frozen base's large layers stored in few bits from when they are read on.

    These are the linear layers in the denoiser's blocks, and all of text encoders that nobody trains (T5). Layers outside the blocks are
    few, and worth their bits.

    Args:
        model: as it was loaded late: what has been read stays as it is.
        kind: how.
    """
    chosen: dict[str, set[nn.Module]] = {}
    for layer in quantised_layers(model):
        chosen.setdefault(layer.part, set()).add(layer.module)
    for part, modules in chosen.items():

        def put(name: str, module: nn.Module, tensor: Tensor, modules: set[nn.Module] = modules) -> bool:
            if module not in modules or not name.endswith("weight"):
                return False
            module.__dict__[STORED] = stored(tensor, kind)
            module.__class__ = QuantisedLinear
            return True

        residence = residence_of(model.parts[part])  # pyright: ignore[reportArgumentType]
        if residence is not None:
            residence.store(put)


def quantised_layers(model: Model) -> Iterator[Layer]:
    """The layers that :func:`quantise` is for."""
    touched = {layer.part for layer in model.layers() if layer.group != "other"}
    for layer in model.layers():
        inside = layer.group == "transformer" if layer.part == "denoiser" else layer.part not in touched
        if inside and isinstance(layer.module, nn.Linear):
            yield layer


def saved(model: Model) -> tuple[int, int, int]:
    """How many layers of a model are stored in few bits, their bytes, and the bytes that they would have."""
    found = [
        module.__dict__[STORED]
        for part in model.parts.values()
        for module in part.modules()
        if STORED in module.__dict__
    ]
    dense = sum(one.shape[0] * one.shape[1] * one.dtype.itemsize for one in found)
    return len(found), sum(one.nbytes for one in found), dense


def _pairs(device: torch.device) -> Tensor:
    """The two numbers of each byte, 256 × 2."""
    if device not in _TABLES:
        table, codes = torch.tensor(_NF4), torch.arange(256)
        _TABLES[device] = torch.stack([table[codes // 16], table[codes % 16]], dim=1).to(device)
    return _TABLES[device]


_TABLES: dict[torch.device, Tensor] = {}
