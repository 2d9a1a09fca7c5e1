"""What may change between the sittings of a run: what it means for what was trained so far, and what may not change at all.

A recipe that differs from the one a run was started with is never taken silently. Every difference is named, with its old and new
value; those that the run cannot go on with are refused with the reason, the others must be agreed to, and are put down in ``run.json``
and in the event log as a new sitting.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

import lorabake
from lorabake.base.cards import IfChanged, find
from lorabake.base.errors import UserError
from lorabake.base.files import sha256_file
from lorabake.base.header import read_header
from lorabake.base.runs import Run
from lorabake.base.units import Stretch
from lorabake.optimizers.schedules import ScheduleCard
from lorabake.protocols.adapter import Graft
from lorabake.recipe import Checked, Choice

FREE = (
    "data.folder",
    "data.regularisation",
    "validation.folder",
    "model.base",
    "model.vae",
    "model.text_encoders",
    "adapter.start_from",
    "save.",
    "sample.",
    "output.",
)
"""Settings that may change silently, because no weight depends on them. Files and folders may be moved: what is in them is in the lock."""

# Whole sections, what stands in them whichever part is chosen, and what is in the lock. Settings of parts are marked themselves: see IfChanged.
_SHOWN_TWICE = "an epoch would show some pictures twice and others never"
_REFUSED = {
    "lorabake": "another version may compute other numbers",
    "torch": "another version of PyTorch may compute other numbers",
    "machine": "another kind of machine computes other numbers",
    "base": "what was learned so far belongs to the other model",
    "start_from": "the run began with another file",
    "model.prediction": "what was learned so far answers another question",
    "adapter.name": "the weights so far are those of another network type",
    "optimizer.name": "the other optimizer's memory means nothing to it",
    "optimizer.block_lr": "the weights so far lie in other groups",
    "optimizer.lora_plus_ratio": "the weights so far lie in other groups",
    "train.ema": "the averages so far are others",
    "train.seed": _SHOWN_TWICE,
}
_MEANING = {
    "adapter.": "what was learned so far may get another meaning",
    "objective.": "losses from here on do not compare with those so far",
    "model.": "captions were read in another way so far",
    "model.quantize": "the base answered a little differently so far",
    "dataset": "what was learned so far came of the old ones",
    "train.length": "the learning rate follows the schedule over the new length from here on",
}
_MAKE_EPOCHS = ("train.batch_size", "train.gradient_accumulation", "data.buckets.", "dataset")


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that is not what it was."""

    name: str
    before: Any
    now: Any
    meaning: str = ""
    """What it does to what was trained so far. Empty: it only counts from here on."""
    refused: str = ""
    """Why the run cannot go on with it. Empty: it can."""

    def __str__(self) -> str:
        values = str(self.now) if self.name == "dataset" else f"{self.before} there, {self.now} now"
        return f"{self.name}: {values}" + (f" ({why})" if (why := self.refused or self.meaning) else "")


Agree = Callable[[Sequence[Change]], bool]
"""Asked about changes that a run can go on with; True goes on."""


def lock_of(checked: Checked) -> dict[str, str]:
    """What must be the same for a run to continue to the same bytes."""
    began = checked.recipe.start.start_from
    return {
        "lorabake": lorabake.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "dataset": hashlib.sha256(repr(pictures_of(checked)).encode()).hexdigest(),
        "base": checked.facts.digest,
        **({"start_from": read_header(Path(began)).payload_sha256} if began else {}),
    }


def pictures_of(checked: Checked) -> dict[str, str]:
    """A fingerprint of every picture with its caption and repeats, and its mask where masks are used, by name."""
    own, *regularisation = checked.pictures
    several = bool(checked.dataset.more_paths)
    kinds = [("", own, several), *(("regularisation: ", pictures, True) for pictures in regularisation)]
    if checked.held_out:
        kinds.append(("held out: ", checked.held_out, several or checked.recipe.validation.folder is not None))
    facts: dict[str, tuple[Any, ...]] = {}
    folders: dict[str, list[str]] = {}
    for kind, pictures, labelled in kinds:
        masks = pictures.masks or [None] * len(pictures.samples)
        for sample, mask_HW in zip(pictures.samples, masks, strict=True):  # several where it is seen at several sizes
            name = f"{kind}{_without_label(sample.name, folders.setdefault(kind, [])) if labelled else sample.name}"
            known = facts.setdefault(name, (sample.sha256, sample.caption, sample.repeats))
            if mask_HW is not None:
                mask: tuple[Any, ...] = (mask_HW.shape, hashlib.sha256(mask_HW.tobytes()).hexdigest())
                if checked.recipe.data.augment.varies and sample.mask and not kind.startswith("held"):
                    mask = (sha256_file(sample.mask),)  # other crops show other parts of it
                facts[name] = known + mask
    return {name: hashlib.sha256(repr(of_picture).encode()).hexdigest()[:32] for name, of_picture in facts.items()}


def _without_label(name: str, folders: list[str]) -> str:
    """A picture's name without that of the folder it was given in, which may be renamed: with its number instead, from the second on.

    Args:
        name: as the dataset has it.
        folders: those that were met before, in their order; added to.
    """
    label, _, inside = name.partition("/")
    if label not in folders:
        folders.append(label)
    number = folders.index(label) + 1
    return inside if number == 1 else f"folder {number}: {inside}"


