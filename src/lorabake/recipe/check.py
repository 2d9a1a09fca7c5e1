"""Everything that can be wrong before a run, found before the run, and told at once."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.dataset.buckets import Placement, bucket_problems
from lorabake.dataset.buckets import idle_settings as idle_buckets
from lorabake.dataset.caption import CaptionConfig
from lorabake.dataset.caption import idle_settings as idle_captions
from lorabake.dataset.folder import Dataset, Sample, open_dataset
from lorabake.dataset.masks import Mask, MaskConfig, Masks, read_masks
from lorabake.dataset.masks import idle_settings as idle_masks
from lorabake.dataset.order import batches_per_epoch
from lorabake.families import caption_readers, family_card, inspect_model
from lorabake.formats.header import read_header
from lorabake.protocols.family import ModelFacts, TextOption
from lorabake.recipe.load import anchored, parse_model, parse_sections, read_raw
from lorabake.recipe.objectives import objective_warnings
from lorabake.recipe.optimizers import optimizer_problems, optimizer_warnings, schedule_problems
from lorabake.recipe.pictures import (
    Pictures,
    Regularisation,
    open_beside,
    open_regularisation,
    pictures,
    placed,
    regularisation_notes,
)
from lorabake.recipe.pictures import idle_settings as idle_pictures
from lorabake.recipe.preservation import preservation_notes, preservation_problems, with_trigger
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.resolve import adapter_card, resolve, resolve_buckets
from lorabake.recipe.sections import ModelSettings, RateSettings, StartSettings, TrainSettings, ValidationSettings
from lorabake.recipe.seen import SeenCaption, see_captions, token_warnings
from lorabake.recipe.validation import split, validation_notes


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe with nothing left open, and what it stands on."""

    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    placements: tuple[Placement, ...]
    """Bucket and crop of each of the dataset's samples."""
    warnings: tuple[str, ...]
    """What is allowed and probably not meant."""
    captions: tuple[SeenCaption, ...]
    """What the text encoders see of each of the dataset's samples; empty where the family does not say."""
    masks: tuple[Mask | None, ...] = ()
    """The mask of each of the dataset's samples as it is in its bucket; None counts whole. Empty where masks are not asked for."""
    regularisation: Regularisation | None = None
    held_out: Pictures | None = None
    """Pictures that are asked about and never trained on; they are none of the dataset's samples any more."""

    @property
    def pictures(self) -> tuple[Pictures, ...]:
        """All that is trained on, by folder: the dataset, then the regularisation folders."""
        own = Pictures(self.dataset.path, self.dataset.samples, self.placements, self.masks)
        return (own, *(self.regularisation.folders if self.regularisation else ()))

    @property
    def entries(self) -> int:
        """Pictures per epoch, repeats and regularisation pictures included."""
        return self.dataset.entries + (self.regularisation.turns.entries if self.regularisation else 0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        buckets = [placement.bucket_wh for placement in self.placements]
        repeats = [sample.repeats for sample in self.dataset.samples]
        if self.regularisation:
            turns = self.regularisation.turns
            buckets += turns.buckets
            repeats += turns.of_epoch(0)  # every epoch has as many of each bucket
        batches = batches_per_epoch(buckets, repeats, self.recipe.train.batch_size)
        return math.ceil(batches / self.recipe.train.gradient_accumulation)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.train.length.steps(self.steps_per_epoch)


def check(path: Path, overrides: Sequence[str] = ()) -> Checked:
    """Read and check a recipe file or a dataset folder.

    Raises:
        UserError: there is nothing at ``path``.
        Problems: anything is wrong with the settings, the model or the dataset; everything found is named.
    """
    return check_values(read_raw(path, overrides), subject=str(path))


def check_values(raw: Mapping[str, Any], subject: str = "The recipe") -> Checked:
    """The same for plain values by section; relative paths count from the current folder.

    Raises:
        Problems: as for :func:`check`.
    """
    problems: list[Problem] = []
    about_model: list[Problem] = []
    raw = anchored(raw, Path())
    facts = _facts(parse_model(raw), about_model)
    objective = raw.get("objective")
    if facts is None and isinstance(objective, Mapping) and "name" not in objective:
        del raw["objective"]  # nobody can tell whose settings these are
    values = parse_sections(raw, problems, facts.prediction if facts else None)
    problems.extend(about_model)
    dataset, kept_back = _split(values, _dataset(values, problems), problems)
    placements = _placements(values, facts, dataset, problems)
    masks = _masks(values, facts, dataset, placements, problems)
    notes = list(masks.notes)
    regularisation = _regularisation(values, facts, dataset, problems, notes)
    held_out = _held_out(values, facts, dataset, kept_back, problems)
    captions = _captions(values, facts, dataset, problems)
    problems.extend(_contradictions(values, facts, captions))
    problems.extend(_preservation(values, dataset))
    problems.extend(_start(values))
    if problems or facts is None or dataset is None:
        raise Problems(subject, problems, "`lorabake explain SECTION` lists what a section accepts.")
    recipe = resolve(Recipe(**values), facts)
    warnings = (*_warnings(recipe, facts, dataset, captions), *notes)
    checked = Checked(
        recipe, facts, dataset, placements, warnings, captions, masks.of_samples, regularisation, held_out
    )
    if too_long := list(schedule_problems(recipe, checked.total_steps)):
        raise Problems(subject, too_long, "`lorabake explain schedule` lists what it accepts.")
    return dataclasses.replace(checked, warnings=(*warnings, *_stated(checked)))


def _stated(checked: Checked) -> Iterator[str]:
    """What follows from everything together, and is to be known before the run."""
    yield from preservation_notes(checked.recipe.preservation, checked.recipe.data, checked.dataset.samples)
    if checked.regularisation:
        epochs = math.ceil(checked.total_steps / checked.steps_per_epoch)
        yield from regularisation_notes(checked.regularisation, checked.dataset.entries, epochs)
    yield from validation_notes(checked.recipe.validation, checked.held_out, len(checked.dataset))


def _contradictions(
    values: Mapping[str, Any], facts: ModelFacts | None, captions: Sequence[SeenCaption]
) -> Iterator[Problem]:
    """What is allowed by itself and cannot work together."""
    model: ModelSettings | None = values.get("model")
    if model is not None and model.t5_tokens is not None and facts is not None and facts.usual_t5_tokens is None:
        what = f"{model.t5_tokens}, but {facts.name} has no T5 text encoder (its family is '{facts.family}'). Leave it out."
        yield Problem("model.t5_tokens", what)
    rates: RateSettings | None = values.get("rates")
    if rates is not None and rates.lr == 0 and not any(rates.text_encoder_lrs):
        what = "0 here and for the text encoder: nothing would be trained. Give one of them a value."
        yield Problem("optimizer.lr", what)
    if rates is not None and isinstance(rates.text_encoder_lr, tuple) and captions:
        given, there = len(rates.text_encoder_lr), len(captions[0].readings)
        if given != there:
            what = f"has {given} values, and the model has {there} text encoder{'s' * (there != 1)}. Give one for each, or a single one for all."
            yield Problem("optimizer.text_encoder_lr", what)
    train: TrainSettings | None = values.get("train")
    optimizer: Choice | None = values.get("optimizer")
    if rates is not None and optimizer is not None:
        yield from optimizer_problems(optimizer, rates, train)
    adapter: Choice | None = values.get("adapter")
    if train is not None and adapter is not None and train.precision == "bf16" and adapter_card(adapter).trains_base:
        what = f"'bf16': adapter '{adapter.name}' trains the weights themselves, which needs fp32. Leave precision out."
        yield Problem("train.precision", what)
    if train is not None and adapter is not None and train.max_weight_norm and adapter_card(adapter).trains_base:
        what = (
            f"adapter '{adapter.name}' trains the weights themselves, whose size is not that of a change. Leave it out."
        )
        yield Problem("train.max_weight_norm", what)
    if train is not None and len(set(train.ema)) < len(train.ema):
        yield Problem("train.ema", f"{list(train.ema)}: one of them is there twice. Each makes a file of its own.")


def _preservation(values: Mapping[str, Any], dataset: Dataset | None) -> Iterator[Problem]:
    if {"preservation", "data", "output"} <= values.keys():
        settings = with_trigger(values["preservation"], values["output"].trigger)
        yield from preservation_problems(settings, values["data"], dataset.samples if dataset else ())


def _start(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether there is a LoRA file to begin with; whether it fits is seen once the model is loaded."""
    start: StartSettings | None = values.get("start")
    adapter: Choice | None = values.get("adapter")
    if start is None or start.start_from is None:
        return
    if adapter is not None and adapter_card(adapter).trains_base:
        yield Problem(
            "adapter.start_from", f"adapter '{adapter.name}' trains the model itself: give the model as model.base."
        )
        return
    try:
        read_header(Path(start.start_from))
    except UserError as error:
        yield Problem("adapter.start_from", str(error))


def _facts(model: ModelSettings | None, problems: list[Problem]) -> ModelFacts | None:
    if model is None:
        return None
    try:
        return inspect_model(**model.source())
    except Problems as error:
        part = Path(error.subject)  # the base, or one of its parts wherever it lies
        name = "" if part == Path(model.base).expanduser() else f"{part}: "
        for problem in error.problems:
            a_setting = problem.where in type(model).model_fields
            where, what = (
                (problem.where, problem.what) if a_setting else ("base", f"{name}{problem.where} {problem.what}")
            )
            problems.append(Problem(f"model.{where}", what))
    except UserError as error:
        problems.append(Problem("model.base", str(error)))
    return None


def _dataset(values: Mapping[str, Any], problems: list[Problem]) -> Dataset | None:
    if "data" not in values:
        return None
    try:
        dataset = open_dataset(values["data"].folder)
        problems.extend(_no_captions(values["data"].captions, dataset))
        return dataset
    except Problems as error:
        problems.extend(Problem("data.folder", problem.what) for problem in error.problems)
    except UserError as error:
        problems.append(Problem("data.folder", str(error)))
    return None


def _no_captions(captions: CaptionConfig, dataset: Dataset) -> Iterator[Problem]:
    """Without a word to hold on to, a LoRA changes every picture. That is hardly ever wanted, so it has to be said."""
    said = any(sample.caption for sample in dataset.samples) or captions.prefix.strip() or captions.suffix.strip()
    if not said and captions.caption_dropout < 1:
        yield Problem(
            "data.captions",
            f"none of the {len(dataset)} pictures has a caption. Write one beside each (001.txt for 001.png), name the folder "
            "10_name to caption them all 'name', or give data.captions.prefix. To train without on purpose: caption_dropout = 1.",
        )


def _captions(
    values: Mapping[str, Any], facts: ModelFacts | None, dataset: Dataset | None, problems: list[Problem]
) -> tuple[SeenCaption, ...]:
    if facts is None or dataset is None:
        return ()
    try:
        readers = caption_readers(facts, values["model"].reading(family_card(facts).text_options))
    except UserError as error:
        problems.append(Problem("model.base", str(error)))
        return ()
    return see_captions(dataset.samples, values["data"].captions, readers) if readers else ()


def _placements(
    values: Mapping[str, Any], facts: ModelFacts | None, dataset: Dataset | None, problems: list[Problem]
) -> tuple[Placement, ...]:
    if facts is None or "data" not in values:
        return ()
    buckets = resolve_buckets(values["data"].buckets, facts)
    found = [Problem(f"data.buckets.{problem.where}", problem.what) for problem in bucket_problems(buckets)]
    if buckets.step % facts.pixel_step:
        found.append(
            Problem(
                "data.buckets.step",
                f"{buckets.step}: {facts.name} needs sides in multiples of {facts.pixel_step} pixels.",
            )
        )
    problems.extend(found)
    if found or dataset is None:
        return ()
    return placed(dataset.samples, buckets, problems)


def _masks(
    values: Mapping[str, Any],
    facts: ModelFacts | None,
    dataset: Dataset | None,
    placements: Sequence[Placement],
    problems: list[Problem],
) -> Masks:
    """The pictures' masks; empty where anything that they depend on is not right yet."""
    if facts is None or dataset is None or len(placements) != len(dataset):
        return Masks(())
    config: MaskConfig = values["data"].masks
    found = read_masks(dataset.samples, placements, config, facts.latent_scale)
    problems.extend(found.problems)
    if config.source != "none" and not found.problems and not any(mask is not None for mask in found.of_samples):
        wanted = {
            "files": "Put a mask 001.png for the picture 001.png into a folder masks, or 001-masklabel.png beside it",
            "alpha": "Use pictures with transparency",
        }
        why = " ".join(found.notes) or f"none of the {len(dataset)} pictures has a mask."
        problems.append(
            Problem("data.masks.source", f"'{config.source}': {why} {wanted[config.source]}, or leave this out.")
        )
    return found


def _regularisation(
    values: Mapping[str, Any],
    facts: ModelFacts | None,
    dataset: Dataset | None,
    problems: list[Problem],
    notes: list[str],
) -> Regularisation | None:
    if facts is None or dataset is None or "train" not in values:
        return None
    buckets = resolve_buckets(values["data"].buckets, facts)
    if bucket_problems(buckets):
        return None
    seed: int = values["train"].seed
    return open_regularisation(values["data"], dataset, buckets, facts.latent_scale, seed, problems, notes)


def _split(
    values: Mapping[str, Any], dataset: Dataset | None, problems: list[Problem]
) -> tuple[Dataset | None, tuple[Sample, ...]]:
    """The pictures to train on, and those of the same folder that are held out."""
    if dataset is None or "validation" not in values:
        return dataset, ()
    training, held_out = split(dataset.samples, values["validation"], problems)
    return dataclasses.replace(dataset, samples=training) if held_out else dataset, held_out


def _held_out(
    values: Mapping[str, Any],
    facts: ModelFacts | None,
    dataset: Dataset | None,
    kept_back: tuple[Sample, ...],
    problems: list[Problem],
) -> Pictures | None:
    """The pictures that are asked about, wherever they are from."""
    if facts is None or dataset is None or "validation" not in values:
        return None
    settings: ValidationSettings = values["validation"]
    home, samples = dataset.path, kept_back
    if settings.folder is not None:
        found = open_beside(settings.folder, "validation.folder", settings.folder.name, dataset, problems)
        if found is None:
            return None
        home, samples = found.path, found.samples
    buckets = resolve_buckets(values["data"].buckets, facts)
    if not samples or bucket_problems(buckets):
        return None
    return pictures(home, samples, buckets, values["data"].masks, facts.latent_scale, "held-out pictures", problems)


def _warnings(recipe: Recipe, facts: ModelFacts, dataset: Dataset, captions: Sequence[SeenCaption]) -> tuple[str, ...]:
    options = family_card(facts).text_options
    return (
        *facts.notes,
        *(f"{warning.where}: {warning.what}" for warning in dataset.warnings),
        *dataset.notes,
        *_idle_text_options(recipe, facts, options),
        *(f"data.captions.{idle}" for idle in idle_captions(recipe.data.captions)),
        *(f"data.{idle}" for idle in idle_pictures(recipe.data)),
        *(f"data.masks.{idle}" for idle in idle_masks(recipe.data.masks)),
        *(f"data.buckets.{idle}" for idle in idle_buckets(recipe.data.buckets)),
        *optimizer_warnings(recipe),
        *(
            f"objective.{told}"
            for told in objective_warnings(recipe.objective, facts.prediction, recipe.train.batch_size)
        ),
        *_idle_samples(recipe),
        *token_warnings(captions, recipe.model.reading(options), recipe.data.captions),
    )


def _idle_samples(recipe: Recipe) -> Iterator[str]:
    """A rhythm for nothing."""
    if recipe.sample.every is not None and not recipe.sample.prompts and recipe.sample.prompts_file is None:
        yield "sample.every does nothing without sample.prompts or sample.prompts_file."


def _idle_text_options(recipe: Recipe, facts: ModelFacts, options: Set[TextOption]) -> Iterator[str]:
    """Given settings about text that the family's models do not have."""
    names: tuple[TextOption, ...] = typing.get_args(TextOption)
    for name in names:
        if name not in options and getattr(recipe.model, name) != type(recipe.model).model_fields[name].default:
            yield f"model.{name} does nothing: models of the family '{facts.family}' have no such setting."
