"""LoRA-FA: a LoRA of which A stays as it was drawn and B alone is trained.

B's gradient needs A x and not x, so that no layer's input is kept for the backward pass, and the optimizer keeps what it keeps for half the
weights. Source: Zhang et al. 2023, arXiv 2308.03303. The file is a LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")

_DOWN, _UP = "lora_down.weight", "lora_up.weight"


class LoraFaSettings(LoraSettings):
    """Settings of ``lora-fa``."""


class LoraFa(Lora):
    """The :class:`~lorabake.protocols.adapter.LayerType` of LoRA-FA."""

    frozen = frozenset({_DOWN})

    def create(self, layer: Layer, settings: Any, generator: Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """LoRA's, with A drawn from a normal distribution of variance 2 / (inputs + rank), as the paper has it."""
        born, constants = super().create(layer, settings, generator)
        down = born[_DOWN]
        down.normal_(0, math.sqrt(2 / (down[0].numel() + len(down))), generator=generator)
        return born, constants

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor:
        """LoRA's; linear layers that learn never by a merged weight, whose gradient would need x."""
        drops = settings.dropout or settings.rank_dropout or settings.module_dropout
        plain = training and torch.is_grad_enabled() and not drops and weights.keys() == {_DOWN, _UP, "alpha"}
        if plain and isinstance(base, nn.Linear):
            up = weights[_UP]
            scale = multiplier * float(weights["alpha"]) / up.shape[1]
            return kernels.low_rank_layer(base, x, weights[_DOWN], up, scale)
        return super().forward(base, x, weights, multiplier, settings, training)

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """B alone."""
        weights[_UP].mul_(factor)

    def settings_of(self, weights: Mapping[str, Tensor]) -> LoraFaSettings:
        """LoRA's."""
        return LoraFaSettings.model_construct(**super().settings_of(weights).model_dump())


CARD = AdapterCard(
    kind="adapter",
    name="lora-fa",
    summary="LoRA of which one half stays as it was drawn: less memory for activations and optimizer, where a LoRA does not fit.",
    code="lorabake.adapters.lora_fa:LoraFa",
    settings=LoraFaSettings,
    network_module="networks.lora_fa",
    writes="lora",
)
