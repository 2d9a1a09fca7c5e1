"""What the orthogonal network types have in common: blocks X of b x b numbers, each a rotation R = (I + Q)(I - Q)⁻¹ with Q = X - Xᵀ.

A rotation of a layer's outputs keeps the lengths of its weights and the angles between them (Qiu et al. 2023, arXiv 2306.07280), which is
where a model's general knowledge is held to be.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from lorabake.adapters._outputs import OutputType
from lorabake.adapters._ranks import CONVOLUTIONS, SHAPES, STRENGTH, LayerSettings, is_spatial
from lorabake.base import patterns
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import ByLayer
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")


class OrthogonalSettings(LayerSettings):
    """Settings of network types that rotate outputs in blocks."""

    algorithm: ClassVar[str] = ""
    """As LyCORIS calls the type."""

    block_size: Annotated[int, SHAPES] = Field(default=8, ge=2, le=1024)
    """Outputs that are rotated together, at most (LyCORIS' dim): a layer gets the largest block that its outputs can be divided into. Larger
    blocks hold more and make a larger file; 4 to 16 serves most."""
    conv_block_size: Annotated[int | None, SHAPES, CONVOLUTIONS] = Field(default=None, ge=2, le=1024)
    """Block size on convolutions and residual blocks; absent leaves them alone. Helps styles and textures."""
    block_sizes: Annotated[dict[str, int] | None, SHAPES, ByLayer()] = None
    """Table of block sizes for some layers: pattern = size, 0 leaves them alone. A pattern is a piece of a layer's name (mid_block,
    down_blocks.0) or a regular expression; the first that is found decides."""
    constraint: Annotated[float | None, STRENGTH] = Field(default=None, gt=0)
    """Bound on how far a layer is rotated: ‖Q‖ stays below this times the layer's outputs (COFT). Default: none, which suits a moderate learning
    rate; 1e-4 to 1e-2 where used. ComfyUI bounds ‖Q‖ by the number itself and so may draw such a file weaker."""
    rescale: Annotated[bool, SHAPES] = False
    """Also learn a factor for each output. More freedom at almost no size. ComfyUI does not read the factors of OFT files, but those of BOFT."""

    @field_validator("block_sizes")
    @classmethod
    def _is_a_table_of_sizes(cls, table: dict[str, int] | None) -> dict[str, int] | None:
        for pattern, size in (table or {}).items():
            if size != 0 and not 2 <= size <= 1024:
                raise ValueError(
                    f"the block size of '{pattern}' is {size}: it must be from 2 to 1024, or 0 (leave it alone)"
                )
        patterns.checked(table)
        return table

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it."""
        arguments = {
            "algo": self.algorithm,
            "conv_dim": self.conv_block_size,
            "block_sizes": self.block_sizes,
            "constraint": self.constraint,
            "rescaled": self.rescale,
            "module_dropout": self.module_dropout,
        }
        told = {name: value for name, value in arguments.items() if value}
        return {"network_dim": self.block_size, "network_args": told}

    def asked(self, layer: Layer) -> int | None:
        """Block size that is wanted on a layer; None leaves it alone. Time-embedding linears follow the linear size, as other tools do."""
        chosen = patterns.decide(self.block_sizes, layer.names)
        if chosen is not None:
            return chosen or None
        if layer.group == "resnet" and self.conv_block_size is None:
            return None
        return self.conv_block_size if is_spatial(layer.module) else self.block_size

    def block(self, layer: Layer) -> int:
        """Block size that a layer gets; 0 leaves it alone."""
        if not isinstance(layer.module, nn.Linear | nn.Conv2d) or layer.group == "other":
            return 0
        size = self.asked(layer)
        return 0 if size is None else self.fitted(layer.module.weight.shape[0], size)

    @abstractmethod
    def fitted(self, outputs: int, size: int) -> int:
        """The largest possible block for ``outputs`` that is not above ``size``; 0 if there is none."""


class OrthogonalType(OutputType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of blocks, but for their arrangement and what it does to rows."""

    def fits(self, layer: Layer, settings: OrthogonalSettings) -> bool:
        """Linear layers and convolutions whose outputs can be divided into blocks."""
        return settings.block(layer) > 0

    @abstractmethod
    def shape(self, outputs: int, block: int) -> tuple[int, ...]:
        """Of ``oft_blocks``."""

    def work(self, tensors: Mapping[str, Tensor]) -> int:
        """As measured: small blocks take their time in memory, whatever their size."""
        return 200 * (tensors["oft_blocks"].shape[0] if tensors["oft_blocks"].dim() == 4 else 1)

    def create(
        self, layer: Layer, settings: OrthogonalSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All zero: no rotation. Factors are one.

        Alpha is the constraint, as in LyCORIS' files. Without one it is 0, which LyCORIS and ComfyUI take for no bound. (Early
        versions of A1111's reader bound ‖Q‖ by 0 then, and draw such a file as the base.)
        """
        weight: Any = layer.module.weight
        outputs = weight.shape[0]
        born = {"oft_blocks": torch.zeros(self.shape(outputs, settings.block(layer)))}
        if settings.rescale:
            born["rescale"] = torch.ones(outputs, *(1 for _ in weight.shape[1:]))
        return born, {"alpha": torch.tensor(float(settings.constraint or 0))}

    def found(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Settings as the tensors have them; a file without alpha has no constraint."""
        alpha = float(weights["alpha"]) if "alpha" in weights else 0.0
        size = weights["oft_blocks"].shape[-1]
        return {
            "block_size": size,
            "conv_block_size": size,
            "constraint": alpha if alpha > 0 else None,
            "rescale": "rescale" in weights,
        }
