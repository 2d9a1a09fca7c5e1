"""The verb: start a run in a folder, or continue the one that is there to the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorabake
from lorabake.base.errors import LorabakeError, NotFinite, RunStopped, UserError
from lorabake.base.events import EventLog, Events
from lorabake.base.files import sha256_file, write_atomic, write_json
from lorabake.base.lock import exclusive
from lorabake.base.runs import Run
from lorabake.dataset.caption import full_caption
from lorabake.families import family_card
from lorabake.recipe import Checked
from lorabake.recipe.toml import to_toml
from lorabake.sampling.draw import check as check_prompts
from lorabake.sampling.draw import draw
from lorabake.sampling.infotext import Infotext, save_png, write
from lorabake.sampling.prompts import Prompt, line_to_prompt
from lorabake.sampling.reading import infotext_extra, prompt_notes
from lorabake.train.bake import prepare
from lorabake.train.checkpoint import checkpoint_name, write_checkpoint
from lorabake.train.loop import Bake, run_loop
from lorabake.train.picture_losses import as_csv, picture_losses
from lorabake.train.prediction import ASKED, check_prediction
from lorabake.train.state import Progress, load_state, save_state

_FREE = (
    "data.folder",
    "data.regularisation",
    "validation.folder",
    "model.base",
    "save.",
    "sample.",
    "output.",
)
"""Settings that may change between sittings, because no weight depends on them. Folders may be moved: what is in them is in the lock."""

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


def train(checked: Checked, into: Path, events: Events, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Train, or go on training, in run folder ``into``.

    Args:
        checked: what to train.
        into: the run folder; made if absent. A run of another recipe, dataset or version in it is refused.
        events: told of everything; the run's own log listens too.
        stop: asked after every step; True saves the state and returns.

    Raises:
        UserError: the folder belongs to another run or process, or cannot be written; or the base model predicts something else than
            it is said to.
        RunStopped: a file could not be written on the way (a full disk, say); what was saved before is intact.
        NotFinite: training blew up; checkpoints and state from before are intact.
    """
    started = time.monotonic()
    run = Run(into)
    prompts = [line_to_prompt(line).on(checked.facts) for line in checked.recipe.sample.prompts]
    with exclusive(into / ".lock"), _processor(checked.recipe.train.threads or 1):
        lock = _lock(checked)
        if run.exists():
            _same_run(run, checked, lock)
        if run.finished():
            last = next(event for event in reversed(run.read_events()) if event["kind"] == "finished")
            events.emit("already_finished", folder=str(into))
            return Outcome(run, last["steps"], last["steps"], time.monotonic() - started)
        reading = checked.recipe.model.reading(family_card(checked.facts).text_options)
        train, length = checked.recipe.train, checked.length
        told = f"{checked.dataset.account()}; {length.told(train.batch_size, train.gradient_accumulation)}"
        events.emit("pictures", used=len(checked.dataset), dropped=len(checked.dataset.dropped), text=told)
        for note in (*checked.warnings, *prompt_notes(checked.facts, prompts, reading)):
            events.emit("note", text=note)
        bake = prepare(checked, events, stop)
        check_prompts(bake.model, prompts)
        progress = load_state(run.state, bake.groups, bake.optimizer) or Progress(0, 0)
        if progress.step == 0:
            _check_base(bake)
        _write_run(run, checked, lock)  # only now: what cannot be prepared must not stand in the way of the next try
        try:
            steps = _Session(checked, bake, run, events, stop, prompts, infotext_extra(reading)).go_on(progress)
        except UserError as error:
            raise RunStopped(
                f"{error} What was saved before is intact: once this is mended, the same command continues."
            ) from error
    return Outcome(run, steps, bake.total_steps, time.monotonic() - started)


