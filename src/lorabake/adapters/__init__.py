"""Network types, one file each; putting them onto a model and taking them off again is in ``_graft``.

A file whose name starts with an underscore is the room's own machinery; every other file is one network type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from lorabake.base.cards import Settings, find
from lorabake.base.errors import UserError
from lorabake.protocols.adapter import AdapterCard

if TYPE_CHECKING:
    from torch import Tensor

    from lorabake.protocols.adapter import Graft
    from lorabake.protocols.family import Model, Part


def graft(model: Model, name: str, settings: Settings, *, seed: int, parts: tuple[Part, ...]) -> Graft:
    """Graft a newborn adapter of type ``name`` onto ``parts`` of ``model``; the model's output is unchanged.

    Raises:
        UserError: the type is unknown, or the settings leave no layer to train.
    """
    card = cast(AdapterCard, find("adapter", name))
    if card.trains_base:
        return card.load()(card, model, parts)
    from lorabake.adapters._graft import graft_newborn

    return graft_newborn(card, card.load()(), model, settings, seed=seed, parts=parts)


def adopt(graft: Graft, tensors_by_layer: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Let a newborn adapter do from now on what a file's adapter does, whatever the alphas; returns how many of its layers the file leaves alone.

    Raises:
        UserError: the file has other layers, ranks or tensors than the adapter; the message names them.
    """
    from lorabake.adapters._adopt import adopt as adopt_layers
    from lorabake.adapters._graft import LayerGraft

    if not isinstance(graft, LayerGraft):
        raise UserError(f"'{graft.card.name}' trains whole models, which begin with a model and not with a LoRA file.")
    return adopt_layers(graft, tensors_by_layer)


def graft_file(
    model: Model, name: str, tensors_by_layer: Mapping[str, Mapping[str, Tensor]], multiplier: float = 1.0
) -> Graft:
    """Graft an adapter of type ``name`` from a file's tensors (grouped by layer key), for drawing pictures.

    Raises:
        UserError: the file does not fit this model or type; the message names layers, tensors or shapes.
    """
    from lorabake.adapters._graft import graft_tensors

    card = cast(AdapterCard, find("adapter", name))
    if card.trains_base:
        raise UserError(f"'{name}' trains whole models: what it saves is used as a base model, not grafted onto one.")
    return graft_tensors(card, card.load()(), model, tensors_by_layer, multiplier)
