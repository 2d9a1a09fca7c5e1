"""What TensorBoard shows of a run: written beside it while it trains, or from its log afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from lorabake.base.errors import UserError
from lorabake.base.events import Event
from lorabake.base.runs import Run
from lorabake.formats.tfevents import EventFile, Picture
from lorabake.train.samples import sample_name

_KEPT = 0.98
"""Share of the smoothed loss that each step leaves."""


class TensorBoard:
    """A listener that writes ``tb/`` in a run folder: a file for every sitting. It never ends a run: where it cannot write, it gives up."""

    def __init__(
        self,
        run: Run,
        clock: Callable[[], float] = time.time,
        refused: Callable[[str], None] = lambda why: None,
        name: str = "",
    ) -> None:
        """``refused`` is told once why nothing can be written; ``name`` ends the file's name, if it shall not be one of its own."""
        self._run, self._clock, self._refused, self._name = run, clock, refused, name
        self._file: EventFile | None = None
        self._loss: float | None = None
        self._last: float | None = None

    @property
    def folder(self) -> Path:
        """Where it writes; ``tensorboard --logdir`` takes it, or the folder of all runs."""
        return self._run.folder / "tb"

    def __call__(self, event: Event) -> None:
        """Write what an event has to show."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is None or (self._file is None and event["kind"] != "started"):
            return
        try:
            handler(event)
        except OSError as error:
            self._file = None
            self._refused(f"{self.folder} is not written any more: {error.strerror or error}.")

    def _on_started(self, event: Event) -> None:
        now = self._clock()
        name = self._name or f"{int(now):010d}.lorabake.{os.getpid()}.{event['step']:08d}"
        self._file = EventFile(self.folder / f"events.out.tfevents.{name}", now, event["step"] + 1)

    def _on_step(self, event: Event) -> None:
        assert self._file
        now, loss = self._clock(), event["loss"]
        self._loss = loss if self._loss is None else _KEPT * self._loss + (1 - _KEPT) * loss
        numbers = {"loss": loss, "loss/smoothed": self._loss, "grad_norm": event["grad_norm"]}
        numbers |= {f"lr/{group}": rate for group, rate in event["lr"].items()}
        if self._last is not None and now > self._last:
            numbers["images_per_second"] = event["images"] / (now - self._last)
        self._last = now
        self._file.add(event["step"], now, numbers)

    def _on_samples(self, event: Event) -> None:
        assert self._file
        pictures = {}
        for index in range(event["count"]):
            path = self._run.samples / sample_name(event["step"], index)
            if path.exists():
                with Image.open(path) as image:
                    pictures[f"samples/{index:02d}"] = Picture(path.read_bytes(), image.width, image.height)
        if pictures:
            self._file.add(event["step"], self._clock(), {}, pictures)
        self._last = None  # the time that drawing takes is not the next step's


def write_from_log(run: Run, on_note: Callable[[str], None] = lambda note: None) -> Path:
    """Write ``tb/`` from a run's log, which knows no times; returns the folder. What was written while training goes before it.

    ``on_note`` is told of lines of the log that are damaged, and so are not shown.

    Raises:
        UserError: this is not a run, or nothing can be written.
    """
    run.read_manifest()
    if damage := run.damage():
        on_note(damage)
    events = run.read_events()
    at = run.events.stat().st_mtime if events else time.time()
    told: list[str] = []
    board = TensorBoard(run, lambda: at, told.append, name=f"{0:010d}.lorabake.log")
    board({"kind": "started", "step": 0})
    for event in events:
        board(event)
    if told:
        raise UserError(told[0])
    return board.folder
