"""Small layers, changed all at once before a pass instead of one by one in it.

A layer of ten thousand weights takes longer to call than to compute: a pass over a small model spends more time between thin
products than in them. Their changed weights W + ΔW are made for all layers of one shape in one call; in the pass such a layer is a
plain linear layer or convolution again. No full-size model has layers so small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorabake.adapters._kernels import rows_of, weights_of
from lorabake.protocols.adapter import LayerType, StackingLayerType
from lorabake.protocols.family import ComputedWeight

_SMALL = 50_000
"""Weights."""


class _Grafted(Protocol):
    base: nn.Module
    changed_weight: Tensor | None
    """What the layer computes with, while it is made ahead."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def settings(self) -> Any: ...


class Stack(NamedTuple):
    """Small layers of one shape, rank and settings."""

    layers: Sequence[_Grafted]
    weights_L: Tensor
    """Their frozen weights. Those of convolutions lie in memory channels last, as they are computed with."""


def stacks_of(layers: Iterable[_Grafted]) -> list[Stack]:
    """The small float32 layers among ``layers``, by what they have in common. (In half precision small changes would be rounded away.)"""
    found: dict[Any, list[_Grafted]] = {}
    for layer in layers:
        base = layer.base
        if isinstance(base, ComputedWeight):
            continue
        if isinstance(base, nn.Linear | nn.Conv2d) and _is_plain(base) and base.weight.numel() <= _SMALL:
            shapes = tuple((name, tensor.shape) for name, tensor in layer.tensors.items())
            constants = tuple(float(tensor) for tensor in layer.tensors.values() if tensor.ndim == 0)
            key = (type(base), base.weight.shape, shapes, constants, layer.settings.model_dump_json())
            found.setdefault(key, []).append(layer)
    return [Stack(alike, _weights_beside(alike)) for alike in found.values()]


def make(stacks: Iterable[Stack], layer_type: LayerType, multiplier: float, training: bool) -> bool:
    """Give every layer of ``stacks`` its changed weight, differentiable; False if the network type would rather not."""
    if not isinstance(layer_type, StackingLayerType):
        return False
    for layers, weights_L in stacks:
        own = [layer.tensors for layer in layers]
        changed = layer_type.changed_weights(weights_L, own, multiplier, layers[0].settings, training)
        if changed is None:
            return False
        for layer, weight in zip(layers, changed.unbind(), strict=True):
            layer.changed_weight = weight
    return True


def _weights_beside(layers: Sequence[_Grafted]) -> Tensor:
    """Their frozen weights where their changes are: weights may wait elsewhere just now."""
    device = next(tensor.device for tensor in layers[0].tensors.values() if tensor.ndim)
    return weights_of(torch.stack([rows_of(_weight(layer)).to(device) for layer in layers]), _weight(layers[0]))


def _is_plain(base: nn.Linear | nn.Conv2d) -> bool:
    frozen = base.weight.dtype == torch.float32 and not base.weight.requires_grad
    return frozen and (isinstance(base, nn.Linear) or (base.groups == 1 and base.padding_mode == "zeros"))


def _weight(layer: _Grafted) -> Tensor:
    weight = layer.base.weight
    assert isinstance(weight, Tensor)
    return weight
