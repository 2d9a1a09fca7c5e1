"""Rotations of rows in blocks, and what they are made of. All of it is batched over blocks, and over layers if there is an axis of them."""

from __future__ import annotations

import torch
from torch import Tensor


def turns(blocks: Tensor, limit: float, of_one: int) -> Tensor:
    """R - I of every block: Cayley's R = (I + Q)(I - Q)⁻¹ with Q = X - Xᵀ, float32, differentiable.

    It is solved for as 2 (I - Q)⁻¹ Q: small rotations are not rounded off against the I. I - Q always has an inverse.

    Args:
        blocks: X, (…, b, b).
        limit: ‖Q‖ of a layer is at most this; 0 is no limit. Beyond it Q is scaled.
        of_one: how many of the last axes are those of one layer.
    """
    blocks = blocks.float()
    q = blocks - blocks.mT
    if limit > 0:
        axes = tuple(range(-of_one, 0))
        norms = torch.linalg.vector_norm(q, dim=axes, keepdim=True) + 1e-8
        q = q * (limit / norms).clamp(max=1)
    eye = torch.eye(q.shape[-1], device=q.device)
    solved, _ = torch.linalg.solve_ex(
        eye - q, 2 * q
    )  # without a look at the outcome, for which a GPU would have to wait
    return solved


def turned(turns_NBB: Tensor, rows: Tensor) -> Tensor:
    """T r for every block of rows: (…, N·b, cells) with (…, N, b, b), in the type of ``rows``."""
    count, size, _ = turns_NBB.shape[-3:]
    return (turns_NBB.to(rows.dtype) @ rows.unflatten(-2, (count, size))).flatten(-3, -2)


def with_factors(rows: Tensor, added: Tensor, factors: Tensor | None, multiplier: float) -> Tensor:
    """What is added where rows with ``added`` are also scaled by 1 + m·(g - 1).

    Args:
        rows: (…, out, cells).
        added: so far.
        factors: g of each output, (…, out, 1); None is one.
        multiplier: m.
    """
    if factors is None:
        return added
    return added + ((factors - 1) * multiplier).to(rows.dtype) * (rows + added)
