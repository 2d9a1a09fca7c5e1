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
from lorabake.recipe.sections import ModelSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorabake.protocols.family import Prediction, TextOptions
    from lorabake.recipe.exports import Exported
    from lorabake.recipe.imports import Imported
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


def import_recipe(config: Location, dataset: Location | None = None) -> Imported:
    """A config of another trainer as a recipe: kohya's sd-scripts and its GUI, ai-toolkit, OneTrainer. Nothing is written.

    What comes back has the recipe's ``values``, which :func:`validate` and :func:`train` take, its ``toml()``, and a line for every key of the config.

    Args:
        config: the config: TOML, JSON or YAML. Relative paths in it count from the current folder.
        dataset: a dataset config of sd-scripts that goes with it.

    Raises:
        UserError: it is no such config.
    """
    from lorabake.recipe.imports import import_config

    return import_config(config, dataset)


def export_recipe(recipe: Location | Mapping[str, Any]) -> Exported:
    """A recipe as configs of kohya's sd-scripts. Nothing is written: ``texts(folder)`` has the files' texts by path.

    Args:
        recipe: a recipe file, or a dict by section.

    Raises:
        Problems: settings in it are wrong.
    """
    from lorabake.recipe.exports import export_recipe as export

    return export(recipe)


def train(
    recipe: Location | Mapping[str, Any] | Checked,
    into: Location | None = None,
    on_event: Listener | None = None,
    *,
    continue_changed: bool = False,
    from_state: Location | None = None,
    **settings: Mapping[str, Any],
) -> Outcome:
    """Train a LoRA; the same call continues a run that was stopped or killed, to the same bytes.

    Args:
        recipe: a recipe file, a folder of pictures, a dict by section, or what :func:`validate` returned.
        into: run folder; default ``runs/NAME``.
        on_event: called with every event (a dict with ``kind``).
        continue_changed: go on with a run that is there though settings were changed since, where that can be done.
        from_state: a checkpoint of a run that keeps states, or a run folder: a new run begins from there.
        **settings: sections to change, such as ``train={"length": "8 epochs"}``.

    Raises:
        Problems: the recipe is wrong; nothing was started.
        NotFinite: training blew up; what was saved before is intact.
    """
    from lorabake.train.run import train as run_training

    checked = recipe if isinstance(recipe, Checked) else validate(recipe, **settings)
    folder = Path(into) if into else Path("runs") / str(checked.recipe.output.name)
    return run_training(
        checked,
        folder,
        Events(*([on_event] if on_event else [])),
        agree=lambda changes: continue_changed,
        from_state=Path(from_state) if from_state is not None else None,
    )


def generate(
    prompts: str | Sequence[str],
    *,
    base: Location = "pocket",
    vae: Location | None = None,
    text_encoders: Sequence[Location] = (),
    prediction: Prediction | None = None,
    loras: Mapping[Location, float] | Sequence[Location] = (),
    clip_skip: int | None = None,
    max_tokens: int | None = None,
    t5_tokens: int | None = None,
) -> list[Image]:
    """Draw pictures with a base model and LoRA files.

    Args:
        prompts: one or several, in kohya's prompt-line form (``"a cat --d 7 --s 20 --l 5"``).
        base: a single ``.safetensors`` file, a model folder, or ``pocket``.
        vae, text_encoders: to use in place of the base's own: files or folders.
        prediction: what the base predicts, where its files do not say it.
        loras: files with their weights, or files at weight 1.
        clip_skip: use the text encoder's N-th last layer, 1 is the last; default: as the LoRAs were trained.
        max_tokens: tokens of a prompt that are read, 75, 150 or 225; default: as the LoRAs were trained, else 75.
        t5_tokens: tokens of a prompt that T5 reads, 1 to 512; default: as the LoRAs were trained, else as the model was.
    """
    from lorabake.families import inspect_model, load_model
    from lorabake.sampling.apply import apply_lora
    from lorabake.sampling.draw import draw
    from lorabake.sampling.prompts import line_to_prompt
    from lorabake.sampling.reading import text_options

    weighted = loras.items() if isinstance(loras, Mapping) else ((path, 1.0) for path in loras)
    facts = inspect_model(**source_of({}, base, vae, text_encoders, prediction))
    files = [(Path(path), weight) for path, weight in weighted]
    asked: TextOptions = {"clip_skip": clip_skip, "max_tokens": max_tokens, "t5_tokens": t5_tokens}
    model = load_model(facts, **text_options(facts, [path for path, _ in files], asked))
    for path, weight in files:
        apply_lora(model, path, weight)
    return draw(model, [line_to_prompt(line) for line in ([prompts] if isinstance(prompts, str) else prompts)])


def grid(
    run: Location | Run | Sequence[Location],
    prompts: Sequence[str],
    *,
    weights: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (),
    base: Location | None = None,
    vae: Location | None = None,
    text_encoders: Sequence[Location] = (),
    prediction: Prediction | None = None,
    clip_skip: int | None = None,
    max_tokens: int | None = None,
    t5_tokens: int | None = None,
    progress: Any = lambda done, total: None,
) -> Image:
    """One labelled picture: the base's row, then checkpoints × weights, by prompts × seeds.

    Args:
        run: a run (its checkpoints and base are used), its folder, or LoRA files.
        prompts: in kohya's prompt-line form.
        weights: strengths.
        seeds: draw each prompt with each of these.
        base: as for :func:`generate`; default: the run's own, with its VAE and text encoders.
        vae, text_encoders, prediction, clip_skip, max_tokens, t5_tokens: as for :func:`generate`.
        progress: called with (pictures done, pictures in all).
    """
    from lorabake.families import inspect_model, load_model
    from lorabake.sampling.prompts import line_to_prompt
    from lorabake.sampling.reading import text_options
    from lorabake.sampling.tasting import taste

    files, own = checkpoints_of(run)
    facts = inspect_model(**source_of(own, base, vae, text_encoders, prediction))
    asked: TextOptions = {"clip_skip": clip_skip, "max_tokens": max_tokens, "t5_tokens": t5_tokens}
    model = load_model(facts, **text_options(facts, files, asked))
    return taste(model, files, weights, [line_to_prompt(line) for line in prompts], seeds, progress).picture()


def source_of(
    own: Mapping[str, Any],
    base: Location | None = None,
    vae: Location | None = None,
    text_encoders: Sequence[Location] = (),
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """Arguments of ``inspect_model`` for what is given, over those of a run's ``own`` base where no other base is given."""
    given = {"vae": vae, "text_encoders": tuple(text_encoders), "prediction": prediction}
    start = {"base": os.fspath(base)} if base is not None else {"base": "pocket", **own}
    return start | {name: value for name, value in given.items() if value}


def checkpoints_of(run: Location | Run | Sequence[Location]) -> tuple[list[Path], dict[str, Any]]:
    """LoRA files of a run, a run folder or a list, and what the run was trained on as arguments of ``inspect_model``.

    Raises:
        UserError: there are none.
    """
    if isinstance(run, Sequence) and not isinstance(run, str):
        found = [Path(path) for path in run]
        if len(found) != 1 or found[0].is_file():
            return found, {}
        run = found[0]
    if not isinstance(run, Run):
        path = Path(run)
        if path.is_file():
            return [path], {}
        run = Run(path)
    own = ModelSettings.model_validate(run.read_manifest()["recipe"]["model"]).source()
    files = [path for path in run.checkpoint_paths() if path.is_file()]
    if not files:
        raise UserError(f"{run.folder} has no checkpoints yet. Let it train until the first one is saved.")
    return files, own
