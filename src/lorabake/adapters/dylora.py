"""DyLoRA: a LoRA that is trained at all its ranks at once, so that its first ranks alone are a good smaller LoRA.

In each step every layer learns with its first b ranks only, b drawn anew. The scale is alpha / rank of the whole at every b: what the first
ranks do does not depend on how many follow, and a smaller LoRA is the file without its last ranks (:func:`truncated`).

Source: Valipour et al. 2022, arXiv 2210.07558. The paper scales by alpha / b instead, and sd-scripts by alpha / sqrt(rank · b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.errors import UserError
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")

_DOWN, _MID, _UP, _ALPHA = "lora_down.weight", "lora_mid.weight", "lora_up.weight", "alpha"


class DyloraSettings(LoraSettings):
    """Settings of ``dylora``."""

    unit: int = Field(default=1, ge=1, le=1024)
    """Ranks that come and go together: the file can be cut to its multiples. 1 leaves every rank open; 4 for ranks of 64 and more, where the last
    ones would hardly ever be trained."""
    one_unit: bool = False
    """Train in each step the last of the units that take part alone, and leave those below it as they are (the paper's frozen mode, and how
    sd-scripts and LyCORIS do it). What small ranks have learned stays theirs, and all learn more slowly."""

    @model_validator(mode="after")
    def _some_rank_is_left_out(self) -> DyloraSettings:
        if self.unit >= self.rank:
            raise ValueError(
                f"unit {self.unit} with rank {self.rank} would always train all ranks: that is 'lora'. Give a smaller unit or a higher rank."
            )
        return self

    def metadata(self) -> dict[str, Any]:
        """As sd-scripts tells it."""
        told = super().metadata()
        return {**told, "network_args": {**told["network_args"], **self.changed("one_unit"), "unit": self.unit}}


class Dylora(Lora):
    """The :class:`~lorabake.protocols.adapter.LayerType` of DyLoRA: at rest it is LoRA."""

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor:
        """LoRA's, in training with the first ranks alone. They are drawn where the weights are: a GPU can record that."""
        return super().forward(
            base, x, _partly(weights, settings) if training else weights, multiplier, settings, training
        )

    def changed_weights(
        self,
        weights_L: Tensor,
        tensors: Sequence[Mapping[str, Tensor]],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor | None:
        """As LoRA's at rest; None in training, where layers differ in their ranks."""
        return None if training else super().changed_weights(weights_L, tensors, multiplier, settings, training)

    def settings_of(self, weights: Mapping[str, Tensor]) -> DyloraSettings:
        """LoRA's, and units of one rank: the file does not tell them."""
        return DyloraSettings.model_construct(**super().settings_of(weights).model_dump())


def _partly(weights: Mapping[str, Tensor], settings: DyloraSettings) -> dict[str, Tensor]:
    """The weights with B's columns of all but the first ranks zero."""
    up = weights[_UP]
    rank, device = up.shape[1], up.device
    units = torch.randint(1, -(-rank // settings.unit) + 1, (), device=device)
    ranks = torch.arange(rank, device=device)
    own = {**weights, _UP: up * _along(ranks < units * settings.unit, up, axis=1)}
    if settings.one_unit:
        learns = ranks >= (units - 1) * settings.unit
        for name, axis in ((_UP, 1), (_DOWN, 0)):
            own[name] = torch.where(_along(learns, own[name], axis), own[name], own[name].detach())
    return own


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector lying along one axis of another tensor."""
    return values.view([-1 if each == axis else 1 for each in range(like.dim())])


def truncated(layers: Mapping[str, Mapping[str, Tensor]], rank: int) -> dict[str, dict[str, Tensor]]:
    """A LoRA of the first ranks of another: exactly what a DyLoRA was trained to be at that rank. Layers of fewer ranks stay as they are.

    Args:
        layers: tensors by layer and name in the file.
        rank: ranks to keep.

    Raises:
        UserError: the rank is below 1, or there is a layer that is not plain LoRA.
    """
    if rank < 1:
        raise UserError(f"A LoRA cannot be cut to rank {rank}: at least 1 is left.")
    cut: dict[str, dict[str, Tensor]] = {}
    for key, tensors in layers.items():
        if odd := sorted(tensors.keys() - {_DOWN, _MID, _UP, _ALPHA}):
            raise UserError(f"'{key}.{odd[0]}' is no tensor of a plain LoRA, which alone can be cut to a smaller rank.")
        if missing := sorted({_DOWN, _UP} - tensors.keys()):
            raise UserError(f"The adapter file is not whole: '{key}.{missing[0]}' is missing.")
        down, up = tensors[_DOWN], tensors[_UP]
        whole = up.shape[1]
        kept = min(rank, whole)
        alpha = tensors.get(_ALPHA, torch.tensor(float(whole)))
        cut[key] = {
            _DOWN: down[:kept].contiguous(),
            _UP: up[:, :kept].contiguous(),
            _ALPHA: alpha * (kept / whole),
        }
        if _MID in tensors:
            cut[key][_MID] = tensors[_MID][:kept, :kept].contiguous()
    return cut


CARD = AdapterCard(
    kind="adapter",
    name="dylora",
    summary="LoRA trained at all ranks at once: train it large, and choose afterwards to how small a file it can be cut.",
    code="lorabake.adapters.dylora:Dylora",
    settings=DyloraSettings,
    network_module="networks.dylora",
    writes="lora",
)
