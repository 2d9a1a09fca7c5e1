"""A run on disk: frozen recipe, lock of versions, events, checkpoints, samples, resume state.

runs/mira/
  recipe.toml            what was asked for, with every value filled in
  run.json               versions and fingerprints: what must be equal for a run to continue
  pictures.json          a fingerprint of every picture, to say which of them changed
  events.jsonl           everything that happened, by step
  losses.csv             the loss of every picture, once finished
  checkpoints/           one file (or model folder) per saved epoch
  samples/               pictures drawn at checkpoints
  state/                 what a killed run continues from
  states/                states of saved epochs, to go back to, where the recipe asks for them
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError
from lorabake.base.events import Event, EventLog

_ASK_OTHERWISE = ("objective.", "validation.", "dataset", "data.", "model.")
"""Settings (and the pictures) with which held-out losses are others, whatever was learnt."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The frozen recipe."""
        return self.folder / "recipe.toml"

    @property
    def manifest(self) -> Path:
        """Versions and fingerprints."""
        return self.folder / "run.json"

    @property
    def pictures(self) -> Path:
        """Fingerprints of the dataset's pictures, by name."""
        return self.folder / "pictures.json"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.folder / "events.jsonl"

    @property
    def losses(self) -> Path:
        """The loss of every picture, once the run is finished."""
        return self.folder / "losses.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of sample pictures."""
        return self.folder / "samples"

    @property
    def state(self) -> Path:
        """Folder of the resume state."""
        return self.folder / "state"

    @property
    def states(self) -> Path:
        """Folder of states kept beside checkpoints."""
        return self.folder / "states"

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.manifest.exists()

    def read_manifest(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            UserError: this is not a run folder.
        """
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.folder} is not a run folder: run.json cannot be read ({error}).") from error
        if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("recipe", "lock")):
            raise UserError(f"{self.folder} is not a run folder: run.json is not what a run writes, or is damaged.")
        return found

    def read_pictures(self) -> dict[str, str]:
        """``pictures.json``; empty where it is missing or broken: it only serves to say more."""
        try:
            return dict(json.loads(self.pictures.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}

    def read_events(self, *kinds: str) -> list[Event]:
        """Everything that happened so far, or what is of ``kinds``, which is quicker where steps are not asked for. Damaged lines are left out."""
        return EventLog(self.events).read(*kinds)

    def damage(self) -> str:
        """What people are told of damaged lines in the event log; empty where there are none."""
        if not (numbers := EventLog(self.events).damaged()):
            return ""
        named = f"{', '.join(map(str, numbers[:5]))}{f' and {len(numbers) - 5} more' * (len(numbers) > 5)}"
        lines = f"line{'s' * (len(numbers) > 1)} {named}"
        return (
            f"{self.events} is damaged: {lines} of it did not stay as written, and what was told there is left out, be it a loss, a sample or "
            "a checkpoint's name. No weight depends on it."
        )

    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return bool(self.read_events("finished"))

    def checkpoint_paths(self, last: int | None = None) -> list[Path]:
        """Checkpoints that were told of as saved and are still there, oldest first; a step's running averages come before its own.

        A file or folder that a crash left half written was never told of.

        Args:
            last: only those of as many steps, the newest that have any.
        """
        events = self.checkpoint_events()
        newest = sorted({event["step"] for event in events})[-(last or 0) :]
        return [self.folder / event["file"] for event in events if event["step"] in newest]

    def lowest_held_out(self) -> Event | None:
        """The checkpoint, of those that are still there, whose held-out loss is the lowest: its event, with ``loss`` and ``change`` of that.

        None where no checkpoint's was asked. What was asked in another way, before settings were changed, is not compared.
        """
        asked: dict[tuple[int, float | None], Event] = {}
        for event in self.read_events("validation", "sitting"):
            if event["kind"] == "validation":
                asked[event["step"], event.get("ema")] = event
            elif any(name.startswith(_ASK_OTHERWISE) for name in event["changes"]):
                asked.clear()
        told = [(asked.get((event["step"], event.get("ema"))), event) for event in self.checkpoint_events()]
        found = [{**event, "loss": answer["loss"], "change": answer["change"]} for answer, event in told if answer]
        return min(found, key=lambda event: event["loss"], default=None)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint that was told of last, be it still there or not; None before the first."""
        told = self._told_checkpoints()
        return self.folder / told[-1]["file"] if told else None

    def checkpoint_events(self) -> list[Event]:
        """The events that told of them; of a name that was written twice, the later one."""
        return [event for event in self._told_checkpoints() if (self.folder / event["file"]).exists()]

    def _told_checkpoints(self) -> list[Event]:
        told: dict[str, Event] = {}
        for event in self.read_events("checkpoint"):
            told.pop(event["file"], None)
            told[event["file"]] = event
        return list(told.values())
