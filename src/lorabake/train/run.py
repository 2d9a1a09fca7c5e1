"""The verb: start a run in a folder, or continue the one that is there to the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorabake
from lorabake.base.errors import LorabakeError, NotFinite, UserError
from lorabake.base.events import EventLog, Events
from lorabake.base.files import write_atomic, write_json
from lorabake.base.lock import exclusive
from lorabake.base.runs import Run
from lorabake.recipe import Checked
from lorabake.recipe.toml import to_toml
from lorabake.sampling.draw import check as check_prompts
from lorabake.sampling.draw import draw
from lorabake.sampling.infotext import Infotext, save_png, write
from lorabake.sampling.prompts import Prompt, line_to_prompt
from lorabake.train.bake import prepare
from lorabake.train.checkpoint import checkpoint_name, write_checkpoint
from lorabake.train.loop import Bake, run_loop
from lorabake.train.state import Progress, load_state, save_state

_PLACES = ("data.folder", "model.base")
"""Settings that may change between sittings: folders may be moved. What is in them is in the lock."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of :func:`train` ended."""

    run: Run
    steps: int
    total_steps: int
    seconds: float
    """Wall time of this call, loading included."""

    @property
    def finished(self) -> bool:
        """Whether the last step was reached."""
        return self.steps >= self.total_steps


def train(checked: Checked, into: Path, events: Events, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Train, or go on training, in run folder ``into``.

    Args:
        checked: what to train.
        into: the run folder; made if absent. A run of another recipe, dataset or version in it is refused.
        events: told of everything; the run's own log listens too.
        stop: asked after every step; True saves the state and returns.

    Raises:
        UserError: the folder belongs to another run or process, or cannot be written.
        NotFinite: training blew up; checkpoints and state from before are intact.
    """
    started = time.monotonic()
    run = Run(into)
    prompts = [line_to_prompt(line).sized(checked.facts.resolution) for line in checked.recipe.sample.prompts]
    with exclusive(into / ".lock"), _processor(checked.recipe.train.threads or 1):
        lock = _lock(checked)
        if run.exists():
            _same_run(run, checked, lock)
        if run.finished():
            last = next(event for event in reversed(run.read_events()) if event["kind"] == "finished")
            events.emit("already_finished", folder=str(into))
            return Outcome(run, last["steps"], last["steps"], time.monotonic() - started)
        bake = prepare(checked, events, stop)
        check_prompts(bake.model, prompts)
        if not run.exists():  # only now: what cannot be prepared must not stand in the way of the next try
            write_atomic(run.recipe, to_toml(checked.recipe).encode())
            write_json(run.manifest, {"recipe": checked.recipe.to_dict(), "lock": lock})
        progress = load_state(run.state, bake.groups, bake.optimizer) or Progress(0, 0)
        steps = _Session(checked, bake, run, events, stop, prompts).go_on(progress)
    return Outcome(run, steps, bake.total_steps, time.monotonic() - started)


@contextlib.contextmanager
def _processor(threads: int) -> Iterator[None]:
    """The CPU as a run wants it, and as it was afterwards.

    Fading optimizer moments become denormal numbers, which slow a CPU down many times: they are taken for zero.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


class _Session:
    """One sitting of a run: from wherever it is to its end, a stop or a failure."""

    def __init__(
        self,
        checked: Checked,
        bake: Bake,
        run: Run,
        events: Events,
        stop: Callable[[], bool],
        prompts: Sequence[Prompt],
    ) -> None:
        self._checked, self._bake, self._run, self._stop, self._prompts = checked, bake, run, stop, prompts
        self._saves_every = checked.recipe.save.every.steps(bake.steps_per_epoch)
        self._state_due = 0.0
        self._listeners = events
        self._log = Events(EventLog(run.events), lambda event: events.emit(**event))

    def go_on(self, progress: Progress) -> int:
        """Train to the end; returns the steps done."""
        bake, run = self._bake, self._run
        if run.events.exists():
            with run.events.open("r+b") as log:  # what is after the state did not happen: it will, again
                log.truncate(min(progress.log_size, run.events.stat().st_size))
        self._listeners.emit("started", step=progress.step, total_steps=bake.total_steps, steps_per_epoch=bake.steps_per_epoch,
                             weights=sum(group.values.numel() for group in bake.groups), folder=str(run.folder))  # fmt: skip
        if progress.step == 0 and self._prompts:
            self._draw_samples(0)
        self._state_due = time.monotonic() + self._checked.recipe.save.state_every
        try:
            steps = run_loop(bake, progress.step, self._log, self._after_step)
        except NotFinite:
            self._listeners.emit("not_finite", folder=str(run.folder))
            raise
        if steps >= bake.total_steps:
            self._log.emit("finished", steps=steps, checkpoint=self._checkpoint_file(steps))
        else:
            self._listeners.emit("stopped", step=steps, total_steps=bake.total_steps, folder=str(run.folder))
        return steps

    def _after_step(self, step: int, epoch_ended: bool) -> bool:
        bake, last = self._bake, step == self._bake.total_steps
        saved = last or step % self._saves_every == 0
        if saved:
            path = write_checkpoint(self._run.checkpoints, self._checked, bake, step)
            self._log.emit("checkpoint", step=step, file=path.relative_to(self._run.folder).as_posix())
            self._draw_samples(step)
        stop = not last and self._stop()
        if saved or stop or time.monotonic() >= self._state_due:
            log_size = self._run.events.stat().st_size
            save_state(self._run.state, Progress(step, log_size), bake.groups, bake.optimizer)
            self._state_due = time.monotonic() + self._checked.recipe.save.state_every
        return stop

    def _draw_samples(self, step: int) -> None:
        """Sample pictures; a failure to draw is told and never ends the run."""
        if not self._prompts:
            return
        graft = self._bake.graft
        graft.training = False
        try:
            images = draw(self._bake.model, self._prompts)
            for index, (image, prompt) in enumerate(zip(images, self._prompts, strict=True)):
                path = self._run.samples / f"step{step:08d}_{index:02d}.png"
                save_png(image, path, write(Infotext(prompt, self._checked.facts.name)))
        except (LorabakeError, RuntimeError) as error:  # a full disk or memory: the LoRA matters more than its samples
            self._listeners.emit("samples_failed", step=step, reason=str(error))
        else:
            self._log.emit("samples", step=step, count=len(self._prompts))
        finally:
            graft.training = True

    def _checkpoint_file(self, step: int) -> str:
        return checkpoint_name(self._checked.recipe.output.name or "lora", self._bake, step)


def _lock(checked: Checked) -> dict[str, str]:
    """What must be the same for a run to continue to the same bytes."""
    pictures = [(sample.name, sample.sha256, sample.caption, sample.repeats) for sample in checked.dataset.samples]
    return {
        "lorabake": lorabake.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "dataset": hashlib.sha256(repr(pictures).encode()).hexdigest(),
        "base": checked.facts.digest,
    }


def _same_run(run: Run, checked: Checked, lock: dict[str, str]) -> None:
    known: dict[str, Any] = run.read_manifest()
    changed: Sequence[tuple[str, Any, Any]] = [
        *(difference for difference in checked.recipe.differences(known["recipe"]) if difference[0] not in _PLACES),
        *((name, value, known["lock"].get(name)) for name, value in lock.items() if value != known["lock"].get(name)),
    ]
    if changed:
        lines = "\n".join(f"  {name}: {theirs} there, {ours} now" for name, ours, theirs in changed)
        raise UserError(
            f"{run.folder} holds another run, which cannot be continued with this:\n{lines}\n"
            "Give another folder with --into, or the recipe it was started with."
        )
