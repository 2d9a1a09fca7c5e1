"""Networks whose fused layers are several in diffusers' folders: which rows of what are which, for reading and for writing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lorabake.base.lazy import lazy_module
from lorabake.families.networks.layouts import Rename, Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")


class Piece(NamedTuple):
    """Some rows of a module of ours, and the rows of diffusers' that they are; None is all of them."""

    ours: str
    theirs: str
    our_rows: tuple[int, int] | None = None
    their_rows: tuple[int, int] | None = None


def swapped(ours: str, theirs: str, channels: int) -> tuple[Piece, Piece]:
    """Two modules whose halves of ``channels`` rows are the other way round: a scale before its shift."""
    first, second = (0, channels), (channels, 2 * channels)
    return Piece(ours, theirs, first, second), Piece(ours, theirs, second, first)


def pieces_rename(pieces: Iterable[Piece]) -> Rename:
    """From diffusers' names of weights and biases to ours; names in no piece come back as they are, to be reported."""
    table: dict[str, list[Piece]] = {}
    for piece in pieces:
        table.setdefault(piece.theirs, []).append(piece)

    def rename(name: str) -> tuple[Target, ...]:
        path, _, kind = name.rpartition(".")
        found = table.get(path)
        if found is None:
            return (Target(name),)
        return tuple(Target(f"{piece.ours}.{kind}", piece.their_rows, into=piece.our_rows) for piece in found)

    return rename


def diffusers_state(state: Mapping[str, Tensor], pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Our weights and biases under diffusers' names, none sharing memory with another. Pieces of modules that are not there are left out."""
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for piece in pieces:
        for kind in ("weight", "bias"):
            if (ours := state.get(f"{piece.ours}.{kind}")) is not None:
                part = ours[slice(*piece.our_rows)] if piece.our_rows else ours
                rows.setdefault(f"{piece.theirs}.{kind}", []).append(((piece.their_rows or (0, 0))[0], part))
    return {
        name: torch.cat([part for _, part in sorted(found, key=lambda row: row[0])]) for name, found in rows.items()
    }
