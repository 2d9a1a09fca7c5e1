"""The state a killed run continues from: weights, optimizer moments and the step. Randomness needs no state (see ``base.streams``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.files import remove, sha256_file, write_atomic
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.optimizer import Optimizer

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
    folder: Path, progress: Progress, groups: Sequence[FlatGroup], optimizer: Optimizer, keep: int | None = _KEEP
) -> None:
    """Write the state whole, under a name that holds its hash, then drop older ones but for the newest ``keep`` (None drops none)."""
    tensors: dict[str, Tensor] = {}
    for group in groups:
        tensors[f"{group.name}.values"] = group.values.detach()
        for name, value in optimizer.state[group.values].items():
            tensors[f"{group.name}.optimizer.{name}"] = torch.as_tensor(value)
    header = {"progress": json.dumps({"step": progress.step, "log_size": progress.log_size})}
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, header)
    path = folder / f"step{progress.step:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
    write_atomic(path, data)
    for same_step in states_of(folder, progress.step):
        if same_step != path:
            remove(same_step)
    if keep is not None:
        for old in states_of(folder)[:-keep]:
            remove(old)


def states_of(folder: Path, step: int | None = None) -> list[Path]:
    """States in a folder, the newest last; those of one ``step`` if it is given."""
    return sorted(folder.glob(f"step{'*' if step is None else f'{step:08d}-*'}.safetensors"))


def step_of(path: Path) -> int:
    """Steps done in a state, from its name.

    Raises:
        UserError: it is not named as states are.
    """
    number, dash, digest = path.stem.removeprefix("step").partition("-")
    if not (number.isdigit() and dash and len(digest) == 64 and path.suffix == ".safetensors"):
        raise UserError(f"{path} is not a state of a run: those are named step00000009-….safetensors.")
    return int(number)


def load_state(folder: Path, groups: Sequence[FlatGroup], optimizer: Optimizer) -> Progress | None:
    """Put the newest undamaged state back into ``groups`` and ``optimizer``; None when there is none."""
    for path in reversed(states_of(folder)):
        if not is_whole(path):
            remove(path)
            continue
        return read_state(path, groups, optimizer)
    return None


def is_whole(path: Path) -> bool:
    """Whether a state has the bytes it was written with."""
    return sha256_file(path) == path.stem.partition("-")[2]


def read_state(path: Path, groups: Sequence[FlatGroup], optimizer: Optimizer) -> Progress:
    """Put a whole state back into ``groups`` and ``optimizer``."""
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    _restore(tensors, groups, optimizer)
    return Progress(found["step"], found["log_size"])


def _restore(tensors: dict[str, Tensor], groups: Sequence[FlatGroup], optimizer: Optimizer) -> None:
    for group in groups:
        group.values.data.copy_(tensors[f"{group.name}.values"])
        prefix = f"{group.name}.optimizer."
        state: dict[str, Any] = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        if state:
            optimizer.state[group.values] = {name: tensor.to(group.values.device) for name, tensor in state.items()}
