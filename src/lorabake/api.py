"""The verbs, for Python. The command line and the studio call the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabake.base.errors import UserError
from lorabake.base.events import Events, Listener
from lorabake.base.places import expanded, run_folder
from lorabake.base.runs import Run
from lorabake.dataset.folder import Dataset, open_dataset
from lorabake.recipe import Checked, check, check_values
from lorabake.recipe.sections import ModelSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorabake.base.machine import Device, Precision
    from lorabake.protocols.family import ModelFacts, Prediction, TextOption, TextOptions
    from lorabake.recipe.exports import Exported
    from lorabake.recipe.imports import Imported
    from lorabake.recipe.prompts import Prompt
    from lorabake.train.continuing import Agree
    from lorabake.train.run import Outcome

Location = str | os.PathLike[str]


def _warn(note: str) -> None:
    """Told where the verb was called."""
    warnings.warn(note, stacklevel=4)


def open(path: Location) -> Dataset | Run | Checked:
    """Reopen what a folder or file is: a dataset, a run, or a recipe.

    Raises:
        UserError: it is none of them.
    """
    location = expanded(path)
    if location.suffix == ".toml" and location.is_file():
        return check(location)
    if (run := Run(location)).exists():
        return run
    return open_dataset(location)


def validate(recipe: Location | Mapping[str, Any], **settings: Mapping[str, Any]) -> Checked:
    """A recipe with nothing left open, checked against its dataset and base model; nothing is started.

    Args:
        recipe: a recipe file, a folder of pictures, or a dict by section.
        **settings: sections to change, such as ``adapter={"rank": 8}``; what they do not name, in tables too, stays.

    Raises:
        Problems: everything that is wrong.
    """
    from lorabake.recipe.load import changed, read_raw

    raw = changed(recipe if isinstance(recipe, Mapping) else read_raw(Path(recipe)), settings)
    return check_values(raw, subject="The recipe" if isinstance(recipe, Mapping) else str(recipe))


def import_recipe(config: Location, dataset: Location | None = None) -> Imported:
    """A config of another trainer as a recipe: kohya's sd-scripts and their GUIs, ai-toolkit, OneTrainer. Nothing is written.

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
    continue_changed: bool | Agree = False,
    from_state: Location | None = None,
    stop: Callable[[], bool] = lambda: False,
    **settings: Mapping[str, Any],
) -> Outcome:
    """Train a LoRA; the same call continues a run that was stopped or killed, to the same bytes.

    Args:
        recipe: a recipe file, a folder of pictures, a dict by section, or what :func:`validate` returned.
        into: run folder; default ``runs/NAME``.
        on_event: called with every event (a dict with ``kind``).
        continue_changed: go on with a run that is there though settings were changed since, where that can be done; or a function
            that is told the changes and says whether to.
        from_state: a checkpoint of a run that keeps states, or a run folder: a new run begins from there.
        stop: asked after every step; True ends the run there, with a save.
        **settings: sections to change, such as ``train={"length": "8 epochs"}``, as for :func:`validate`; not where it returned ``recipe``.

    Raises:
        Problems: the recipe is wrong; nothing was started.
        UserError: there are settings to change in a recipe that is checked already.
        NotFinite: training blew up; what was saved before is intact.
    """
    from lorabake.train.run import train as run_training

    if isinstance(recipe, Checked) and settings:
        raise UserError(
            f"This recipe is checked already, and {' and '.join(settings)} would change it. Give what is to be changed to validate(), "
            "or give train() the recipe itself. Nothing was started."
        )
    checked = recipe if isinstance(recipe, Checked) else validate(recipe, **settings)
    return run_training(
        checked,
        expanded(into) if into else run_folder(str(checked.recipe.output.name)),
        Events(*([on_event] if on_event else [])),
        stop,
        agree=continue_changed if callable(continue_changed) else lambda changes: continue_changed,
        from_state=Path(from_state) if from_state is not None else None,
    )


