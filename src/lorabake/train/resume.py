"""Where a call of training begins: a new run, the run that is in the folder, or a state of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError
from lorabake.base.events import Events
from lorabake.base.files import remove
from lorabake.base.runs import Run
from lorabake.recipe import Checked
from lorabake.train.bake import Bake
from lorabake.train.continuing import Agree, Change, changes_of, check_agreed, check_shapes, sitting
from lorabake.train.going_back import Origin, find_origin
from lorabake.train.state import Progress, newest_whole, read_state, save_state, states_of, step_of


def _had_states(run: Run) -> bool:
    """A kill may come between the first checkpoint and its state; where there was a second, there was a state."""
    return len({event["step"] for event in run.read_events("checkpoint")}) > 1


def finished_steps(run: Run) -> int:
    """Steps of a run that reached its end."""
    return run.read_events("finished")[-1]["steps"]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a call begins, and with which changes."""

    run: Run
    origin: Origin | None
    changes: Sequence[Change]
    sittings: Sequence[Mapping[str, Any]]
    """Of before, as the manifest has them."""

    @classmethod
    def of(cls, run: Run, checked: Checked, from_state: Path | None, agree: Agree) -> Start:
        """Asks whatever can be asked before the model is loaded."""
        origin = find_origin(from_state) if from_state else None
        if not run.exists():
            if run.events.exists() and run.events.stat().st_size:
                raise UserError(
                    f"{run.folder} holds a run without its run.json, so that nobody can tell which. Put the file back, or give another "
                    "folder with --into."
                )
            changes = changes_of(origin.run, checked, origin.step) if origin else ()
            if origin:
                check_agreed(origin.run, changes, agree)
            return cls(run, origin, changes, ())
        sittings = run.read_manifest().get("sittings", [])
        began = sittings[0].get("from_state") if sittings else None
        if origin and origin.digest != began:
            raise UserError(f"{run.folder} already holds a run that began elsewhere. Give a new folder with --into.")
        newest = states_of(run.state)[-1:]
        done = finished_steps(run) if run.finished() else step_of(newest[0]) if newest else 0
        changes = changes_of(run, checked, done)
        check_agreed(run, changes, agree)
        if changes and run.finished() and checked.length.steps <= done:
            raise UserError(
                f"{run.folder} is finished: after {done} steps nothing is left to train with other settings. Give a longer "
                "train.length, or another folder with --into."
            )
        return cls(run, origin, changes, sittings)

    def go(self, bake: Bake, events: Events) -> tuple[Progress, list[Mapping[str, Any]]]:
        """Put the weights where the call begins; returns how far that is, and all sittings with this one."""
        known = self.run if self.run.exists() else self.origin.run if self.origin else None
        if known:
            check_shapes(known, self.changes, bake.graft)
        kept = (bake.groups, bake.optimizer, bake.beside, bake.averages)
        progress, sittings = Progress(0, 0), list(self.sittings)
        if state := self._newest_state(events):
            progress = read_state(state, *kept)
        elif self.origin:
            progress = Progress(read_state(self.origin.state, *kept).step, 0)
        elif self._began_elsewhere():
            raise UserError(f"The state that {self.run.folder} began from is gone. Give it again with --from-state.")
        if self.origin and not self.run.exists():
            sittings.append(sitting(progress.step, self.changes, from_state=self.origin.digest))
        elif self.changes:
            sittings.append(sitting(progress.step, self.changes))
        return progress, sittings

    def _began_elsewhere(self) -> bool:
        return self.origin is not None or any("from_state" in began for began in self.sittings)

    def _newest_state(self, events: Events) -> Path | None:
        """The run's own newest state that is whole, since its settings were changed last; people are told where there was a newer one.

        Raises:
            UserError: none is left, and beginning again would not lead to where the run was.
        """
        run = self.run
        if not run.exists():
            return None
        since = max((began["step"] for began in self.sittings), default=0)
        states = [path for folder in (run.states, run.state) for path in states_of(folder) if step_of(path) >= since]
        found, damaged = newest_whole(sorted(states, key=step_of))
        if found and damaged:
            text = f"the state of step {step_of(damaged[0])} is damaged: training goes on from step {step_of(found)}."
            events.emit("note", text=f"{run.folder}: {text}")
        elif not found and not self._began_elsewhere() and (damaged or _had_states(run)):
            if self.changes or any(began["changes"] for began in self.sittings):
                raise UserError(
                    f"No whole state is left of {run.folder}, so that it cannot go on with other settings than it began with. Train in another "
                    "folder (--into), or from one of its checkpoints (adapter.start_from)."
                )
            text = "no whole state is left, so that training begins again, on the way to the same bytes."
            events.emit("note", text=f"{run.folder}: {text}")
        for path in damaged:
            if path.parent == run.state:
                remove(path)
        return found

    def keep(self, bake: Bake, progress: Progress) -> None:
        """A new run that begins from another's state gets a copy: it must not need the other one again."""
        if self.run.exists():
            return
        for left in states_of(self.run.state):  # of a start that came to nothing
            remove(left)
        if self.origin:
            save_state(self.run.state, progress, bake.groups, bake.optimizer, bake.beside, bake.averages)
