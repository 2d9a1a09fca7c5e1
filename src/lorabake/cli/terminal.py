"""What people see while a command works: progress with time left, and JSON for programs."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from lorabake.base.events import Event

if TYPE_CHECKING:
    from rich.progress import TaskID


SECONDS_BETWEEN_LINES = 30.0
"""How often progress is told where it cannot be shown as a moving line."""


def show_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def json_lines(event: Event) -> None:
    """A listener that prints each event as a line of JSON."""
    print(json.dumps(event, ensure_ascii=False), flush=True)


@contextlib.contextmanager
def interruptible(on_first: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a question: the yielded function says whether to stop. The second one interrupts at once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        on_first()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TrainingProgress:
    """A listener that draws a live line for a training run: steps, loss, pictures per second, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=sys.stderr)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._seen: list[tuple[float, int]] = []
        self._loss = 0.0
        self._told = self._began = time.monotonic()
        self._began_at = 0

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line above the moving one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, event: Event) -> None:
        """Show an event."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler:
            handler(event)

    def _on_note(self, event: Event) -> None:
        self.say(f"note: {event['text']}")

    def _on_pictures(self, event: Event) -> None:
        self.say(f"pictures: {event['text']}")

    def _on_encoding(self, event: Event) -> None:
        self._show("encoding pictures", event["done"], event["total"])

    def _on_encoding_text(self, event: Event) -> None:
        self._show("encoding captions", event["done"], event["total"])

    def _on_finding_faces(self, event: Event) -> None:
        self._show("looking for faces", event["done"], event["total"])

    def _on_started(self, event: Event) -> None:
        self._total = event["total_steps"]
        if event["step"]:
            self.say(f"Continuing {event['folder']} at step {event['step']} of {self._total}.")
        self._restart("training", event["step"], self._total)

    def _on_sitting(self, event: Event) -> None:
        for name, (before, now) in event["changes"].items():
            self.say(f"from step {event['step']} on: {name} {now}" + (f" (was {before})" if before is not None else ""))

    def _on_samples_failed(self, event: Event) -> None:
        self.say(f"note: no sample pictures at step {event['step']}: {event['reason']}")

    def _on_latents_not_kept(self, event: Event) -> None:
        self.say(f"note: encoded pictures are kept for this run only. {event['reason']}")

    def _on_text_not_kept(self, event: Event) -> None:
        self.say(f"note: encoded captions are kept for this run only. {event['reason']}")

    def _on_faces_not_kept(self, event: Event) -> None:
        self.say(f"note: where faces are is kept for this run only. {event['reason']}")

    def _on_not_recorded(self, event: Event) -> None:
        self.say(f"note: steps are launched operation by operation, which is slower on a GPU: {event['reason']}")

    def _on_already_finished(self, event: Event) -> None:
        self.say(
            f"{event['folder']} is already finished; nothing was trained. Give a longer train.length to go on, or another folder with --into."
        )

    def _on_step(self, event: Event) -> None:
        now = time.monotonic()
        self._seen = [*self._seen[-50:], (now, event["images"])]
        self._loss = event["loss"] if not self._loss else 0.98 * self._loss + 0.02 * event["loss"]
        span = now - self._seen[0][0]
        rate = sum(images for _, images in self._seen[1:]) / span if span else 0.0
        self._show(f"epoch {event['epoch']}", event["step"], self._total, f"loss {self._loss:.4f}  {rate:.1f} images/s")

    def _on_validation(self, event: Event) -> None:
        reach = event["interval"] and f", 95 % between {event['interval'][0]:+.4f} and {event['interval'][1]:+.4f}"
        against = f"{event['change']:+.4f} against the base{reach or ''}" if event["step"] else "the base's own"
        average = f" with average {event['ema']:g}" if "ema" in event else ""
        self.say(f"held out at step {event['step']}{average}: loss {event['loss']:.4f} ({against})")

    def _on_lowest_held_out(self, event: Event) -> None:
        told = f"{event['loss']:.4f}, {event['change']:+.4f} against the base"
        self.say(f"lowest held-out loss of the checkpoints: {event['file']} ({told})")

    def _on_picture_losses(self, event: Event) -> None:
        hard = [f"{row['picture']} ({row['relative']:.1f} times the usual)" for row in event["hard"]]
        self.say(f"loss of every picture: {event['file']}" + (f". Hard to learn: {', '.join(hard)}" if hard else ""))

    def _on_checkpoint(self, event: Event) -> None:
        self.say(f"saved {event['file']}")

    def _on_dropped(self, event: Event) -> None:
        self.say(f"deleted {event['file']}: only the newest are kept")

    def _restart(self, description: str, done: int, total: int) -> TaskID:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=done, facts="")
        self._began, self._began_at = time.monotonic(), done
        return self._task

    def _show(self, description: str, done: int, total: int, facts: str = "") -> None:
        task = self._restart(description, done, total) if self._task is None else self._task
        self._progress.update(task, description=description, completed=done, total=total, facts=facts)
        if not self.console.is_terminal:
            self._tell_log(f"{description}: {done} of {total}  {facts}".rstrip(), done, total)

    def _tell_log(self, text: str, done: int, total: int) -> None:
        """Where nothing can move (a file, a service's log): a line now and then."""
        now = time.monotonic()
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        left = (total - done) * (now - self._began) / max(1, done - self._began_at)
        self.say(f"{text}  {left / 60:.0f} min left")


@contextlib.contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields a function to tell (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
