"""Whether what a run will write fits on the disk, asked before the first step."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.events import Events
from lorabake.base.files import free_space
from lorabake.base.runs import Run
from lorabake.base.units import size
from lorabake.protocols.adapter import Graft
from lorabake.recipe import Checked
from lorabake.train.bake import Bake
from lorabake.train.state import owned, states_of

_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
_PER_TENSOR = 256
"""Bytes of a file's header for each tensor, at most."""
_PER_STEP = 220
"""Bytes of the event log for each step, at most, but for its pictures."""
_PER_PICTURE = 25
"""Bytes of the event log for each picture that a step shows, about."""
_MOMENTS = 2
"""Numbers that an optimizer keeps for each weight, where it has none yet to be measured: as many as AdamW."""
_HEADROOM = 1.25
"""With less room than this times what is needed, people are told."""


def check_space(checked: Checked, bake: Bake, run: Run, step: int, drawings: int, events: Events) -> None:
    """Ask the volume of the run's folder for room for everything from ``step`` on.

    Args:
        checked: what is trained.
        bake: the same, prepared.
        run: where it is written.
        step: optimizer steps done.
        drawings: pixels of sample pictures that are still to be drawn.
        events: told where it is tight.

    Raises:
        UserError: it does not fit; with the numbers.
    """
    save, train = checked.recipe.save, checked.recipe.train
    every = save.every.steps(bake.steps_per_epoch)
    written = len({*range(every, bake.total_steps, every), bake.total_steps} - set(range(step + 1)))
    kept = min(written, save.keep + 1) if save.keep else written  # the old one goes once the new one is there
    files = kept * (1 + len(train.ema))  # each average has a file of its own
    checkpoint, state = checkpoint_size(checked, bake.graft), state_size(bake)
    states = max(0, 3 - len(states_of(run.state)))  # two that stay, and one that is being written
    rows = min(train.batch_size * train.gradient_accumulation, checked.length.images_per_epoch)
    log = (_PER_STEP + _PER_PICTURE * rows) * (bake.total_steps - step)
    needs = {
        f"{files} checkpoint{'s' * (files != 1)} of {size(checkpoint)}": files * checkpoint,
        f"{states} states of {size(state)} to continue from": states * state,
        f"a state of {size(state)} beside each checkpoint": kept * state * save.keep_state,
        "sample pictures": 3 * drawings,
        f"the log of {size(log)}": log,
    }
    needed, free = sum(needs.values()), free_space(run.folder)
    if needed * _HEADROOM <= free:
        return
    told = ", ".join(what for what, amount in needs.items() if amount)
    message = f"{run.folder} needs about {size(needed)} ({told}), and {size(free)} are free there."
    if needed > free:
        raise UserError(
            f"{message} Save less often (save.every), keep fewer (save.keep), make room, or give another folder with --into. "
            "Nothing was started."
        )
    events.emit("note", text=f"{message} It is tight: should the disk fill up, the run stops and can be continued.")


def checkpoint_size(checked: Checked, graft: Graft) -> int:
    """About how many bytes one checkpoint has."""
    tensors = graft.tensors().values()
    if graft.card.saves == "model":
        return max(_size_on_disk(checked.facts.path), sum(4 * tensor.numel() for tensor in tensors))
    each = _BYTES[checked.recipe.save.dtype]
    return (1 << 16) + sum(each * tensor.numel() + _PER_TENSOR for tensor in tensors)


def state_size(bake: Bake) -> int:
    """About how many bytes a state has: weights, averages and what the optimizer keeps; before its first step, what AdamW would keep."""
    needed = 1 << 12
    for average in bake.averages.tensors().values() if bake.averages else ():
        needed += _PER_TENSOR + average.nbytes
    for group, param_group, state in owned(bake.groups, bake.optimizer, bake.beside):
        needed += _PER_TENSOR + group.values.nbytes
        for parameter in param_group["params"]:
            kept = [value for value in state.get(parameter, {}).values() if isinstance(value, Tensor)]
            needed += sum(_PER_TENSOR + value.nbytes for value in kept) or _MOMENTS * (_PER_TENSOR + parameter.nbytes)
    return needed


def _size_on_disk(path: Path) -> int:
    files = [path] if path.is_file() else [Path(root, name) for root, _, names in os.walk(path) for name in names]
    return sum(file.stat().st_size for file in files)
