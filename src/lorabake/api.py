"""The verbs, for Python. The command line and the studio call the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabake.base.errors import UserError
from lorabake.base.events import Events, Listener
from lorabake.base.runs import Run
from lorabake.dataset.folder import Dataset, open_dataset
from lorabake.recipe import Checked, check, check_values

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorabake.train.run import Outcome

Location = str | os.PathLike[str]


def open(path: Location) -> Dataset | Run | Checked:
    """Reopen what a folder or file is: a dataset, a run, or a recipe.

    Raises:
        UserError: it is none of them.
    """
    location = Path(path).expanduser()
    if location.suffix == ".toml" and location.is_file():
        return check(location)
    if (run := Run(location)).exists():
        return run
    return open_dataset(location)


def validate(recipe: Location | Mapping[str, Any], **settings: Mapping[str, Any]) -> Checked:
    """A recipe with nothing left open, checked against its dataset and base model; nothing is started.

    Args:
        recipe: a recipe file, a folder of pictures, or a dict by section.
        **settings: sections to change, such as ``adapter={"rank": 8}``.

    Raises:
        Problems: everything that is wrong.
    """
    from lorabake.recipe.load import read_raw

    raw = dict(recipe) if isinstance(recipe, Mapping) else read_raw(Path(recipe))
    for section, values in settings.items():
        raw[section] = {**raw.get(section, {}), **values}
    return check_values(raw, subject="The recipe" if isinstance(recipe, Mapping) else str(recipe))


def train(
    recipe: Location | Mapping[str, Any] | Checked,
    into: Location | None = None,
    on_event: Listener | None = None,
    **settings: Mapping[str, Any],
) -> Outcome:
    """Train a LoRA; the same call continues a run that was stopped or killed, to the same bytes.

    Args:
        recipe: a recipe file, a folder of pictures, a dict by section, or what :func:`validate` returned.
        into: run folder; default ``runs/NAME``.
        on_event: called with every event (a dict with ``kind``).
        **settings: sections to change, such as ``train={"length": "8 epochs"}``.

    Raises:
        Problems: the recipe is wrong; nothing was started.
        NotFinite: training blew up; what was saved before is intact.
    """
    from lorabake.train.run import train as run_training

    checked = recipe if isinstance(recipe, Checked) else validate(recipe, **settings)
    folder = Path(into) if into else Path("runs") / str(checked.recipe.output.name)
    return run_training(checked, folder, Events(*([on_event] if on_event else [])))


def generate(
    prompts: str | Sequence[str],
    *,
    base: Location = "pocket",
    loras: Mapping[Location, float] | Sequence[Location] = (),
) -> list[Image]:
    """Draw pictures with a base model and LoRA files.

    Args:
        prompts: one or several, in kohya's prompt-line form (``"a cat --d 7 --s 20 --l 5"``).
        base: model folder, or ``pocket``.
        loras: files with their weights, or files at weight 1.
    """
    from lorabake.families import load_model
    from lorabake.sampling.apply import apply_lora
    from lorabake.sampling.draw import draw
    from lorabake.sampling.prompts import line_to_prompt

    model = load_model(str(base))
    weighted = loras.items() if isinstance(loras, Mapping) else ((path, 1.0) for path in loras)
    for path, weight in weighted:
        apply_lora(model, Path(path), weight)
    return draw(model, [line_to_prompt(line) for line in ([prompts] if isinstance(prompts, str) else prompts)])


def grid(
    run: Location | Run | Sequence[Location],
    prompts: Sequence[str],
    *,
    weights: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (),
    base: Location | None = None,
    progress: Any = lambda done, total: None,
) -> Image:
    """One labelled picture: the base's row, then checkpoints × weights, by prompts × seeds.

    Args:
        run: a run (its checkpoints and base are used), its folder, or LoRA files.
        prompts: in kohya's prompt-line form.
        weights: strengths.
        seeds: draw each prompt with each of these.
        base: model folder or ``pocket``; default: the run's own.
        progress: called with (pictures done, pictures in all).
    """
    from lorabake.families import load_model
    from lorabake.sampling.prompts import line_to_prompt
    from lorabake.sampling.tasting import taste

    files, own_base = checkpoints_of(run)
    model = load_model(str(base or own_base or "pocket"))
    return taste(model, files, weights, [line_to_prompt(line) for line in prompts], seeds, progress).picture()


def checkpoints_of(run: Location | Run | Sequence[Location]) -> tuple[list[Path], str | None]:
    """LoRA files of a run, a run folder or a list, and the base model the run was trained on.

    Raises:
        UserError: there are none.
    """
    if isinstance(run, Sequence) and not isinstance(run, str):
        found = [Path(path) for path in run]
        if len(found) != 1 or found[0].is_file():
            return found, None
        run = found[0]
    if not isinstance(run, Run):
        path = Path(run)
        if path.is_file():
            return [path], None
        run = Run(path)
    base = run.read_manifest()["recipe"]["model"]["base"]
    files = [path for path in run.checkpoint_paths() if path.is_file()]
    if not files:
        raise UserError(f"{run.folder} has no checkpoints yet. Let it train until the first one is saved.")
    return files, base
