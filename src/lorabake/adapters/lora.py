"""LoRA: W + s·B·A with s = alpha / rank, on linear layers, and on convolutions where a conv rank is given (then often called LoCon).

Source: Hu et al. 2021, arXiv 2106.09685; convolutions and names of the file's tensors as in kohya-format files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator, model_validator

from lorabake.base import patterns
from lorabake.base.cards import IfChanged, Settings
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard, ByLayer, ForLayers
from lorabake.protocols.family import ComputedWeight, Layer

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Generator, Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, F, nn = lazy_module("torch"), lazy_module("torch.nn.functional"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


_SHAPES = IfChanged(refused="the weights so far have other shapes")
_STRENGTH = IfChanged(meaning="what was learned so far gets another strength")
_CONVOLUTIONS = ForLayers("resnet", "residual blocks with convolutions")


class LoraSettings(Settings):
    """Settings of ``lora``."""

    rank: Annotated[int, _SHAPES] = Field(default=16, ge=1, le=1024)
    """Rank of the change to each linear layer (also called dim). More rank holds more detail and makes a larger file; 8 to 32 serves most."""
    alpha: Annotated[float | None, _STRENGTH] = Field(default=None, gt=0)
    """Scale of the change: it is multiplied by alpha / rank. Default: the rank itself, so that rank can be changed without touching the learning rate."""
    conv_rank: Annotated[int | None, _SHAPES, _CONVOLUTIONS] = Field(default=None, ge=1, le=1024)
    """Rank on convolutions and residual blocks; absent leaves them alone. Helps styles and textures, about doubles the file."""
    conv_alpha: Annotated[float | None, _STRENGTH, _CONVOLUTIONS] = Field(default=None, gt=0)
    """Alpha on convolutions. Default: the conv rank."""
    block_rank: Annotated[dict[str, int] | None, ByLayer()] = None
    """Table of ranks for some layers: pattern = rank, 0 leaves them alone. A pattern is a piece of a layer's name (mid_block, down_blocks.0) or a
    regular expression; the first that is found decides. Alpha goes along, so that the scale of the change stays."""
    block_alpha: Annotated[dict[str, float] | None, _STRENGTH, ByLayer()] = None
    """Table of alphas for some layers: pattern = alpha, with patterns as in block_rank. Their change is scaled by that alpha / their rank, also where
    block_rank gives them another. Other layers: alpha and conv_alpha, along with the rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732), for high ranks; then give alpha, such as 4. The file's
    alpha is written so that every client makes the same of it."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of dropping each value of the thin product. Up to 0.3; slows learning, resists over-training."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of dropping each rank, per sample. 0.1 to 0.3 where used."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of leaving out a layer's change altogether for one step. 0.1 to 0.3 where used."""

    @field_validator("block_rank")
    @classmethod
    def _is_a_table_of_ranks(cls, table: dict[str, int] | None) -> dict[str, int] | None:
        for pattern, rank in (table or {}).items():
            if not 0 <= rank <= 1024:
                raise ValueError(f"the rank of '{pattern}' is {rank}: it must be from 0 (leave it alone) to 1024")
        patterns.checked(table)
        return table

    @field_validator("block_alpha")
    @classmethod
    def _is_a_table_of_alphas(cls, table: dict[str, float] | None) -> dict[str, float] | None:
        for pattern, alpha in (table or {}).items():
            if not 0 < alpha < math.inf:
                raise ValueError(f"the alpha of '{pattern}' is {alpha:g}: it must be above 0. For none: block_rank 0")
        patterns.checked(table)
        return table

    @model_validator(mode="after")
    def _conv_alpha_does_something(self) -> LoraSettings:
        if self.conv_alpha is not None and self.conv_rank is None:
            raise ValueError("conv_alpha does nothing without conv_rank. Give both, or neither.")
        return self

    def metadata(self) -> dict[str, Any]:
        """Dim, alpha and the arguments other trainers know."""
        arguments = {
            "conv_dim": self.conv_rank,
            "conv_alpha": self.conv_alpha,
            "rank_dropout": self.rank_dropout,
            "module_dropout": self.module_dropout,
            "block_rank": self.block_rank,
            "block_alpha": self.block_alpha,
            "rs_lora": self.rank_stabilized,
        }
        return {
            "network_dim": self.rank,
            "network_alpha": self.alpha or self.rank,
            "network_dropout": self.dropout or None,
            "network_args": {name: value for name, value in arguments.items() if value},
        }

    def rank_for(self, layer: Layer) -> int | None:
        """Rank this layer gets; None leaves it alone. Time-embedding linears of residual blocks follow the linear rank, as other tools do."""
        chosen = patterns.decide(self.block_rank, layer.names)
        if chosen is not None:
            return chosen or None
        if layer.group == "resnet" and self.conv_rank is None:
            return None
        return self.conv_rank if _is_spatial(layer.module) else self.rank

    def alpha_for(self, layer: Layer) -> float:
        """Alpha this layer gets, as files have it: the change is scaled by it, divided by the layer's rank."""
        apart = self.conv_rank is not None and _is_spatial(layer.module)
        usual = self.conv_rank if apart and self.conv_rank else self.rank
        alpha = float((self.conv_alpha if apart else self.alpha) or usual)
        rank = self.rank_for(layer) or usual
        chosen = patterns.decide(self.block_alpha, layer.names)
        if chosen is not None:
            alpha = float(chosen)
        elif rank != usual:
            alpha *= rank / usual
        return alpha * math.sqrt(rank) if self.rank_stabilized else alpha