def generate(
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    base: Location = "pocket",
    vae: Location | None = None,
    text_encoders: Sequence[Location] = (),
    prediction: Prediction | None = None,
    loras: Mapping[Location, float] | Sequence[Location | tuple[Location, float]] = (),
    clip_skip: int | None = None,
    max_tokens: int | None = None,
    t5_tokens: int | None = None,
    device: Device | None = None,
    precision: Precision | None = None,
    blocks_to_swap: int = 0,
    on_note: Callable[[str], None] = _warn,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """Draw pictures with a base model and LoRA files. The ``info["parameters"]`` of each says how it was made.

    Args:
        prompts: one or several, in kohya's prompt-line form (``"a cat --d 7 --s 20 --l 5"``) or as objects.
        base: a single ``.safetensors`` file, a model folder, or ``pocket``.
        vae, text_encoders: to use in place of the base's own: files or folders.
        prediction: what the base predicts, where its files do not say it.
        loras: files with their weights, or files at weight 1.
        clip_skip: use the text encoder's N-th last layer, 1 is the last; default: as the LoRAs were trained.
        max_tokens: tokens of a prompt that are read, 75, 150 or 225; default: as the LoRAs were trained, else 75.
        t5_tokens: tokens of a prompt that T5 reads, 1 to 512; default: as the LoRAs were trained, else as the model was.
        device: ``cpu`` or ``cuda``; default: the GPU if there is one.
        precision: ``fp32`` or ``bf16``; default: bf16 on a GPU that has it, fp32 on a CPU.
        blocks_to_swap: so many of the denoiser's blocks wait in main memory until their turn, for models larger than the card: 3 or more, or 0.
        on_note: told what is allowed and probably not meant, such as a prompt whose end is not read; default: a Python warning.
        progress: called with (denoising steps done, in all).

    Raises:
        UserError: a model, a file or a prompt is not what it should be, or there is no such device.
    """
    from lorabake.base.header import read_header
    from lorabake.families import inspect_model, load_on
    from lorabake.families.networks.noise import reschedule
    from lorabake.sampling.apply import apply_lora
    from lorabake.sampling.draw import draw
    from lorabake.sampling.infotext import Infotext, UsedLora, write
    from lorabake.sampling.reading import infotext_extra, schedule_of

    files = _weighted(loras)
    facts = inspect_model(**source_of({}, base, vae, text_encoders, prediction))
    asked: TextOptions = {"clip_skip": clip_skip, "max_tokens": max_tokens, "t5_tokens": t5_tokens}
    chosen, options = _readable(facts, prompts, [path for path, _ in files], asked, on_note)
    model = load_on(facts, device, precision, blocks_to_swap=blocks_to_swap, on_note=on_note, **options)
    reschedule(model, schedule_of(facts, [path for path, _ in files]))
    for path, weight in files:
        apply_lora(model, path, weight)
    pictures = draw(model, chosen, progress=progress)
    used = tuple(UsedLora(path.stem, weight, read_header(path).payload_sha256[:12]) for path, weight in files)
    extra = infotext_extra(options)
    for picture, prompt in zip(pictures, chosen, strict=True):
        picture.info["parameters"] = write(Infotext(prompt.on(facts), facts.name, loras=used, extra=extra))
    return pictures


def grid(
    run: Location | Run | Sequence[Location],
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    weights: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (),
    last: int | None = None,
    base: Location | None = None,
    vae: Location | None = None,
    text_encoders: Sequence[Location] = (),
    prediction: Prediction | None = None,
    clip_skip: int | None = None,
    max_tokens: int | None = None,
    t5_tokens: int | None = None,
    device: Device | None = None,
    precision: Precision | None = None,
    blocks_to_swap: int = 0,
    on_note: Callable[[str], None] = _warn,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Image:
    """One labelled picture: the base's row, then checkpoints × weights, by prompts × seeds.

    Args:
        run: a run (its checkpoints and base are used), its folder, or LoRA files.
        prompts: as for :func:`generate`.
        weights: strengths.
        seeds: draw each prompt with each of these.
        last: only the checkpoints of as many steps, the newest; or only as many of the files, the last ones.
        base: as for :func:`generate`; default: the run's own, with its VAE and text encoders.
        vae, text_encoders, prediction, clip_skip, max_tokens, t5_tokens, device, precision, blocks_to_swap, on_note: as for :func:`generate`.
        progress: called with (pictures done, pictures in all).

    Raises:
        UserError: as for :func:`generate`; or the run has no LoRA files.
    """
    from lorabake.families import inspect_model, load_on
    from lorabake.families.networks.noise import reschedule
    from lorabake.sampling.reading import schedule_of
    from lorabake.sampling.tasting import taste

    files, own = checkpoints_of(run, last, on_note)
    facts = inspect_model(**source_of(own, base, vae, text_encoders, prediction))
    asked: TextOptions = {"clip_skip": clip_skip, "max_tokens": max_tokens, "t5_tokens": t5_tokens}
    chosen, options = _readable(facts, prompts, files, asked, on_note)
    model = load_on(facts, device, precision, blocks_to_swap=blocks_to_swap, on_note=on_note, **options)
    reschedule(model, schedule_of(facts, files))
    return taste(model, files, weights, chosen, seeds, progress).picture()


def _readable(
    facts: ModelFacts,
    prompts: str | Prompt | Sequence[str | Prompt],
    files: Sequence[Path],
    asked: TextOptions,
    on_note: Callable[[str], None],
) -> tuple[list[Prompt], dict[TextOption, int]]:
    """Prompts as objects, and how the model is to read them; what is probably not meant is told."""
    from lorabake.recipe.prompts import line_to_prompt
    from lorabake.sampling.reading import prompt_notes, text_options

    several = prompts if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
    chosen = [line_to_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in several]
    options = text_options(facts, files, asked)
    for note in prompt_notes(facts, chosen, options):
        on_note(note)
    return chosen, options


def _weighted(
    loras: Mapping[Location, float] | Sequence[Location | tuple[Location, float]],
) -> list[tuple[Path, float]]:
    """LoRA files with their weights."""
    pairs = list(loras.items()) if isinstance(loras, Mapping) else loras
    return [(expanded(item[0]), item[1]) if isinstance(item, tuple) else (expanded(item), 1.0) for item in pairs]


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


def checkpoints_of(
    run: Location | Run | Sequence[Location],
    last: int | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> tuple[list[Path], dict[str, Any]]:
    """LoRA files of a run, a run folder or a list, and what the run was trained on as arguments of ``inspect_model``.

    ``last``: only those of as many steps of the run, the newest (a step has several where running averages are saved), or of the list.
    ``on_note`` is told where the run's log is damaged, so that a checkpoint may be missing.

    Raises:
        UserError: there are none.
    """
    if isinstance(run, Sequence) and not isinstance(run, str):
        found = [expanded(path) for path in run]
        if len(found) != 1 or found[0].is_file():
            return found[-(last or 0) :], {}
        run = found[0]
    if not isinstance(run, Run):
        path = expanded(run)
        if path.is_file():
            return [path], {}
        run = Run(path)
    own = ModelSettings.model_validate(run.read_manifest()["recipe"]["model"]).source()
    if damage := run.damage():
        on_note(damage)
    saved = run.checkpoint_paths(last)
    if files := [path for path in saved if path.is_file()]:
        return files, own
    if saved:
        raise UserError(
            f"{run.folder} trained the model itself: its checkpoints are base models, no LoRA files. Draw with one of them by "
            f'giving it as the base, such as: lorabake generate "…" --base {saved[-1]}'
        )
    if run.last_checkpoint():
        raise UserError(
            f"The checkpoints of {run.folder} are not there any more: they were moved or deleted. Put them back, or give the LoRA files "
            "themselves."
        )
    raise UserError(f"{run.folder} has no checkpoints yet. Let it train until the first one is saved.")
