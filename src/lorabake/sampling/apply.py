"""Puts LoRA files on a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from lorabake.adapters import graft_file
from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.formats.kohya import LoraFile, network_type, read_lora
from lorabake.protocols.adapter import AdapterCard, Graft
from lorabake.protocols.family import Model


def apply_lora(model: Model, path: Path, weight: float = 1.0) -> Graft:
    """Graft the LoRA at ``path`` with the given weight; ``remove()`` takes it off.

    Raises:
        UserError: the file is unreadable, of a network type that is not known here, or made for another base model.
    """
    file = read_lora(path)
    name = adapter_of(path, file)
    try:
        return graft_file(model, name, file.layers, weight)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def adapter_of(path: Path, file: LoraFile) -> str:
    """Name of the network type that reads ``file``, which came from ``path``.

    Raises:
        UserError: it is not known here.
    """
    every = cast(Mapping[str, AdapterCard], cards("adapter"))
    kind, known = network_type(file.layers), {name: card for name, card in every.items() if not card.trains_base}
    name = next((name for name, card in known.items() if kind in (name, *card.also_called)), None)
    if name is None:
        raise UserError(f"{path} is a LoRA of type '{kind}', which cannot be applied yet. Known: {', '.join(known)}.")
    return name
