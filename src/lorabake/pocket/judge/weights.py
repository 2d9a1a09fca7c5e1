"""Weights of the judge on disk: fp16 safetensors with what they answer in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lorabake.base.errors import UserError

SHIPPED = Path(__file__).parent / "weights"


def save_network(network: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Write floating-point tensors as fp16, with `about` as JSON in the header."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata={"about": json.dumps(about)})


def read_about(path: Path) -> dict[str, Any]:
    """What a file of `save_network` says about itself.

    Raises:
        UserError: there is no such file, or it is none of the judge's.
    """
    if not path.is_file():
        raise UserError(f"There are no judge weights at {path}. Train them with train_judge or train_detectors.")
    with safe_open(str(path), framework="pt") as file:
        about = (file.metadata() or {}).get("about")
    if about is None:
        raise UserError(f"{path} was not written by the judge. Give a file of train_judge or train_detectors.")
    return json.loads(about)


def load_network(network: nn.Module, path: Path) -> None:
    """Fill `network` with the tensors of a file of `save_network`, as fp32."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    network.load_state_dict({n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()})
