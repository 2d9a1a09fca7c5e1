"""Diff: W + ΔW with ΔW as large as W, and b + Δb: every number of the chosen layers is trained, and saved in a LoRA file.

Names of the file's tensors as in LyCORIS, whose algorithm "full" this is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from lorabake.adapters._ranks import CONVOLUTIONS, SHAPES
from lorabake.adapters._weight import WeightType
from lorabake.adapters._whole import WholeSettings
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import ComputedWeight, Layer

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


class DiffSettings(WholeSettings):
    """Settings of ``diff``."""

    convolutions: Annotated[bool, SHAPES, CONVOLUTIONS] = False
    """Train convolutions and residual blocks, too. Default: linear layers of transformer blocks and text encoders alone; with them, the file is
    nearly as large as the model."""

    def reaches(self, layer: Layer) -> bool:
        """Whether ``layer`` is a linear layer or convolution that is to be trained."""
        if not isinstance(layer.module, nn.Linear | nn.Conv2d) or layer.group == "other":
            return False
        return self.chosen(layer, usual=layer.group != "resnet" or self.convolutions)

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it."""
        return {"network_args": {"algo": "full", **self.changed()}}


class Diff(WeightType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of whole changes."""

    def create(
        self, layer: Layer, settings: DiffSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Zeros; nothing is drawn."""
        frozen, bias = layer.module.weight, layer.module.bias
        assert isinstance(frozen, torch.Tensor)
        born = {"diff": torch.zeros(frozen.shape)}
        if settings.bias and isinstance(bias, torch.Tensor):
            born["diff_b"] = torch.zeros(bias.shape)
        return born, {}

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: DiffSettings,
        training: bool,
    ) -> Tensor:
        """The base's output with weight and bias changed."""
        if training and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        out = super().forward(base, x, weights, multiplier, settings, training=False)
        if (bias := weights.get("diff_b")) is None:
            return out
        origin = getattr(base, "origin", base)
        return out + (bias.view(-1, 1, 1) if isinstance(origin, nn.Conv2d) else bias).to(x.dtype) * multiplier

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """It is what is trained."""
        return tensors["diff"]

    def thin(self, base: nn.Module, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Beside the base where it is in fewer bits than the change, which would be rounded away in it."""
        if x.dtype == torch.float32 and not isinstance(base, ComputedWeight):
            return None
        return kernels.with_weight(base, x, tensors["diff"].to(x.dtype), bias=False)  # pyright: ignore[reportArgumentType]

    def changed_weights(
        self,
        weights_L: Tensor,
        tensors: Sequence[Mapping[str, Tensor]],
        multiplier: float,
        settings: DiffSettings,
        training: bool,
    ) -> Tensor | None:
        """None where biases change as well."""
        if any("diff_b" in of for of in tensors):
            return None
        return super().changed_weights(weights_L, tensors, multiplier, settings, training)

    def delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """It is what is trained."""
        return weights["diff"]

    def bias_delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Δb, if biases are trained."""
        return weights.get("diff_b")

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖ΔW‖, of the weight alone."""
        return torch.linalg.vector_norm(weights["diff"])

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """The weight's change, and the bias' with it, so that the layer's change keeps its direction."""
        for name in weights.keys() & {"diff", "diff_b"}:
            weights[name].mul_(factor)

    def settings_of(self, weights: Mapping[str, Tensor]) -> DiffSettings:
        """Whether biases are changed."""
        return DiffSettings(bias="diff_b" in weights)


CARD = AdapterCard(
    kind="adapter",
    name="diff",
    summary="Every number of the chosen layers, in a LoRA file of their size: what no low rank can hold, where size does not count.",
    code="lorabake.adapters.diff:Diff",
    settings=DiffSettings,
    network_module="lycoris.kohya",
    also_called=("full",),
    usual_lr=1e-5,
)
