"""Pictures drawn while training: as `lorabake generate` draws them with the file that is saved, so that nobody is shown another LoRA."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorabake.base.errors import LorabakeError
from lorabake.base.events import Events
from lorabake.base.header import read_header
from lorabake.base.runs import Run
from lorabake.recipe import Checked
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.apply import apply_lora
from lorabake.sampling.draw import draw
from lorabake.sampling.infotext import Infotext, UsedLora, save_png, write
from lorabake.train.awake import awake
from lorabake.train.bake import Bake
from lorabake.train.checkpoint import write_checkpoint


def sample_name(step: int, index: int) -> str:
    """File name of the sample of prompt ``index`` after ``step`` steps."""
    return f"step{step:08d}_{index:02d}.png"


class Samples:
    """Draws a run's sample pictures into its folder."""

    def __init__(
        self, checked: Checked, bake: Bake, run: Run, prompts: Sequence[Prompt], extra: Mapping[str, str]
    ) -> None:
        self._checked, self._bake, self._run, self._prompts, self._extra = checked, bake, run, prompts, extra
        every = checked.recipe.sample.every or checked.recipe.save.every
        self._every = every.steps(bake.steps_per_epoch)

    def due(self, step: int) -> bool:
        """Whether pictures are drawn after ``step`` steps."""
        return bool(self._prompts) and (step % self._every == 0 or step >= self._bake.total_steps)

    def pixels_left(self, step: int) -> int:
        """Of all pictures that are drawn after ``step`` steps."""
        times = (self._bake.total_steps - step) // self._every + 2
        return times * sum((prompt.width or 0) * (prompt.height or 0) for prompt in self._prompts)

    def draw(self, step: int, file: Path | None, log: Events, listeners: Events) -> None:
        """Draw and write them; a failure is told and never ends the run.

        Args:
            step: steps done.
            file: the checkpoint of this step, where there is one.
            log: told of the pictures.
            listeners: told where there are none.
        """
        try:
            with awake(self._bake.model), self._as_saved(step, file) as used:
                images = draw(self._bake.model, self._prompts)
            for index, (image, prompt) in enumerate(zip(images, self._prompts, strict=True)):
                infotext = write(Infotext(prompt, self._checked.facts.name, loras=used, extra=self._extra))
                save_png(image, self._run.samples / sample_name(step, index), infotext)
        except (LorabakeError, OSError, RuntimeError) as error:  # a full disk or memory: the LoRA matters more
            listeners.emit("samples_failed", step=step, reason=str(error))
        else:
            log.emit("samples", step=step, count=len(self._prompts))

    @contextmanager
    def _as_saved(self, step: int, file: Path | None) -> Iterator[tuple[UsedLora, ...]]:
        """The model with the adapter's file on it, in the number type that is saved, and not with the adapter that is trained; that file.

        A whole model is drawn as it is: it is saved in the numbers that it is trained in.
        """
        graft = self._bake.graft
        if graft.card.saves == "model":
            graft.training = False
            try:
                yield ()
            finally:
                graft.training = True
            return
        with tempfile.TemporaryDirectory() as folder, graft.lifted():
            path = file or write_checkpoint(Path(folder), self._checked, self._bake, step)
            applied = apply_lora(self._bake.model, path)
            try:
                yield (UsedLora(path.stem, 1.0, read_header(path).payload_sha256[:12]),)
            finally:
                applied.remove()
