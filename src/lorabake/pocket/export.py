"""Halving a model folder for shipping."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lorabake.base.files import replacing, write_atomic
from lorabake.formats.safetensors_file import read_tensors, write


def export_half(source: Path, target: Path) -> int:
    """Copy a diffusers folder with its weights in fp16, smaller by half; returns the bytes of the weights.

    Configurations keep saying float32, so that loaders that obey them do not compute in half precision on a CPU.
    """
    total = 0
    for path in sorted(file for file in source.rglob("*") if file.is_file()):
        copy = target / path.relative_to(source)
        if path.suffix == ".safetensors":
            tensors = {name: tensor.to(torch.float16) for name, tensor in read_tensors(path).items()}
            write(copy, tensors, {"format": "pt"})
            total += copy.stat().st_size
        elif path.suffix == ".json" and path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            write_atomic(copy, (json.dumps(config, indent=2) + "\n").encode())
        else:
            with replacing(copy) as part:
                part.write_bytes(path.read_bytes())
    return total
