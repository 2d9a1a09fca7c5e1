"""Puts LoRA files on a loaded model."""

from __future__ import annotations

from pathlib import Path

from lorabake.adapters import graft_file
from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.formats.kohya import network_type, read_lora
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model

_SAME_AS = {"locon": "lora"}
"""Types that differ only in which layers they reach."""


def apply_lora(model: Model, path: Path, weight: float = 1.0) -> Graft:
    """Graft the LoRA at ``path`` with the given weight; ``remove()`` takes it off.

    Raises:
        UserError: the file is unreadable, of a network type that is not known here, or made for another base model.
    """
    file = read_lora(path)
    name = network_type(file.layers)
    name = _SAME_AS.get(name, name)
    if name not in cards("adapter"):
        raise UserError(
            f"{path} is a LoRA of type '{name}', which cannot be applied yet. Known: {', '.join(cards('adapter'))}."
        )
    try:
        return graft_file(model, name, file.layers, weight)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
