"""BOFT: rotations of blocks in stages, with a butterfly's exchange of outputs between them, so that every output can mix with every other.

Source: Liu et al. 2023 (BOFT), arXiv 2311.06243; arrangement and names of the file's tensors as in LyCORIS. Stage i pairs outputs that are
2^i·b/2 apart: with the number of blocks a power of two, its logarithm and one stages reach everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from lorabake.adapters._orthogonal import OrthogonalSettings, OrthogonalType
from lorabake.adapters._ranks import SHAPES
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorabake.adapters import _rotations as rotations
else:
    torch = lazy_module("torch")
    rotations = lazy_module("lorabake.adapters._rotations")


class BoftSettings(OrthogonalSettings):
    """Settings of ``boft``."""

    algorithm: ClassVar[str] = "boft"

    block_size: Annotated[int, SHAPES] = Field(default=16, ge=2, le=1024)
    """Outputs that are rotated together in a stage, at most (LyCORIS' dim). A layer gets the largest even block that divides its outputs into a
    power of two, and is left alone where none is small enough: 320, 640 and 1280 outputs take blocks of 10, 768 and 3072 of 12. 16 serves most."""

    def fitted(self, outputs: int, size: int) -> int:
        """The largest even divisor of which the number of blocks is a power of two."""
        return max(
            (b for b in range(2, size + 1, 2) if outputs % b == 0 and (outputs // b).bit_count() == 1), default=0
        )


class _AsFound(BoftSettings):
    """A file's blocks."""

    def block(self, layer: Layer) -> int:
        return self.block_size


class Boft(OrthogonalType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of BOFT."""

    def shape(self, outputs: int, block: int) -> tuple[int, ...]:
        """Stages, and a block for every b outputs in each."""
        count = outputs // block
        return (max(count, 1) - 1).bit_length() + 1, count, block, block

    def added(self, rows: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """What the stages in turn make of the rows, less the rows: each is I + m·(R - I). Factors are interpolated, too.

        (LyCORIS scales by its factors in full at every multiplier, also at 0; here a multiplier of 0 is the base.)
        """
        blocks, factors = tensors["oft_blocks"], tensors.get("rescale")
        count, size, _ = blocks.shape[-3:]
        turns = rotations.turns(blocks, float(tensors["alpha"]) * count * size, of_one=4) * multiplier
        stages = turns + torch.eye(size, device=turns.device)
        turned = rows.float()  # a stage's rotation would be rounded away beside I in half precision
        for stage, rotation in enumerate(stages.unbind(-4)):
            apart = 2**stage * size // 2
            turned = _paired(rotations.turned(rotation, _paired(turned, apart, 2)), 2, apart)
        added = (turned - rows).to(rows.dtype)
        if factors is None:
            return added
        return rotations.with_factors(rows, added, factors.reshape(*blocks.shape[:-4], -1, 1), multiplier)

    def settings_of(self, weights: Mapping[str, Tensor]) -> BoftSettings:
        """Block size, constraint and factors as the tensors have them."""
        return _AsFound.model_construct(**self.found(weights))


def _paired(rows: Tensor, inner: int, outer: int) -> Tensor:
    """Rows in the order that brings together those ``inner`` apart (with ``outer`` 2); the other way round it is undone.

    Args:
        rows: (…, out, cells), where out is seen as (groups, outer, inner) and becomes (groups, inner, outer).
        inner, outer: sizes.
    """
    return rows.unflatten(-2, (-1, outer, inner)).transpose(-3, -2).flatten(-4, -2)


CARD = AdapterCard(
    kind="adapter",
    name="boft",
    summary="Rotates outputs in stages of small blocks (butterfly): every output mixes with every other; slower than oft, and finer.",
    code="lorabake.adapters.boft:Boft",
    settings=BoftSettings,
    network_module="lycoris.kohya",
    usual_lr=2e-5,
    linear=False,
)
