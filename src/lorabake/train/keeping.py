"""Which checkpoints stay: the newest of those that the run wrote, as it wrote them. What anybody else put there is never touched."""

from __future__ import annotations

from pathlib import Path

from lorabake.base.events import Events
from lorabake.base.files import quick_digest, remove, sha256_file
from lorabake.base.runs import Run
from lorabake.train.state import states_of


def fingerprint(checkpoint: Path) -> str:
    """Tells whether a checkpoint, a file or a folder, is still what was written, whatever its name is (hex)."""
    if checkpoint.is_file():
        return sha256_file(checkpoint)
    return quick_digest((path.name, path) for path in sorted(checkpoint.rglob("*")) if path.is_file())


def drop_old(run: Run, keep: int | None, events: Events) -> None:
    """Delete the checkpoints of all but the newest ``keep`` steps that have any, with the states kept for them; None keeps all.

    Checkpoints whose bytes are no longer those that were written stay, and count for nothing.

    Raises:
        UserError: one cannot be deleted.
    """
    if keep is None:
        return
    told = run.checkpoint_events()
    newest = sorted({event["step"] for event in told})[-keep:]  # a step may have files of averages too
    for event in (event for event in told if event["step"] not in newest):
        path = run.folder / event["file"]
        if fingerprint(path) != event.get("digest"):
            continue
        for state in states_of(run.states, event["step"]):
            remove(state)
        remove(path)  # last: while it is there, this is done again
        events.emit("dropped", step=event["step"], file=event["file"])
