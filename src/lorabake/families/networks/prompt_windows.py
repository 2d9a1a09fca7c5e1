"""Captions longer than their text encoder: windows of its own length, encoded one by one and joined to one text.

As kohya's ``max_token_length``: of two windows of 77 positions come 152 vectors, of three 227: the start of the first, the 75
vectors inside each, the end of the last. Starts and ends in between are dropped. With one window nothing changes.

Shapes: B captions, W windows each, N = B·W windows in all (a caption's own are neighbours), L positions of one window,
T = W·L, D channels.
The windows' ids are made by :meth:`lorabake.families.networks.tokenizer.ClipTokenizer.encode`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_windows(ids_BT: Tensor, positions: int) -> Tensor:
    """Rows for the text encoder, (N, L), of ids whose windows lie one after the other.

    Args:
        ids_BT: token ids, T = W·L to a caption.
        positions: L, the length of one window: the text encoder's.

    Raises:
        ValueError: the rows are not whole windows.
    """
    if ids_BT.shape[1] % positions:
        raise ValueError(f"{ids_BT.shape[1]} tokens in a row are not whole windows of {positions}.")
    return ids_BT.reshape(-1, positions)


def join_windows(text_NLD: Tensor, batch: int) -> Tensor:
    """Hidden states of each caption's windows as those of one text, (B, 2 + W·(L - 2), D)."""
    text_BWLD = text_NLD.unflatten(0, (batch, -1))
    if text_BWLD.shape[1] == 1:
        return text_NLD
    inside_BMD = text_BWLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([text_BWLD[:, 0, :1], inside_BMD, text_BWLD[:, -1, -1:]], dim=1)


def first_windows(pooled_ND: Tensor, batch: int) -> Tensor:
    """The vector that stands for a whole caption, (B, D), where the text encoder gives one per window: the first window's."""
    return pooled_ND.unflatten(0, (batch, -1))[:, 0]
