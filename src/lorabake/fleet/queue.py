"""A queue of trainings, kept in a folder: what was asked for survives every crash, and what is true is never a stored flag.

QUEUE/
  jobs/000001.json       one training: its recipe as it was queued, where it goes, and how it ended once it has
  logs/000001.jsonl      every event of it, a line each, and whatever else its process wrote
  locks/000001.lock      held by the job's process while it lives; the operating system lets go of it, however the process ends
  locks/000001.stop      asks the job to end after its step: "cancel" for good, "stop" until the queue is started again
  .lock                  held by whoever runs the queue

A job runs while its lock is held: after ``kill -9`` or a power cut nothing is left that says otherwise. A job that was begun and has
no ending is continued by the next start, where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorabake.base.errors import UserError
from lorabake.base.files import write_atomic, write_json
from lorabake.base.lock import exclusive, holder
from lorabake.base.places import expanded

State = Literal["waiting", "running", "stopping", "interrupted", "done", "failed", "cancelled", "damaged"]
TO_DO: tuple[State, ...] = ("waiting", "interrupted")
"""States of jobs that a start begins or continues."""
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Job:
    """One training in the queue."""

    id: int
    name: str
    source: str
    """Recipe file or dataset folder it was queued from; only to be shown."""
    into: Path
    """Run folder."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Plain values by section, as they were when it was queued; paths are absolute."""
    continue_changed: bool = False
    """Go on with a run that is there though settings were changed since."""
    begun: bool = False
    ended: Literal["done", "failed", "cancelled"] | None = None
    message: str = ""
    """Why it failed."""

    def to_dict(self) -> dict[str, Any]:
        """As in its file."""
        return {name: getattr(self, name) for name in self.__slots__} | {"into": str(self.into)}


