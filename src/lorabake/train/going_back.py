"""Going back: a new run begins from a state that another run kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorabake.base.errors import UserError
from lorabake.base.places import expanded
from lorabake.base.runs import Run
from lorabake.train.state import newest_whole, states_of, step_of


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a new run begins."""

    run: Run
    """The run that kept the state."""
    state: Path

    @property
    def step(self) -> int:
        """Steps that were done."""
        return step_of(self.state)

    @property
    def digest(self) -> str:
        """Which state it is (hex)."""
        return self.state.stem.partition("-")[2]


def find_origin(given: Path) -> Origin:
    """The state that ``given`` means: a run folder's newest, the one kept beside a checkpoint, or a state's own file.

    Raises:
        UserError: it means none, no state was kept for it, or the state is damaged.
    """
    given = expanded(given).absolute()
    run = Run(given) if (given / "run.json").exists() else Run(given.parent.parent)
    if not given.exists() or not run.exists():
        raise UserError(
            f"'{given}' is no state to begin from. Give a checkpoint of a run that keeps states (save.keep_state), or a run folder."
        )
    if run.folder == given:
        found = sorted([*states_of(run.states), *states_of(run.state)], key=step_of)
    elif given.parent in (run.state, run.states):
        found = [given]
    else:
        told = [event["step"] for event in run.checkpoint_events() if run.folder / event["file"] == given]
        found = [state for step in told for folder in (run.state, run.states) for state in states_of(folder, step)]
    if not found:
        steps = sorted({step_of(state) for folder in (run.states, run.state) for state in states_of(folder)})
        kept = f"There are states of steps {', '.join(map(str, steps))}." if steps else "The run has no states."
        raise UserError(
            f"No state was kept for {given}: set save.keep_state before training. {kept} {run.damage()}".rstrip()
        )
    whole, _ = newest_whole(found)
    if whole is None:
        raise UserError(
            f"{found[-1]} is damaged: it has other bytes than it was written with. Begin from another state."
        )
    return Origin(run, whole)