def _is_spatial(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


class Lora:
    """The :class:`~lorabake.protocols.adapter.LayerType` of LoRA."""

    def fits(self, layer: Layer, settings: LoraSettings) -> bool:
        """Transformer and text layers always; residual blocks where a conv rank is given."""
        return (
            isinstance(layer.module, nn.Linear | nn.Conv2d)
            and layer.group != "other"
            and settings.rank_for(layer) is not None
        )

    def create(
        self, layer: Layer, settings: LoraSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``lora_down`` uniform in ±1/sqrt(fan in) (Kaiming with a = sqrt 5), ``lora_up`` zero."""
        rank, weight = settings.rank_for(layer), layer.module.weight
        assert rank is not None and isinstance(weight, torch.Tensor)
        groups = getattr(layer.module, "groups", 1)
        kernel = weight.shape[2:]
        down = torch.empty(rank * groups, weight.shape[1], *kernel)
        bound = 1 / math.sqrt(down[0].numel())
        down.uniform_(-bound, bound, generator=generator)
        up = torch.zeros(rank, weight.shape[0], *(1 for _ in kernel)).transpose(
            0, 1
        )  # in memory as products make its gradient
        alpha = torch.tensor(settings.alpha_for(layer))
        return {"lora_down.weight": down, "lora_up.weight": up}, {"alpha": alpha}

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
        down, up = weights["lora_down.weight"], weights["lora_up.weight"]
        scale = multiplier * float(weights["alpha"]) / up.shape[1]
        if training and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        drops = training and (settings.dropout or settings.rank_dropout)
        if not drops and _merges(base, x, up.shape[1]):
            weight = kernels.merged(base.weight, down, up, scale)  # pyright: ignore[reportArgumentType]
            return kernels.with_weight(base, x, weight)  # pyright: ignore[reportArgumentType]
        if isinstance(base, nn.Linear) and not drops:
            return kernels.low_rank_layer(base, x, down, up, scale)
        if not drops and kernels.is_pointwise(base, x):
            return kernels.low_rank_cells(x, base, down, up, scale)  # pyright: ignore[reportArgumentType]
        origin: Any = getattr(base, "origin", base)  # below other adapters, if there are any
        down, up = down.to(x.dtype), up.to(x.dtype)
        linear = isinstance(origin, nn.Linear)
        thin = (
            F.linear(x, down)
            if linear
            else F.conv2d(x, down, None, origin.stride, origin.padding, origin.dilation, origin.groups)
        )
        if drops:
            thin = _drop(thin, settings, channels_last=linear)
        change = F.linear(thin, up) if linear else F.conv2d(thin, up, groups=origin.groups)
        return torch.add(base(x), change, alpha=scale)

    def changed_weights(
        self,
        weights_LOI: Tensor,
        tensors: Sequence[Mapping[str, Tensor]],
        multiplier: float,
        settings: LoraSettings,
        training: bool,
    ) -> Tensor | None:
        """W + s·B·A of all layers in one product; None where something is dropped on the way."""
        if training and (settings.dropout or settings.rank_dropout or settings.module_dropout):
            return None
        downs_LRI = torch.stack([kernels.rows_of(of["lora_down.weight"]) for of in tensors])
        ups_LRO = torch.stack([of["lora_up.weight"].flatten(1).t() for of in tensors])  # as they lie in memory
        scale = multiplier * float(tensors[0]["alpha"]) / ups_LRO.shape[1]
        return torch.baddbmm(weights_LOI, ups_LRO.transpose(1, 2), downs_LRI, alpha=scale)

    def delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """s·B·A in the shape of the base's weight."""
        down, up = weights["lora_down.weight"], weights["lora_up.weight"]
        groups = getattr(base, "groups", 1)
        ups, downs = up.flatten(1).chunk(groups), down.flatten(1).chunk(groups)
        product = torch.cat([u @ d for u, d in zip(ups, downs, strict=True)])
        return product.view(up.shape[0], *down.shape[1:]) * (float(weights["alpha"]) / up.shape[1])

    def rescaled(self, weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The factor goes into B, which is zero at birth."""
        return {**weights, "lora_up.weight": weights["lora_up.weight"] * factor}

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖s·B·A‖ from rank × rank products: ‖B·A‖² = ⟨BᵀB, A·Aᵀ⟩."""
        if getattr(base, "groups", 1) != 1:
            return torch.linalg.vector_norm(self.delta(base, weights))
        down_RI, up_OR = weights["lora_down.weight"].flatten(1), weights["lora_up.weight"].flatten(1)
        squared = ((up_OR.t() @ up_OR) * (down_RI @ down_RI.t())).sum().clamp(min=0)
        return squared.sqrt() * (float(weights["alpha"]) / up_OR.shape[1])

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """Both halves by the square root."""
        root = factor.sqrt()
        weights["lora_down.weight"].mul_(root)
        weights["lora_up.weight"].mul_(root)

    def settings_of(self, weights: Mapping[str, Tensor]) -> LoraSettings:
        """Rank and alpha as the tensors have them; a file without alpha means alpha = rank."""
        rank = weights["lora_up.weight"].shape[1]
        alpha = float(weights["alpha"]) if "alpha" in weights else float(rank)
        # Files may hold more than we would train: a rank above the limit, an alpha of 0.
        return LoraSettings.model_construct(rank=rank, alpha=alpha, conv_rank=rank, conv_alpha=alpha)


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
