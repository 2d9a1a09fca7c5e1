"""LoRA: W + s·B·A with s = alpha / rank, on linear layers, and on convolutions where a conv rank is given (then often called LoCon).

Source: Hu et al. 2021, arXiv 2106.09685; convolutions and names of the file's tensors as in kohya-format files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lorabake.adapters._ranks import DecomposedSettings
from lorabake.adapters._weight import WeightType, of_inputs
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import ComputedWeight, Layer

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Generator, Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, F, nn = lazy_module("torch"), lazy_module("torch.nn.functional"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


class LoraSettings(DecomposedSettings):
    """Settings of ``lora``."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of dropping each value of the thin product. Up to 0.3; slows learning, resists over-training."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of dropping each rank, per sample. 0.1 to 0.3 where used."""

    def metadata(self) -> dict[str, Any]:
        """Dim, alpha and the arguments other trainers know."""
        told = super().metadata()
        arguments = {"rank_dropout": self.rank_dropout} if self.rank_dropout else {}
        return {**told, "network_dropout": self.dropout or None, "network_args": {**told["network_args"], **arguments}}


class Lora(WeightType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of LoRA."""

    def create(
        self, layer: Layer, settings: LoraSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``lora_down`` and ``lora_mid`` uniform in ±1/sqrt(fan in) (Kaiming with a = sqrt 5), ``lora_up`` zero."""
        rank, weight = settings.rank_for(layer), layer.module.weight
        assert rank is not None and isinstance(weight, torch.Tensor)
        kernel = weight.shape[2:]
        ones = [1 for _ in kernel]
        tucker = settings.is_tucker(layer)
        born = {"lora_down.weight": torch.empty(rank, weight.shape[1], *(ones if tucker else kernel))}
        if tucker:
            born["lora_mid.weight"] = torch.empty(rank, rank, *kernel)
        for tensor in born.values():
            bound = 1 / math.sqrt(tensor[0].numel())
            tensor.uniform_(-bound, bound, generator=generator)
        born["lora_up.weight"] = torch.zeros(rank, weight.shape[0], *ones).transpose(
            0, 1
        )  # in memory as products make its gradient
        return {**born, **settings.magnitudes(weight)}, {"alpha": torch.tensor(settings.alpha_for(layer))}

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: LoraSettings,
        training: bool,
    ) -> Tensor:
        """The base's output plus the scaled low-rank change."""
        drops = training and (settings.dropout or settings.rank_dropout or settings.module_dropout)
        if not drops and _is_plain(weights):
            down, up = weights["lora_down.weight"], weights["lora_up.weight"]
            scale = multiplier * float(weights["alpha"]) / up.shape[1]
            if _merges(base, x, up.shape[1]):
                weight = kernels.merged(base.weight, down, up, scale)  # pyright: ignore[reportArgumentType]
                return kernels.with_weight(base, x, weight)  # pyright: ignore[reportArgumentType]
            if isinstance(base, nn.Linear):
                return kernels.low_rank_layer(base, x, down, up, scale)
            if kernels.is_pointwise(base, x):
                return kernels.low_rank_cells(x, base, down, up, scale)  # pyright: ignore[reportArgumentType]
        if drops and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        origin: Any = getattr(base, "origin", base)  # below other adapters, if there are any
        change = self._thin(origin, x, weights, settings if drops else None)
        if change is None or of_inputs(weights, origin):
            return super().forward(base, x, weights, multiplier, settings, training=False)
        return self.beside(base, origin, x, change, weights, multiplier)

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """s·B·A; with a core M between them, what the three convolutions make together."""
        down, up = (
            tensor.flatten(-3) if weight.dim() > 3 else tensor  # 1 x 1 or not, convolutions have two axes more
            for tensor in (tensors["lora_down.weight"], tensors["lora_up.weight"])
        )
        up = up * (float(tensors["alpha"]) / up.shape[-1])
        if (mid := tensors.get("lora_mid.weight")) is not None:
            return torch.einsum("...mnhw,...om,...ni->...oihw", mid, up, down)
        return (up @ down).view(weight.shape)

    def thin(self, base: nn.Module, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """One thin layer after the other."""
        return self._thin(base, x, tensors, None)

    def _thin(
        self, base: Any, x: Tensor, tensors: Mapping[str, Tensor], dropping: LoraSettings | None
    ) -> Tensor | None:
        down, up = tensors["lora_down.weight"].to(x.dtype), tensors["lora_up.weight"]
        up = (up * (float(tensors["alpha"]) / up.shape[1])).to(x.dtype)
        if isinstance(base, nn.Linear):
            if dropping:
                return F.linear(_drop(F.linear(x, down), dropping, channels_last=True), up)
            return kernels.low_rank_product(x, down, up)
        if base.groups != 1:
            return None
        if (mid := tensors.get("lora_mid.weight")) is not None:
            x, down = F.conv2d(x, down), mid.to(x.dtype)
        thin = F.conv2d(x, down, None, base.stride, base.padding, base.dilation)
        return F.conv2d(_drop(thin, dropping, channels_last=False) if dropping else thin, up)

    def norms(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """‖W + s·B·A‖ of each row from thin products: ‖w‖² + 2s ⟨b, A w⟩ + s² ⟨b, A Aᵀ b⟩."""
        if "lora_mid.weight" in tensors:
            return super().norms(weight, tensors)
        rows_OI, down_RI = kernels.rows_of(weight), kernels.rows_of(tensors["lora_down.weight"])
        up_OR = tensors["lora_up.weight"].flatten(1)
        up_OR = up_OR * (float(tensors["alpha"]) / up_OR.shape[1])
        crossed = (rows_OI @ (2 * down_RI.t())).addmm_(up_OR, down_RI @ down_RI.t())
        squared = torch.linalg.vector_norm(rows_OI, dim=1).square_() + (crossed * up_OR).sum(1)
        return squared.clamp_(min=torch.finfo(squared.dtype).tiny).sqrt_().view_as(tensors["dora_scale"])

    def changed_weights(
        self,
        weights_L: Tensor,
        tensors: Sequence[Mapping[str, Tensor]],
        multiplier: float,
        settings: LoraSettings,
        training: bool,
    ) -> Tensor | None:
        """W + s·B·A of all layers in one product; None where something is dropped on the way."""
        if training and (settings.dropout or settings.rank_dropout):
            return None
        if not _is_plain(tensors[0]) or settings.module_dropout:
            return super().changed_weights(weights_L, tensors, multiplier, settings, training)
        downs_LRI = torch.stack([kernels.rows_of(of["lora_down.weight"]) for of in tensors])
        ups_LRO = torch.stack([of["lora_up.weight"].flatten(1).t() for of in tensors])  # as they lie in memory
        scale = multiplier * float(tensors[0]["alpha"]) / ups_LRO.shape[1]
        changed_LOI = torch.baddbmm(kernels.rows_of(weights_L), ups_LRO.transpose(1, 2), downs_LRI, alpha=scale)
        return kernels.weights_of(changed_LOI, weights_L[0])

    def rescaled(self, weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The factor goes into B, which is zero at birth."""
        return {**weights, "lora_up.weight": weights["lora_up.weight"] * factor}

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖s·B·A‖ from rank × rank products: ‖B·A‖² = ⟨BᵀB, A·Aᵀ⟩."""
        if not _is_plain(weights):
            return torch.linalg.vector_norm(self.change(base.weight, weights))  # pyright: ignore[reportArgumentType]
        down_RI, up_OR = weights["lora_down.weight"].flatten(1), weights["lora_up.weight"].flatten(1)
        squared = ((up_OR.t() @ up_OR) * (down_RI @ down_RI.t())).sum().clamp(min=0)
        return squared.sqrt() * (float(weights["alpha"]) / up_OR.shape[1])

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """Both halves by the square root."""
        root = factor.sqrt()
        weights["lora_down.weight"].mul_(root)
        weights["lora_up.weight"].mul_(root)

    def settings_of(self, weights: Mapping[str, Tensor]) -> LoraSettings:
        """Rank, form and alpha as the tensors have them."""
        return LoraSettings.of_file(weights["lora_up.weight"].shape[1], weights, tucker="lora_mid.weight" in weights)


def _is_plain(weights: Mapping[str, Tensor]) -> bool:
    """Whether the change is B·A and nothing else."""
    return "dora_scale" not in weights and "lora_mid.weight" not in weights


def _merges(base: nn.Module, x: Tensor, rank: int) -> bool:
    """Whether the change is better added to the weight. Never in half precision, where small changes would be rounded away."""
    if isinstance(base, ComputedWeight):
        return False
    if not isinstance(base, nn.Linear | nn.Conv2d) or base.weight.dtype != torch.float32 or x.dtype != torch.float32:
        return False
    inputs, outputs = base.weight[0].numel(), base.weight.shape[0]
    if isinstance(base, nn.Linear):
        return kernels.merging_pays(x.numel() // inputs, inputs, outputs, rank, torch.is_grad_enabled())
    cells = x.shape[0] * x.shape[2] * x.shape[3] // (base.stride[0] * base.stride[1])
    plain = base.groups == 1 and base.padding_mode == "zeros"
    return plain and kernels.merging_pays(cells, inputs, outputs, rank, torch.is_grad_enabled())


def _drop(thin: Tensor, settings: LoraSettings, channels_last: bool) -> Tensor:
    if settings.dropout:
        thin = F.dropout(thin, settings.dropout)
    if settings.rank_dropout:
        ranks = thin.shape[-1] if channels_last else thin.shape[1]
        shape = (thin.shape[0], *(1 for _ in thin.shape[2:]), ranks) if channels_last else (thin.shape[0], ranks, 1, 1)
        keep = torch.rand(shape, device=thin.device) >= settings.rank_dropout
        thin = thin * keep / (1 - settings.rank_dropout)
    return thin


CARD = AdapterCard(
    kind="adapter",
    name="lora",
    summary="Low-rank change of linear layers, and of convolutions if asked; every client loads it.",
    code="lorabake.adapters.lora:Lora",
    settings=LoraSettings,
    also_called=("locon",),
)
