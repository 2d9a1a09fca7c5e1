"""What all network types with a rank have in common: ranks, alphas and the layers they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field, PrivateAttr, field_validator, model_validator

from lorabake.base import patterns
from lorabake.base.cards import IfChanged, Settings
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import ByLayer, ForLayers
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")


SHAPES = IfChanged(refused="the weights so far have other shapes")
STRENGTH = IfChanged(meaning="what was learned so far gets another strength")
Decomposed = TypeVar("Decomposed", bound="DecomposedSettings")

CONVOLUTIONS = ForLayers("resnet", "residual blocks with convolutions")


class LayerSettings(Settings):
    """Settings of every network type that changes layers one by one."""

    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Chance of leaving out a layer's change altogether for one step. 0.1 to 0.3 where used."""


class RankSettings(LayerSettings):
    """Settings of every network type that has a rank."""

    rank: Annotated[int, SHAPES] = Field(default=16, ge=1, le=1024)
    """Rank of the change to each linear layer (also called dim). More rank holds more detail and makes a larger file; 8 to 32 serves most."""
    alpha: Annotated[float | None, STRENGTH] = Field(default=None, gt=0)
    """Scale of the change: it is multiplied by alpha / rank. Default: the rank itself, so that rank can be changed without touching the learning rate."""
    conv_rank: Annotated[int | None, SHAPES, CONVOLUTIONS] = Field(default=None, ge=1, le=1024)
    """Rank on convolutions and residual blocks; absent leaves them alone. Helps styles and textures, about doubles the file."""
    conv_alpha: Annotated[float | None, STRENGTH, CONVOLUTIONS] = Field(default=None, gt=0)
    """Alpha on convolutions. Default: the conv rank."""
    block_rank: Annotated[dict[str, int] | None, ByLayer()] = None
    """Table of ranks for some layers: pattern = rank, 0 leaves them alone. A pattern is a piece of a layer's name (mid_block, down_blocks.0) or a
    regular expression; the first that is found decides. Alpha goes along, so that the scale of the change stays."""
    block_alpha: Annotated[dict[str, float] | None, STRENGTH, ByLayer()] = None
    """Table of alphas for some layers: pattern = alpha, with patterns as in block_rank. Their change is scaled by that alpha / their rank, also where
    block_rank gives them another. Other layers: alpha and conv_alpha, along with the rank."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732), for high ranks; then give alpha, such as 4. The file's
    alpha is written so that every client makes the same of it."""

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
    def _conv_alpha_does_something(self) -> RankSettings:
        if self.conv_alpha is not None and self.conv_rank is None:
            raise ValueError("conv_alpha does nothing without conv_rank. Give both, or neither.")
        return self

    def metadata(self) -> dict[str, Any]:
        """Dim, alpha and the arguments other trainers know."""
        arguments = {
            "conv_dim": self.conv_rank,
            "conv_alpha": self.conv_alpha,
            "module_dropout": self.module_dropout,
            "block_rank": self.block_rank,
            "block_alpha": self.block_alpha,
            "rs_lora": self.rank_stabilized,
        }
        return {
            "network_dim": self.rank,
            "network_alpha": self.alpha or self.rank,
            "network_args": {name: value for name, value in arguments.items() if value},
        }

    def rank_for(self, layer: Layer) -> int | None:
        """Rank this layer gets; None leaves it alone. Time-embedding linears of residual blocks follow the linear rank, as other tools do."""
        chosen = patterns.decide(self.block_rank, layer.names)
        if chosen is not None:
            return chosen or None
        if layer.group == "resnet" and self.conv_rank is None:
            return None
        return self.conv_rank if is_spatial(layer.module) else self.rank

    def alpha_for(self, layer: Layer) -> float:
        """Alpha this layer gets, as files have it: the change is scaled by it, divided by the layer's rank."""
        apart = self.conv_rank is not None and is_spatial(layer.module)
        usual = self.conv_rank if apart and self.conv_rank else self.rank
        alpha = float((self.conv_alpha if apart else self.alpha) or usual)
        rank = self.rank_for(layer) or usual
        chosen = patterns.decide(self.block_alpha, layer.names)
        if chosen is not None:
            alpha = float(chosen)
        elif rank != usual:
            alpha *= rank / usual
        return alpha * math.sqrt(rank) if self.rank_stabilized else alpha

    def reaches(self, layer: Layer) -> bool:
        """Whether ``layer`` is a linear layer or convolution that gets a rank: transformer and text layers, residual blocks where asked for."""
        return (
            isinstance(layer.module, nn.Linear | nn.Conv2d)
            and layer.group != "other"
            and self.rank_for(layer) is not None
        )


class DecomposedSettings(RankSettings):
    """Settings of network types with a rank that know Tucker's form on convolutions, and DoRA."""

    tucker: Annotated[bool, SHAPES, CONVOLUTIONS] = False
    """On convolutions larger than 1x1, a core of rank x rank cells between two 1x1 ones (Tucker's form): a fraction of the size at equal rank."""
    dora: Annotated[bool, SHAPES] = False
    """Learn the size of what makes each output apart from its direction (DoRA, arXiv 2402.09353). Nearer to full fine-tuning at low ranks, slower."""

    _by_inputs: bool = PrivateAttr(default=False)
    """Of a file: DoRA's magnitudes are those of inputs, as LyCORIS wrote them before version 3.2. Nothing new is trained so."""

    @classmethod
    def of_file(cls: type[Decomposed], rank: int, tensors: Mapping[str, Tensor], *, tucker: bool) -> Decomposed:
        """Settings that make a layer able to hold a file's tensors, which may be more than we would train: a rank above the limit, an alpha of 0.

        A file without alpha means alpha = rank.
        """
        alpha, magnitudes = float(tensors.get("alpha", rank)), tensors.get("dora_scale")
        settings = cls.model_construct(
            rank=rank, alpha=alpha, conv_rank=rank, conv_alpha=alpha, tucker=tucker, dora=magnitudes is not None
        )
        settings._by_inputs = magnitudes is not None and magnitudes.shape[0] == 1 and magnitudes.shape[1] != 1
        return settings

    def magnitudes(self, weight: Tensor) -> dict[str, Tensor]:
        """DoRA's magnitudes at birth by name in the file, (out, 1) or (out, 1, 1, 1); nothing without DoRA."""
        if not self.dora:
            return {}
        kept = 1 if self._by_inputs else 0
        axes = tuple(axis for axis in range(weight.dim()) if axis != kept)
        return {"dora_scale": torch.linalg.vector_norm(weight.float(), dim=axes, keepdim=True)}

    @model_validator(mode="after")
    def _tucker_does_something(self) -> DecomposedSettings:
        if self.tucker and self.conv_rank is None:
            raise ValueError("tucker does nothing without conv_rank: it is for convolutions. Give both, or neither.")
        return self

    def metadata(self) -> dict[str, Any]:
        """Dim, alpha and the arguments other trainers know."""
        told = super().metadata()
        arguments = {"use_tucker": self.tucker, "dora_wd": self.dora}
        return {
            **told,
            "network_args": {**told["network_args"], **{name: True for name, on in arguments.items() if on}},
        }

    def is_tucker(self, layer: Layer) -> bool:
        """Whether this layer gets Tucker's form."""
        return self.tucker and is_spatial(layer.module)


def is_spatial(module: nn.Module) -> bool:
    """Whether it is a convolution that looks beyond its own cell."""
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