def _check_base(bake: Bake) -> None:
    """Ask the base whether it predicts what it is said to; the adapter on it changes nothing yet."""
    bake.graft.training = False
    alike = [index for index, bucket in enumerate(bake.buckets) if bucket == bake.buckets[0]][:ASKED]
    captions = [full_caption(bake.samples[index].caption, bake.recipe.data.captions) for index in alike]
    latents, framings = [bake.latents[index][0] for index in alike], [bake.framings[index][0] for index in alike]
    check_prediction(bake.model, latents, captions, framings)
    bake.graft.training = True


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
        extra: Mapping[str, str],
    ) -> None:
        self._checked, self._bake, self._run, self._stop, self._prompts = checked, bake, run, stop, prompts
        self._extra = extra
        self._asks_every = checked.recipe.validation.every.steps(bake.steps_per_epoch)
        self._saves_every = checked.recipe.save.every.steps(bake.steps_per_epoch)
        self._state_due = 0.0
        self._listeners = events
        self._file = EventLog(run.events)
        self._log = Events(self._file, lambda event: events.emit(**event))

    def go_on(self, progress: Progress) -> int:
        """Train to the end; returns the steps done."""
        bake, run = self._bake, self._run
        if run.events.exists():
            with run.events.open("r+b") as log:  # what is after the state did not happen: it will, again
                log.truncate(min(progress.log_size, run.events.stat().st_size))
        self._listeners.emit("started", step=progress.step, total_steps=bake.total_steps, steps_per_epoch=bake.steps_per_epoch,
                             weights=sum(group.values.numel() for group in bake.groups), folder=str(run.folder))  # fmt: skip
        if progress.step == 0:
            self._draw_samples(0)
            self._validate(0)
        self._state_due = time.monotonic() + self._checked.recipe.save.state_every
        try:
            steps = run_loop(bake, progress.step, self._log, self._after_step)
        except NotFinite:
            self._listeners.emit("not_finite", folder=str(run.folder))
            raise
        if steps >= bake.total_steps:
            self._tell_picture_losses()
            self._log.emit("finished", steps=steps, checkpoint=self._checkpoint_file(steps))
        else:
            self._listeners.emit("stopped", step=steps, total_steps=bake.total_steps, folder=str(run.folder))
        return steps

    def _after_step(self, step: int) -> bool:
        bake, last = self._bake, step == self._bake.total_steps
        saved = last or step % self._saves_every == 0
        if saved:
            path = write_checkpoint(self._run.checkpoints, self._checked, bake, step)
            self._log.emit("checkpoint", step=step, file=path.relative_to(self._run.folder).as_posix())
            self._draw_samples(step)
        if last or step % self._asks_every == 0:
            self._validate(step)
        stop = not last and self._stop()
        if saved or stop or time.monotonic() >= self._state_due:
            save_state(self._run.state, Progress(step, self._file.sync()), bake.groups, bake.optimizer)
            self._state_due = time.monotonic() + self._checked.recipe.save.state_every
        return stop

    def _validate(self, step: int) -> None:
        """The loss of the held-out pictures, where there are any."""
        if self._bake.held_out:
            self._log.emit("validation", step=step, **self._bake.held_out.compare().told())

    def _tell_picture_losses(self) -> None:
        """The table of all pictures, and which of them stand out."""
        bake, run = self._bake, self._run
        rows = picture_losses(run.read_events(), [sample.name for sample in bake.samples], bake.trained)
        write_atomic(run.losses, as_csv(rows))
        hard = [
            {"picture": row.picture, "relative": row.relative, "error": row.error} for row in rows if row.stands_out
        ]
        self._log.emit("picture_losses", file=run.losses.name, hard=hard[:_HARD])

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
                save_png(image, path, write(Infotext(prompt, self._checked.facts.name, extra=self._extra)))
        except (LorabakeError, RuntimeError) as error:  # a full disk or memory: the LoRA matters more than its samples
            self._listeners.emit("samples_failed", step=step, reason=str(error))
        else:
            self._log.emit("samples", step=step, count=len(self._prompts))
        finally:
            graft.training = True

    def _checkpoint_file(self, step: int) -> str:
        return checkpoint_name(self._checked.recipe.output.name or "lora", self._bake, step)


def _pictures(checked: Checked) -> dict[str, str]:
    """A fingerprint of every picture with its caption and repeats, and its mask where masks are used, by name."""
    own, *regularisation = checked.pictures
    kinds = [("", own), *(("regularisation: ", pictures) for pictures in regularisation)]
    if checked.held_out:
        kinds.append(("held out: ", checked.held_out))
    facts: dict[str, tuple[Any, ...]] = {}
    for kind, pictures in kinds:
        masks = pictures.masks or [None] * len(pictures.samples)
        for sample, mask_HW in zip(pictures.samples, masks, strict=True):  # several where it is seen at several sizes
            known = facts.setdefault(f"{kind}{sample.name}", (sample.sha256, sample.caption, sample.repeats))
            if mask_HW is not None:
                mask: tuple[Any, ...] = (mask_HW.shape, hashlib.sha256(mask_HW.tobytes()).hexdigest())
                if checked.recipe.data.augment.varies and sample.mask and not kind.startswith("held"):
                    mask = (sha256_file(sample.mask),)  # other crops show other parts of it
                facts[f"{kind}{sample.name}"] = known + mask
    return {name: hashlib.sha256(repr(of_picture).encode()).hexdigest()[:32] for name, of_picture in facts.items()}


def _lock(checked: Checked) -> dict[str, str]:
    """What must be the same for a run to continue to the same bytes."""
    return {
        "lorabake": lorabake.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "dataset": hashlib.sha256(repr(_pictures(checked)).encode()).hexdigest(),
        "base": checked.facts.digest,
    }


def _write_run(run: Run, checked: Checked, lock: dict[str, str]) -> None:
    """Recipe, pictures and lock; the lock last, because a run exists once it is there. Written anew where something changed."""
    manifest = {"recipe": checked.recipe.to_dict(), "lock": lock}
    if run.exists() and run.read_manifest() == manifest:
        return
    write_atomic(run.recipe, to_toml(checked.recipe).encode())
    write_json(run.pictures, _pictures(checked))
    write_json(run.manifest, manifest)


def _same_run(run: Run, checked: Checked, lock: dict[str, str]) -> None:
    known: dict[str, Any] = run.read_manifest()
    changed: Sequence[tuple[str, Any, Any]] = [
        *(
            difference
            for difference in checked.recipe.differences(known["recipe"])
            if not difference[0].startswith(_FREE)
        ),
        *((name, value, known["lock"].get(name)) for name, value in lock.items() if value != known["lock"].get(name)),
    ]
    if changed:
        lines = "\n".join(
            f"  {name}: {_what_changed(run, checked, name, ours, theirs)}" for name, ours, theirs in changed
        )
        raise UserError(
            f"{run.folder} holds another run, which cannot be continued with this:\n{lines}\n"
            "Give another folder with --into, or the recipe it was started with."
        )


def _what_changed(run: Run, checked: Checked, name: str, ours: Any, theirs: Any) -> str:
    """Two values; for the dataset the pictures instead of its hashes."""
    if name != "dataset":
        return f"{theirs} there, {ours} now"
    then, now = run.read_pictures(), _pictures(checked)
    groups = {
        "new": sorted(now.keys() - then.keys()),
        "gone": sorted(then.keys() - now.keys()),
        "changed": sorted(picture for picture in now.keys() & then.keys() if now[picture] != then[picture]),
    }
    told = [
        f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"
        for what, names in groups.items()
        if names
    ]
    return "; ".join(told) or "the order of its pictures differs"
