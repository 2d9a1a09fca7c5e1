"""Diag-OFT: every block of b outputs is rotated by a matrix of its own. W' = Rᵀ W, block by block; biases stay.

Source: Qiu et al. 2023 (OFT), arXiv 2306.07280; blocks of a size instead of a number, and names of the file's tensors, as in LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from lorabake.adapters._orthogonal import OrthogonalSettings, OrthogonalType
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from lorabake.adapters import _rotations as rotations
else:
    rotations = lazy_module("lorabake.adapters._rotations")


class DiagOftSettings(OrthogonalSettings):
    """Settings of ``oft``."""

    algorithm: ClassVar[str] = "diag-oft"

    def fitted(self, outputs: int, size: int) -> int:
        """The largest divisor that gives at least as many blocks as a block has outputs: no other is read by LyCORIS."""
        return max((b for b in range(2, size + 1) if outputs % b == 0 and b * b <= outputs), default=0)


class _AsFound(DiagOftSettings):
    """A file's blocks, which may be fewer than a block has outputs: kohya's scripts write such."""

    def block(self, layer: Layer) -> int:
        return self.block_size


class DiagOft(OrthogonalType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of Diag-OFT."""

    def shape(self, outputs: int, block: int) -> tuple[int, ...]:
        """A block for every b outputs."""
        return outputs // block, block, block

    def added(self, rows: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """m·(g·Rᵀ - I) of the rows, in blocks; g are the factors."""
        blocks, factors = tensors["oft_blocks"], tensors.get("rescale")
        count, size, _ = blocks.shape[-3:]
        turns = rotations.turns(blocks, float(tensors["alpha"]) * count * size, of_one=3).mT
        if factors is None:
            return rotations.turned(turns * multiplier, rows)
        factors = factors.reshape(*blocks.shape[:-3], -1, 1)
        return rotations.with_factors(rows, rotations.turned(turns, rows), factors, 1.0) * multiplier

    def settings_of(self, weights: Mapping[str, Tensor]) -> DiagOftSettings:
        """Block size, constraint and factors as the tensors have them."""
        return _AsFound.model_construct(**self.found(weights))


CARD = AdapterCard(
    kind="adapter",
    name="oft",
    summary="Rotates each layer's outputs in blocks (Diag-OFT): the model's own structure stays, for subjects that must not spoil the rest.",
    code="lorabake.adapters.diag_oft:DiagOft",
    settings=DiagOftSettings,
    network_module="lycoris.kohya",
    also_called=("diag-oft",),
)
