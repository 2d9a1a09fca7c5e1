"""The verb: start a run in a folder, or continue the one that is there to the same bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorabake.base.errors import NotFinite, RunStopped, UserError
from lorabake.base.events import EventLog, Events
from lorabake.base.files import rename, write_atomic, write_json
from lorabake.base.lock import exclusive
from lorabake.base.runs import Run
from lorabake.dataset.caption import full_caption
from lorabake.families import family_card
from lorabake.optimizers._build import finished_weights
from lorabake.recipe import Checked
from lorabake.recipe.prompts import sample_prompts
from lorabake.recipe.toml import to_toml
from lorabake.sampling.draw import check as check_prompts
from lorabake.sampling.reading import infotext_extra, prompt_notes
from lorabake.train.bake import Bake
from lorabake.train.checkpoint import checkpoint_name, write_checkpoint
from lorabake.train.continuing import (
    Agree,
    lock_of,
    pictures_of,
    shapes_of,
)
from lorabake.train.keeping import drop_old, fingerprint
from lorabake.train.loop import run_loop
from lorabake.train.picture_losses import as_csv, picture_losses
from lorabake.train.prediction import ASKED, check_prediction
from lorabake.train.prepare import prepare
from lorabake.train.resume import Start, finished_steps
from lorabake.train.samples import Samples
from lorabake.train.space import check_space
from lorabake.train.state import Progress, save_state
from lorabake.train.tensorboard import TensorBoard

_HARD = 5
"""Pictures that are named for their loss."""


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


def train(
    checked: Checked,
    into: Path,
    events: Events,
    stop: Callable[[], bool] = lambda: False,
    *,
    agree: Agree = lambda changes: False,
    from_state: Path | None = None,
) -> Outcome:
    """Train, or go on training, in run folder ``into``.

    Args:
        checked: what to train.
        into: the run folder; made if absent. A run in it that cannot be continued with this recipe, dataset and version is refused.
        events: told of everything; the run's own log listens too.
        stop: asked after every step; True saves the state and returns.
        agree: asked whether to go on with settings that are not those the run was started with.
        from_state: a checkpoint beside which a run kept its state, a run folder, or a state itself: a new run begins from there.

    Raises:
        UserError: the folder belongs to another run or process, or cannot be written; or the base model predicts something else than
            it is said to.
        RunStopped: a file could not be written on the way (a full disk, say); what was saved before is intact.
        NotFinite: training blew up; checkpoints and state from before are intact.
    """
    started = time.monotonic()
    run = Run(into)
    prompts = [prompt.on(checked.facts) for prompt in sample_prompts(checked.recipe.sample)]
    with exclusive(into / ".lock"), _processor(checked.recipe.train.threads or 1):
        start = Start.of(run, checked, from_state, agree)
        total = checked.length.steps
        if run.finished() and not start.changes and (done := finished_steps(run)) >= total:
            if damage := run.damage():
                events.emit("note", text=damage)
            events.emit("already_finished", folder=str(into))
            return Outcome(run, done, done, time.monotonic() - started)
        reading = checked.recipe.model.reading(family_card(checked.facts).text_options)
        train, length = checked.recipe.train, checked.length
        told = f"{checked.dataset.account()}; {length.told(train.batch_size, train.gradient_accumulation)}"
        events.emit("pictures", used=len(checked.dataset), dropped=len(checked.dataset.dropped), text=told)
        for note in (*checked.warnings, *prompt_notes(checked.facts, prompts, reading)):
            events.emit("note", text=note)
        bake = prepare(checked, events, stop)
        check_prompts(bake.model, prompts)
        progress, sittings = start.go(bake, events)
        if progress.step == 0:
            _check_base(bake)
        samples = Samples(checked, bake, run, prompts, infotext_extra(reading))
        check_space(checked, bake, run, progress.step, samples.pixels_left(progress.step), events)
        start.keep(bake, progress)
        # Only now: what cannot be prepared must not stand in the way of the next try.
        _write_run(run, checked, bake, sittings)
        listeners = Events(lambda event: events.emit(**event))
        if checked.recipe.save.tensorboard:
            listeners.listen(TensorBoard(run, refused=lambda why: events.emit("note", text=why)))
        try:
            steps = _Session(checked, bake, run, listeners, stop, samples).go_on(progress, sittings)
        except (UserError, OSError) as error:
            raise RunStopped(
                f"{str(error).rstrip('.')}. What was saved before is intact: once this is mended, the same command continues."
            ) from error
    return Outcome(run, steps, bake.total_steps, time.monotonic() - started)


def _check_base(bake: Bake) -> None:
    """Ask the base whether it predicts what it is said to, without the adapter, which may have begun with a file's change."""
    alike = [index for index, bucket in enumerate(bake.buckets) if bucket == bake.buckets[0]][:ASKED]
    captions = [full_caption(bake.samples[index].caption, bake.recipe.data.captions) for index in alike]
    latents, framings = [bake.latents[index][0] for index in alike], [bake.framings[index][0] for index in alike]
    bake.graft.training = False
    try:
        with bake.graft.off():
            check_prediction(bake.model, latents, captions, framings, bake.text)
    finally:
        bake.graft.training = True
    bake.model.rest(bake.idle)


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
        self, checked: Checked, bake: Bake, run: Run, events: Events, stop: Callable[[], bool], samples: Samples
    ) -> None:
        self._checked, self._bake, self._run, self._stop, self._samples = checked, bake, run, stop, samples
        self._asks_every = checked.recipe.validation.every.steps(bake.steps_per_epoch)
        self._saves_every = checked.recipe.save.every.steps(bake.steps_per_epoch)
        self._state_due = 0.0
        self._kept = (bake.groups, bake.optimizer, bake.beside, bake.averages)
        self._listeners = events
        self._file = EventLog(run.events)
        self._log = Events(self._file, lambda event: events.emit(**event))

    def go_on(self, progress: Progress, sittings: Sequence[Mapping[str, Any]]) -> int:
        """Train to the end; returns the steps done."""
        bake, run = self._bake, self._run
        if lacking := self._file.cut_back(progress.log_size):  # what is after the state did not happen: it will, again
            self._listeners.emit(
                "note", text=f"{run.events} lacks {lacking} bytes that it had; training goes on without them."
            )
            size = (
                self._file.sync() if run.events.exists() else 0
            )  # older states know of a longer log: they must not be met again
            save_state(run.state, Progress(progress.step, size), *self._kept, keep=1)
        if damage := run.damage():
            self._listeners.emit("note", text=damage)
        for began in _untold(sittings, run.read_events("sitting")):
            self._log.emit("sitting", **began)
        self._make_way()
        self._listeners.emit("started", step=progress.step, total_steps=bake.total_steps, steps_per_epoch=bake.steps_per_epoch,
                             weights=sum(group.values.numel() for group in bake.groups), folder=str(run.folder))  # fmt: skip
        if progress.step == 0:
            if self._samples.due(0):
                self._samples.draw(0, None, self._log, self._listeners)
            self._validate(0)
        self._state_due = time.monotonic() + self._checked.recipe.save.state_every
        try:
            steps = run_loop(bake, progress.step, self._log, self._after_step)
        except NotFinite:
            self._listeners.emit("not_finite", folder=str(run.folder))
            raise
        if steps >= bake.total_steps:
            if steps not in {event["step"] for event in run.checkpoint_events()}:  # a log or file that somebody spoiled
                self._write_checkpoints(steps)
            self._tell_picture_losses()
            drop_old(run, self._checked.recipe.save.keep, self._listeners)
            self._tell_lowest_held_out()
            self._log.emit("finished", steps=steps, checkpoint=self._checkpoint_file(steps))
        else:
            self._listeners.emit("stopped", step=steps, total_steps=bake.total_steps, folder=str(run.folder))
        return steps

    def _make_way(self) -> None:
        """What were the last checkpoints of a shorter run get the names they have in a longer one, which will write other last ones."""
        run, bake = self._run, self._bake
        suffix = "" if bake.graft.card.saves == "model" else ".safetensors"
        told = {event["file"]: event for event in run.read_events("checkpoint")}
        for ending in [*(f"-ema{decay:g}{suffix}" for decay in self._checked.recipe.train.ema), suffix]:
            event = told.get(_checkpoint_file(run, self._checkpoint_file(bake.total_steps) + ending))
            if event is None or event["step"] >= bake.total_steps:
                continue
            way = _checkpoint_file(run, self._checkpoint_file(event["step"]) + ending)
            if way not in told and (run.folder / event["file"]).exists() | (run.folder / way).exists():
                if not (run.folder / way).exists():
                    rename(run.folder / event["file"], run.folder / way)
                self._log.emit(**{**event, "file": way})

    def _after_step(self, step: int) -> bool:
        last = step == self._bake.total_steps
        saved = last or step % self._saves_every == 0
        due = saved or time.monotonic() >= self._state_due
        if due and not self._run.exists():
            raise UserError(f"{self._run.folder} could not be written to: it was moved or deleted.")
        path = self._write_checkpoints(step) if saved else None
        if self._samples.due(step):
            with finished_weights(self._bake.optimizer, self._bake.groups):
                self._samples.draw(step, path, self._log, self._listeners)
        if last or step % self._asks_every == 0:
            self._validate(step)
        stop = not last and self._stop()
        if due or stop:
            self._save(Progress(step, self._file.sync()), beside_checkpoint=saved)
        return stop

    def _write_checkpoints(self, step: int) -> Path:
        """The LoRA as it is, and a file for each running average before it, so that this is the last that is told of."""
        bake = self._bake
        if bake.averages:
            for decay in bake.averages.decays:
                with bake.averages.as_weights(decay):
                    path = write_checkpoint(self._run.checkpoints, self._checked, bake, step, decay)
                self._tell_checkpoint(step, path, ema=decay)
        with finished_weights(bake.optimizer, bake.groups):
            path = write_checkpoint(self._run.checkpoints, self._checked, bake, step)
        self._tell_checkpoint(step, path)
        return path

    def _tell_checkpoint(self, step: int, path: Path, **more: Any) -> None:
        file = path.relative_to(self._run.folder).as_posix()
        self._log.emit("checkpoint", step=step, file=file, digest=fingerprint(path), **more)

    def _save(self, progress: Progress, beside_checkpoint: bool) -> None:
        """The state; only when it is safe, checkpoints that shall not stay are dropped."""
        save = self._checked.recipe.save
        if beside_checkpoint and save.keep_state:
            save_state(self._run.states, progress, *self._kept, keep=None)
        save_state(self._run.state, progress, *self._kept)
        if beside_checkpoint:
            drop_old(self._run, save.keep, self._listeners)
        self._state_due = time.monotonic() + save.state_every

    def _validate(self, step: int) -> None:
        """The loss of the held-out pictures, where there are any; before it, that with each running average, once there is one to tell."""
        bake = self._bake
        if not bake.held_out:
            return
        if bake.averages and step:
            for decay in bake.averages.decays:
                with bake.averages.as_weights(decay):
                    told = bake.held_out.compare().told()
                self._log.emit("validation", step=step, **told, ema=decay)
        with finished_weights(bake.optimizer, bake.groups):
            told = bake.held_out.compare().told()
        self._log.emit("validation", step=step, **told)

    def _tell_lowest_held_out(self) -> None:
        """Which of the checkpoints that stay does best on the held-out pictures, so that people can choose among steps and averages."""
        if self._bake.held_out and (lowest := self._run.lowest_held_out()):
            self._log.emit("lowest_held_out", **{name: lowest[name] for name in ("step", "file", "loss", "change")})

    def _tell_picture_losses(self) -> None:
        """The table of all pictures, and which of them stand out."""
        bake, run = self._bake, self._run
        rows = picture_losses(run.read_events("step"), [sample.name for sample in bake.samples], bake.trained)
        write_atomic(run.losses, as_csv(rows))
        hard = [
            {"picture": row.picture, "relative": row.relative, "error": row.error} for row in rows if row.stands_out
        ]
        self._log.emit("picture_losses", file=run.losses.name, hard=hard[:_HARD])

    def _checkpoint_file(self, step: int) -> str:
        return checkpoint_name(self._checked.recipe.output.name or "lora", self._bake, step)


def _untold(sittings: Sequence[Mapping[str, Any]], told: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Those that began after the last one that the log knows: of an earlier one, the line may be damaged."""
    known = [{name: value for name, value in event.items() if name != "kind"} for event in told]
    return sittings[max((number for number, began in enumerate(sittings, 1) if began in known), default=0) :]


def _checkpoint_file(run: Run, name: str) -> str:
    """A checkpoint as events name it."""
    return (run.checkpoints / name).relative_to(run.folder).as_posix()


def _write_run(run: Run, checked: Checked, bake: Bake, sittings: Sequence[Mapping[str, Any]]) -> None:
    """Recipe, pictures and manifest; the manifest last, because a run exists once it is there. Written anew where something changed."""
    manifest: dict[str, Any] = {
        "recipe": checked.recipe.to_dict(),
        "lock": lock_of(checked),
        "steps_per_epoch": bake.steps_per_epoch,
        "weights": shapes_of(bake.graft),
        **({"sittings": list(sittings)} if sittings else {}),
    }
    if run.exists() and run.read_manifest() == manifest:
        return
    write_atomic(run.recipe, to_toml(checked.recipe).encode())
    write_json(run.pictures, pictures_of(checked))
    write_json(run.manifest, manifest)