def shapes_of(graft: Graft) -> str:
    """Fingerprint (hex) of the names and shapes of all trained weights."""
    shapes = {part: [(name, tuple(w.shape)) for name, w in named.items()] for part, named in graft.parameters().items()}
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:32]


def changes_of(run: Run, checked: Checked, done: int) -> list[Change]:
    """Everything in which a recipe, its dataset, its base or this machine differ from what ``run`` was started with.

    Args:
        run: an existing run.
        checked: what it shall go on with.
        done: steps that are done.
    """
    known: Mapping[str, Any] = run.read_manifest()
    lock, was = lock_of(checked), known["lock"]
    found = [
        _judged(Change(name, before, now), checked, done)
        for name, now, before in checked.recipe.differences(known["recipe"])
        if not name.startswith(FREE)
    ]
    for name in lock | was:
        if lock.get(name) != was.get(name):
            change = _dataset_change(run, checked) if name == "dataset" else Change(name, was.get(name), lock.get(name))
            found.append(_judged(change, checked, done))
    return _with_whole_epochs(found, known.get("steps_per_epoch"), checked.length.steps_per_epoch)


def check_agreed(run: Run, changes: Sequence[Change], agree: Agree) -> None:
    """Refuse what cannot be continued with, and ask about the rest.

    Raises:
        UserError: a change is refused, or is not agreed to; all of them are named.
    """
    if not changes:
        return
    lines = "\n".join(f"  {change}" for change in changes)
    elsewhere = "Give another folder with --into, or the recipe it was started with."
    if refused := [change for change in changes if change.refused]:
        names = ", ".join(change.name for change in refused)
        raise UserError(
            f"{run.folder} holds another run, which cannot be continued with this:\n{lines}\n"
            f"It cannot go on with another {names}. {elsewhere}"
        )
    if not agree(changes):
        raise UserError(
            f"{run.folder} holds another run, or this one with other settings:\n{lines}\n"
            f"To go on with them from where it is, add --continue-changed. {elsewhere}"
        )


def check_shapes(run: Run, changes: Sequence[Change], graft: Graft) -> None:
    """Once the adapter is there: its weights must be those that the run has.

    Raises:
        UserError: they have other names or shapes; the settings that may have done it are named.
    """
    known = run.read_manifest().get("weights")
    if known is not None and known != shapes_of(graft):
        causes = [str(change) for change in changes if change.name.startswith(("adapter.", "optimizer."))]
        raise UserError(
            f"{run.folder} cannot be continued with this: the adapter's weights would have other names or shapes.\n  "
            + "\n  ".join(causes or [str(change) for change in changes])
        )


def sitting(step: int, changes: Sequence[Change], **more: Any) -> dict[str, Any]:
    """What is put down about going on from ``step`` with ``changes``."""
    return {"step": step, **more, "changes": {change.name: [change.before, change.now] for change in changes}}


def _judged(change: Change, checked: Checked, done: int) -> Change:
    """The same with what it means."""
    marked = next((mark for mark in checked.recipe.marks(change.name) if isinstance(mark, IfChanged)), IfChanged())
    refused = marked.refused or _of_longest_prefix(_REFUSED, change.name)
    total = checked.length.steps
    if change.name == "train.length" and total <= done:
        refused = f"{done} steps are done already"
    elif change.name in ("optimizer.lr", "optimizer.text_encoder_lr") and not (change.before and change.now):
        refused = (
            "what was not trained so far has no memory to go on with" if change.now else "its weights are in the run"
        )
    meaning = marked.meaning or _of_longest_prefix(_MEANING, change.name)
    if change.name == "train.length" and not _spans(checked.recipe.schedule):
        meaning = ""
    return replace(change, refused=change.refused or refused, meaning=meaning)


def _spans(schedule: Choice) -> bool:
    """Whether the rate at a step depends on how long the run is."""
    shares = (value for value in dict(schedule.settings).values() if isinstance(value, Stretch) and value.count is None)
    return cast(ScheduleCard, find("schedule", schedule.name)).spans or any(shares)


def _of_longest_prefix(table: Mapping[str, str], name: str) -> str:
    fitting = [key for key in table if name == key or (key.endswith(".") and name.startswith(key))]
    return table[max(fitting, key=len)] if fitting else ""


def _with_whole_epochs(changes: list[Change], before: int | None, now: int) -> list[Change]:
    """Steps count epochs; where an epoch would have another number of them, what makes it so is refused."""
    if before is None or before == now:
        return changes
    why = f"an epoch would have {now} steps instead of {before}"
    return [
        replace(change, refused=change.refused or why) if change.name.startswith(_MAKE_EPOCHS) else change
        for change in changes
    ] or [Change("steps per epoch", before, now, refused=why)]


def _dataset_change(run: Run, checked: Checked) -> Change:
    """The pictures that differ, in place of hashes."""
    then, now = run.read_pictures(), pictures_of(checked)
    groups = {
        "new": sorted(now.keys() - then.keys()),
        "gone": sorted(then.keys() - now.keys()),
        "changed": sorted(picture for picture in now.keys() & then.keys() if now[picture] != then[picture]),
    }
    told = [
        f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
        for what, names in groups.items()
        if names
    ]
    reordered = not groups["changed"] or groups["new"] or groups["gone"]
    told_all = "; ".join(told) or "the order of its pictures differs"
    return Change("dataset", None, told_all, refused=_SHOWN_TWICE if reordered else "")
