"""Norm: the weights and biases of layer norms and group norms, W + ΔW and b + Δb. A few numbers in each block, and a very small file.

Names of the file's tensors as in LyCORIS, where these are what ``train_norm`` adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorabake.adapters._whole import WholeSettings
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Generator, Tensor, nn
else:
    torch, F, nn = lazy_module("torch"), lazy_module("torch.nn.functional"), lazy_module("torch.nn")


class NormSettings(WholeSettings):
    """Settings of ``norm``."""

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it: of its algorithms, the one of whole changes, on norms."""
        return {"network_args": {"algo": "full", "train_norm": True, **self.changed()}}


class Norm:
    """The :class:`~lorabake.protocols.adapter.LayerType` of changed norms."""

    def fits(self, layer: Layer, settings: NormSettings) -> bool:
        """Norms that are trained at all, unless the table leaves them out."""
        return layer.group == "norm" and settings.chosen(layer, usual=True)

    def create(
        self, layer: Layer, settings: NormSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Zeros; nothing is drawn."""
        weight, bias = layer.module.weight, layer.module.bias
        assert isinstance(weight, torch.Tensor)
        born = {"w_norm": torch.zeros(weight.shape)}
        if settings.bias and isinstance(bias, torch.Tensor):
            born["b_norm"] = torch.zeros(bias.shape)
        return born, {}

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: NormSettings,
        training: bool,
    ) -> Tensor:
        """The norm with its weight and bias changed; beside the base where that is in fewer bits than the change, or below another adapter."""
        if training and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        origin: Any = getattr(base, "origin", base)
        weight, bias = weights["w_norm"] * multiplier, weights.get("b_norm")
        bias = None if bias is None else bias * multiplier
        if base is origin and origin.weight.dtype == torch.float32:
            changed = origin.bias if bias is None else origin.bias + bias
            return _normed(origin, x, origin.weight + weight, changed)
        return base(x) + _normed(origin, x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """It is what is trained."""
        return weights["w_norm"]

    def bias_delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Δb, if biases are trained."""
        return weights.get("b_norm")

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖ΔW‖, of the weight alone."""
        return torch.linalg.vector_norm(weights["w_norm"])

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """The weight's change, and the bias' with it, so that the layer's change keeps its direction."""
        for name in weights.keys() & {"w_norm", "b_norm"}:
            weights[name].mul_(factor)

    def settings_of(self, weights: Mapping[str, Tensor]) -> NormSettings:
        """Whether biases are changed."""
        return NormSettings(bias="b_norm" in weights)


def _normed(norm: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a norm gives with another weight and bias."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    if x.requires_grad or not torch.is_grad_enabled():
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    # PyTorch 2.13 on a CPU crashes in the backward pass of a channels-last input that wants no gradient.
    axes = (-1, *(1 for _ in x.shape[2:]))
    scaled = F.group_norm(x, norm.num_groups, eps=norm.eps) * weight.view(axes)
    return scaled if bias is None else scaled + bias.view(axes)


CARD = AdapterCard(
    kind="adapter",
    name="norm",
    summary="Weights and biases of the norms alone, for light, contrast and colour: a file of some kilobytes that hardly over-trains.",
    code="lorabake.adapters.norm:Norm",
    settings=NormSettings,
    network_module="lycoris.kohya",
    usual_lr=1e-3,
)
