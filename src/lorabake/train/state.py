"""The state a killed run continues from: weights, all that the optimizer keeps, and the step. Randomness needs no state (see ``base.streams``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.files import remove, sha256_file, write_atomic
from lorabake.optimizers._averages import Averages
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
    folder: Path,
    progress: Progress,
    groups: Sequence[FlatGroup],
    optimizer: Optimizer,
    beside: Beside | None = None,
    averages: Averages | None = None,
    *,
    keep: int | None = _KEEP,
) -> None:
    """Write the state whole, under a name that holds its hash, then drop older ones but for the newest ``keep`` (None drops none)."""
    kept = _Kept()
    for name, average in averages.tensors().items() if averages else ():
        kept.put(name, {"values": average}, groups[0].values.device)
    for group, param_group, state in owned(groups, optimizer, beside):
        home = group.values.device
        kept.put(group.name, {"values": group.values}, home)
        kept.put(f"{group.name}.group", {name: param_group[name] for name in param_group if name != "params"}, home)
        for index, parameter in enumerate(param_group["params"]):
            kept.put(f"{group.name}.optimizer.{index}", state.get(parameter, {}), home)
    told = {**asdict(progress), "values": kept.values, "on_cpu": sorted(kept.on_cpu)}
    header = {"progress": json.dumps(told, sort_keys=True)}  # one entry: several would lie in any order
    data = save({name: tensor.cpu().contiguous() for name, tensor in kept.tensors.items()}, header)
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


def newest_whole(states: Sequence[Path]) -> tuple[Path | None, list[Path]]:
    """The last of ``states`` (the newest last) that has its bytes, if any, and those after it that have not."""
    damaged: list[Path] = []
    for path in reversed(states):
        if sha256_file(path) == path.stem.partition("-")[2]:
            return path, damaged
        damaged.append(path)
    return None, damaged


def read_state(
    path: Path,
    groups: Sequence[FlatGroup],
    optimizer: Optimizer,
    beside: Beside | None = None,
    averages: Averages | None = None,
) -> Progress:
    """Put a whole state back into ``groups``, ``optimizer``, ``beside`` and ``averages``."""
    kept = _Kept()
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["progress"])
        kept.tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    kept.values.update(told["values"])
    kept.on_cpu.update(told["on_cpu"])
    found = kept.by_place(groups[0].values.device)
    for name, average in averages.tensors().items() if averages else ():
        average.copy_(found[name]["values"])
    for group, param_group, state in owned(groups, optimizer, beside):
        _restore(found, group, param_group, state)
    return Progress(told["step"], told["log_size"])


def owned(
    groups: Sequence[FlatGroup], optimizer: Optimizer, beside: Beside | None
) -> Iterator[tuple[FlatGroup, dict[str, Any], MutableMapping[Tensor, dict[str, Any]]]]:
    """Every group that is stepped on, with what its optimizer keeps of it: by group, and by weight."""
    for group, param_group in zip(groups, optimizer.param_groups, strict=True):
        yield group, param_group, optimizer.state
    if beside:
        yield beside.group, beside.optimizer.param_groups[0], beside.optimizer.state


def _restore(
    found: Mapping[str, Mapping[str, Any]],
    group: FlatGroup,
    param_group: dict[str, Any],
    state: MutableMapping[Tensor, dict[str, Any]],
) -> None:
    group.values.data.copy_(found[group.name]["values"])
    param_group.update(found.get(f"{group.name}.group", {}))
    for index, parameter in enumerate(param_group["params"]):
        if kept := found.get(f"{group.name}.optimizer.{index}"):
            state[parameter] = {name: _lying_as(parameter, value) for name, value in kept.items()}


def _lying_as(parameter: Tensor, value: Any) -> Any:
    """What is kept of every number of a weight lies in memory as the weight does: sums would differ in the last bit."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or parameter.is_contiguous():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


class _Kept:
    """What there is to keep: by place (``denoiser.optimizer.0``) and, behind a dot, by name (``exp_avg``)."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        """What is no tensor, as JSON has it."""
        self.on_cpu: set[str] = set()
        """Tensors on the CPU beside weights on a GPU: some optimizers count their steps there."""
        self._memory: set[int] = set()

    def put(self, place: str, content: Mapping[str, Any], home: torch.device) -> None:
        """Keep what belongs to weights on the device ``home``."""
        for name, value in content.items():
            key = f"{place}.{name}"
            if not isinstance(value, Tensor):
                self.values[key] = _told(value)
                continue
            if value.device.type != home.type:
                self.on_cpu.add(key)
            shared = value.data_ptr() in self._memory  # tables that several weights use
            self._memory.add(value.data_ptr())
            self.tensors[key] = value.detach().clone() if shared else value.detach()

    def by_place(self, home: torch.device) -> dict[str, dict[str, Any]]:
        """Everything as it was put, for weights on the device ``home``."""
        found: dict[str, dict[str, Any]] = {}
        for key, tensor in self.tensors.items():
            place, _, name = key.rpartition(".")
            found.setdefault(place, {})[name] = tensor if key in self.on_cpu else tensor.to(home)
        for key, value in self.values.items():
            place, _, name = key.rpartition(".")
            found.setdefault(place, {})[name] = _untold(value)
        return found


def _told(value: Any) -> Any:
    """A number, a word, nothing, or a tuple of such as JSON: numbers come back to the last bit, and tuples as tuples."""
    return {"tuple": [_told(item) for item in value]} if isinstance(value, tuple) else value


def _untold(value: Any) -> Any:
    return tuple(_untold(item) for item in value["tuple"]) if isinstance(value, dict) else value
