"""Layers that are one here and several in diffusers' folders, by hand."""

from __future__ import annotations

import torch

from lorabake.families.networks.layouts import Target
from lorabake.families.networks.pieces import Piece, diffusers_state, pieces_rename, swapped

PIECES = [
    Piece("qkv", "to_q", (0, 2)),
    Piece("qkv", "to_k", (2, 3)),
    *swapped("shift_scale", "scale_shift", 2),
    Piece("proj", "to_out.0"),
    Piece("absent", "gone"),
]


def test_names_are_told_with_their_rows() -> None:
    rename = pieces_rename(PIECES)
    assert rename("to_k.bias") == (Target("qkv.bias", None, into=(2, 3)),)
    assert rename("to_out.0.weight") == (Target("proj.weight"),)
    assert rename("scale_shift.weight") == (
        Target("shift_scale.weight", (2, 4), into=(0, 2)),
        Target("shift_scale.weight", (0, 2), into=(2, 4)),
    )
    assert rename("odd.weight") == (Target("odd.weight"),), "to be reported"


def test_tensors_are_cut_and_turned_round() -> None:
    state = {
        "qkv.weight": torch.tensor([[1.0], [2.0], [3.0]]),
        "shift_scale.bias": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "proj.weight": torch.tensor([[7.0]]),
    }
    given = diffusers_state(state, PIECES)
    assert {name: tensor.tolist() for name, tensor in given.items()} == {
        "to_q.weight": [[1.0], [2.0]],
        "to_k.weight": [[3.0]],
        "scale_shift.bias": [3.0, 4.0, 1.0, 2.0],
        "to_out.0.weight": [[7.0]],
    }
    given["to_out.0.weight"].zero_()
    assert state["proj.weight"].item() == 7.0, "no memory is shared"
