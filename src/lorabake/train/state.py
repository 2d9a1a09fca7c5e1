"""The state a killed run continues from: weights, optimizer moments and the step. Randomness needs no state (see ``base.streams``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorabake.base.files import sha256_file, write_atomic
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.optimizer import Optimizer
from lorabake.train.beside import Beside

_KEEP = 2
"""States kept: the newest, and the one before it should the newest be damaged."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    step: int
    """Optimizer steps done."""
    log_size: int
    """Bytes of ``events.jsonl`` that belong to those steps."""


def save_state(
    folder: Path, progress: Progress, groups: Sequence[FlatGroup], optimizer: Optimizer, beside: Beside | None = None
) -> None:
    """Write the state whole, under a name that holds its hash, then drop older ones."""
    tensors: dict[str, Tensor] = {}
    for group, owner in _owned(groups, optimizer, beside):
        tensors[f"{group.name}.values"] = group.values.detach()
        for name, value in owner.state[group.values].items():
            tensors[f"{group.name}.optimizer.{name}"] = torch.as_tensor(value)
    header = {"progress": json.dumps({"step": progress.step, "log_size": progress.log_size})}
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, header)
    write_atomic(folder / f"step{progress.step:08d}-{hashlib.sha256(data).hexdigest()}.safetensors", data)
    for old in sorted(folder.glob("step*.safetensors"))[:-_KEEP]:
        old.unlink()


def load_state(
    folder: Path, groups: Sequence[FlatGroup], optimizer: Optimizer, beside: Beside | None = None
) -> Progress | None:
    """Put the newest undamaged state back into ``groups``, ``optimizer`` and ``beside``; None when there is none."""
    for path in sorted(folder.glob("step*.safetensors"), reverse=True):
        if sha256_file(path) != path.stem.partition("-")[2]:
            path.unlink()
            continue
        with safe_open(path, framework="pt") as file:
            found = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for group, owner in _owned(groups, optimizer, beside):
            _restore(tensors, group, owner)
        return Progress(found["step"], found["log_size"])
    return None


def _owned(
    groups: Sequence[FlatGroup], optimizer: Optimizer, beside: Beside | None
) -> Iterator[tuple[FlatGroup, Optimizer]]:
    """Every group that is stepped on, and by whom."""
    yield from ((group, optimizer) for group in groups)
    if beside:
        yield beside.group, beside.optimizer


def _restore(tensors: dict[str, Tensor], group: FlatGroup, optimizer: Optimizer) -> None:
    group.values.data.copy_(tensors[f"{group.name}.values"])
    prefix = f"{group.name}.optimizer."
    state: dict[str, Any] = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }
    if state:
        optimizer.state[group.values] = {name: tensor.to(group.values.device) for name, tensor in state.items()}
