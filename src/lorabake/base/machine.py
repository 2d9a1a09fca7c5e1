"""What there is to compute with, and what is computed on if nobody says."""

from __future__ import annotations

import os
from typing import Literal

from lorabake.base.errors import UserError

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]
"""Type of frozen weights and activations."""


def cores() -> int:
    """CPU cores this process may use: those it is bound to, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_device() -> tuple[Device, str]:
    """Where to compute if nobody says, and why."""
    import torch

    return ("cuda", "a GPU was found") if torch.cuda.is_available() else ("cpu", "no GPU was found")


def usual_precision(device: Device) -> tuple[Precision, str]:
    """In what precision a model computes on ``device`` if nobody says, and why."""
    if device == "cpu":
        return "fp32", "as fast as bf16 on most CPUs, and exact"
    return ("fp32", "this GPU has no bf16") if _lacks_bf16() else ("bf16", "half the memory, and faster")


def check_device(device: Device, setting: str) -> None:
    """Whether there is such a device; ``setting`` is what asked for it.

    Raises:
        UserError: there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f'{setting} is "cuda", and PyTorch finds no GPU here: its driver may be missing, or this PyTorch be one for CPUs only. '
            f'Give "cpu", or leave {setting} out.'
        )


def _lacks_bf16() -> bool:
    """Whether there is a GPU, and it computes bf16 only by way of other types (older than Ampere)."""
    import torch

    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
