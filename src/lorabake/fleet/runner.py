"""Runs a queue: one job after the other, each in a process of its own, so that no job can harm the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lorabake.base.errors import UserError
from lorabake.base.events import Event, Events
from lorabake.base.lock import exclusive, holder
from lorabake.fleet.queue import TO_DO, Job, Queue

_STOPPED = 130
"""Exit code of a job that was asked to stop."""
_LOOK_EVERY = 0.1
"""Seconds between looks at a job's log."""


def run_queue(queue: Queue, events: Events, stop: Callable[[], bool] = lambda: False) -> dict[str, int]:
    """Run all that is to be done, what is added meanwhile included; returns how many jobs ended how.

    A job that another start left running is waited for. A job whose process dies is failed, and the next one begins.

    Args:
        queue: the queue.
        events: told of ``job_started`` and ``job_ended``, and in between of all of the job's own events, each with ``job``.
        stop: asked all the time; True lets the running job end after its step, with a save, and begins no other.

    Raises:
        UserError: somebody else runs this queue.
        KeyboardInterrupt: was raised by ``stop`` or a signal; the running job was killed, and continues where it had saved.
    """
    counts: dict[str, int] = {}
    met: set[int] = set()
    if (process := holder(queue.lock)) is not None:
        raise UserError(
            f"The queue {queue.folder} is being run already, by process {process}. What is added to it will be run there."
        )
    with exclusive(queue.lock):
        while not stop() and (job := _next(queue, met)):
            met.add(job.id)
            state = _attend(queue, job, events, stop)
            counts[state] = counts.get(state, 0) + 1
    return counts


def _next(queue: Queue, met: set[int]) -> Job | None:
    """A job that runs already, or else the first that is to be done and was not begun in this sitting."""
    jobs = [(job, queue.state(job)) for job in queue.jobs()]
    running = [job for job, state in jobs if state in ("running", "stopping")]
    waiting = [job for job, state in jobs if state == "waiting" or (state in TO_DO and job.id not in met)]
    return next(iter([*running, *waiting]), None)


def _attend(queue: Queue, job: Job, events: Events, stop: Callable[[], bool]) -> str:
    """Start a job, or find it running, and stay until it has ended; returns what it is then."""
    found = queue.process_of(job) is not None
    log = _Follower(queue.log(job))
    process = None if found else _start(queue, job)
    events.emit("job_started", job=job.id, name=job.name, into=str(job.into), found_running=found)
    asked = False
    try:
        while queue.process_of(job) is not None if process is None else process.poll() is None:
            for event in log.news():
                events.emit(**{**event, "job": job.id})
            if stop() and not asked:
                asked = True
                queue.ask_to_stop(job, "stop")
            time.sleep(_LOOK_EVERY)
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    for event in log.news():
        events.emit(**{**event, "job": job.id})
    job = queue.job(job.id)
    if process is not None and queue.state(job) in TO_DO and process.returncode != _STOPPED:
        queue.end(job, "failed", _died(process.returncode))
        job = queue.job(job.id)
    state = queue.state(job)
    events.emit("job_ended", job=job.id, name=job.name, state=state, message=job.message)
    return state


def _start(queue: Queue, job: Job) -> subprocess.Popen[bytes]:
    """The job's process, in a session of its own: Ctrl-C reaches us alone, and the job lives on should we be killed."""
    queue.log(job).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lorabake", "queue", "work", str(job.id), "--queue", str(queue.folder)]
    with queue.log(job).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            env={**os.environ, "PYTHONUTF8": "1"},
        )


def _died(code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    return f"Its process {how} without a word. What it had saved is intact: `lorabake queue retry` continues it."


class _Follower:
    """Reads what is added to a log, from where it ended before."""

    def __init__(self, path: Path) -> None:
        self._path, self._rest = path, b""
        self._at = path.stat().st_size if path.exists() else 0

    def news(self) -> list[Event]:
        """Whole lines since the last call: events, and other text as events of kind ``said``."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except OSError:
            return []
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [event_of(line) for line in lines if line.strip()]


def event_of(line: bytes) -> Event:
    """A line of a job's log as an event; text that is none is ``said``."""
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if isinstance(event, dict) and isinstance(event.get("kind"), str):
        return event
    return {"kind": "said", "text": line.decode(errors="replace").rstrip()}