class Queue:
    """The queue in a folder; every call looks at the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = expanded(folder).absolute()

    @property
    def lock(self) -> Path:
        """Held by whoever runs the queue."""
        return self.folder / ".lock"

    def add(self, name: str, source: str, into: Path, recipe: Mapping[str, Any], continue_changed: bool = False) -> Job:
        """Put a training at the end.

        Raises:
            UserError: the folder cannot be written to.
        """
        with self._editing():
            taken = [int(path.stem) for folder in ("jobs", "logs") for path in self._numbered(folder)]
            job = Job(max(taken, default=0) + 1, name, source, expanded(into).absolute(), recipe, continue_changed)
            write_json(self._file("jobs", job.id), job.to_dict())
        return job

    def jobs(self) -> list[Job]:
        """All jobs in their order. One whose file is damaged is named so, and stands in nobody's way."""
        return [self._read(int(path.stem)) for path in self._numbered("jobs")]

    def job(self, number: int) -> Job:
        """One job.

        Raises:
            UserError: there is none with this number.
        """
        if not self._file("jobs", number).exists():
            known = ", ".join(str(job.id) for job in self.jobs()) or "none"
            raise UserError(f"There is no job {number} in {self.folder}. Jobs there: {known}.")
        return self._read(number)

    def state(self, job: Job) -> State:
        """What is true of a job now."""
        if self.process_of(job) is not None:
            return "stopping" if self.asked_to_stop(job) else "running"
        if not job.source:
            return "damaged"
        return job.ended or ("interrupted" if job.begun else "waiting")

    def process_of(self, job: Job) -> str | None:
        """Process that runs the job; None if none does."""
        return holder(self.job_lock(job))

    def job_lock(self, job: Job) -> Path:
        """Held by the job's process."""
        return self._file("locks", job.id)

    def log(self, job: Job) -> Path:
        """Its events, a line of JSON each; lines that are no JSON are what else its process wrote."""
        return self._file("logs", job.id)

    def asked_to_stop(self, job: Job) -> str:
        """``"cancel"`` or ``"stop"`` if somebody asked the job to end after its step, else empty."""
        try:
            return self._stop(job).read_text(encoding="utf-8")
        except OSError:
            return ""

    def ask_to_stop(self, job: Job, how: Literal["cancel", "stop"]) -> None:
        """Ask a running job to end after its step, with a save. A cancelled one stays cancelled."""
        with self._editing():
            if self.asked_to_stop(job) != "cancel":
                write_atomic(self._stop(job), how.encode())

    def cancel(self, job: Job) -> State:
        """End a job, or never begin it; returns what it is now.

        Raises:
            UserError: it has ended already.
        """
        if self.state(job) in ENDED:
            raise UserError(f"Job {job.id} has ended already ({self.state(job)}).")
        self.ask_to_stop(job, "cancel")
        if self.process_of(job) is None:
            self.end(job, "cancelled")
        return self.state(self.job(job.id))

    def retry(self, job: Job) -> None:
        """Put a job that failed or was cancelled back to its place; what it had saved is continued.

        Raises:
            UserError: it is running, waiting or done.
        """
        if (state := self.state(job)) not in ("failed", "cancelled"):
            raise UserError(f"Job {job.id} is {state}: only failed and cancelled jobs are tried again.")
        with self._editing():
            self._stop(job).unlink(missing_ok=True)
            self._write(job, ended=None, message="", begun=False)

    def remove(self, job: Job) -> None:
        """Forget a job and its log. Its run folder stays.

        Raises:
            UserError: it is running.
        """
        if (process := self.process_of(job)) is not None:
            raise UserError(f"Job {job.id} is running (process {process}). Cancel it first.")
        with self._editing():
            for path in (self._file("jobs", job.id), self.log(job), self._stop(job), self.job_lock(job)):
                path.unlink(missing_ok=True)

    def begin(self, job: Job) -> Job | None:
        """What the job's process says when it holds the job's lock: the job, or None if it is no longer wanted."""
        with self._editing():
            asked = self.asked_to_stop(job)
            self._stop(job).unlink(missing_ok=True)
            job = self.job(job.id)
            if job.ended or asked == "cancel":
                self._write(job, ended=job.ended or "cancelled")
                return None
            return self._write(job, begun=True)

    def end(self, job: Job, how: Literal["done", "failed", "cancelled"], message: str = "") -> None:
        """Put down how a job ended, unless it has ended before: what happened first stays true."""
        with self._editing():
            self._stop(job).unlink(missing_ok=True)
            if self._file("jobs", job.id).exists() and not (known := self.job(job.id)).ended:
                self._write(known, ended=how, message=message)

    def progress(self, job: Job) -> dict[str, Any]:
        """``step``, ``total_steps`` and ``loss`` as its log has them last; empty before the first step."""
        try:
            data = self.log(job).read_bytes()
        except OSError:
            return {}
        found: dict[str, Any] = {}
        for kind, names in (("started", ("step", "total_steps")), ("step", ("step", "loss"))):
            at = data.rfind(b'{"kind": "%s"' % kind.encode())
            line = data[at:].split(b"\n", 1)[0] if at >= 0 else b""
            try:
                event = json.loads(line)
            except ValueError:
                continue
            found.update({name: event[name] for name in names if name in event})
        return found

    def _write(self, job: Job, **changed: Any) -> Job:
        values = job.to_dict() | changed
        write_json(self._file("jobs", job.id), values)
        return _job(values)

    def _read(self, number: int) -> Job:
        path = self._file("jobs", number)
        try:
            return _job(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return Job(number, f"{path.name} cannot be read", "", Path())

    def _editing(self) -> Any:
        return exclusive(self.folder / "locks" / "edit.lock", wait=True)

    def _stop(self, job: Job) -> Path:
        return self._file("locks", job.id).with_suffix(".stop")

    def _file(self, folder: str, number: int) -> Path:
        return self.folder / folder / f"{number:06d}{_SUFFIXES[folder]}"

    def _numbered(self, folder: str) -> Iterator[Path]:
        found = (self.folder / folder).glob(f"*{_SUFFIXES[folder]}")
        yield from sorted((path for path in found if path.stem.isdigit()), key=lambda path: int(path.stem))


_SUFFIXES = {"jobs": ".json", "logs": ".jsonl", "locks": ".lock"}


def _job(values: Mapping[str, Any]) -> Job:
    """A job from its file; what a later version may have added is left alone."""
    known = {name: values[name] for name in Job.__slots__ if name in values}
    return Job(**{**known, "id": int(values["id"]), "into": Path(values["into"])})
