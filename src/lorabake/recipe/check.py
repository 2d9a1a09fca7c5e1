"""Everything that can be wrong before a run, found before the run, and told at once."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import MissingExtra, Problem, Problems, UserError
from lorabake.dataset.augment import idle_settings as idle_augment
from lorabake.dataset.buckets import BucketConfig, Placement, bucket_problems, placements
from lorabake.dataset.buckets import idle_settings as idle_buckets
from lorabake.dataset.caption import CaptionConfig, unfit_captions, unfit_lengths
from lorabake.dataset.caption import idle_settings as idle_captions
from lorabake.dataset.faces import require_faces
from lorabake.dataset.folder import Dataset, Sample
from lorabake.dataset.order import RunLength, run_length
from lorabake.dataset.scan import named
from lorabake.dataset.several import open_datasets
from lorabake.families import caption_readers, family_card, inspect_model
from lorabake.protocols.family import ModelFacts, TextOption
from lorabake.recipe.load import anchored, parse_model, parse_sections, read_raw
from lorabake.recipe.objectives import idle_settings as idle_rules
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.resolve import adapter_card, resolve, resolve_buckets
from lorabake.recipe.sections import DataSettings, ModelSettings, RateSettings, TrainSettings
from lorabake.recipe.seen import SeenCaption, see_captions, token_warnings


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe with nothing left open, and what it stands on."""

    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    samples: tuple[Sample, ...]
    """What is trained on: the dataset's samples, each once for every size that it is seen at."""
    placements: tuple[Placement, ...]
    """Bucket and crop of each of them."""
    warnings: tuple[str, ...]
    """What is allowed and probably not meant."""
    captions: tuple[SeenCaption, ...]
    """What the text encoders see of each of the dataset's samples; empty where the family does not say."""
    length: RunLength
    """How long the run is."""


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
    dataset = _dataset(values, problems)
    samples, places = _placements(values, facts, dataset, problems)
    captions = _captions(values, facts, dataset, problems)
    problems.extend(_contradictions(values, facts))
    if problems or facts is None or dataset is None:
        raise Problems(subject, problems, "`lorabake explain SECTION` lists what a section accepts.")
    recipe = resolve(Recipe(**values), facts)
    length = _length(recipe, samples, places)
    warnings = _warnings(recipe, facts, dataset, samples, places, captions, length)
    return Checked(recipe, facts, dataset, samples, places, warnings, captions, length)


def _length(recipe: Recipe, samples: Sequence[Sample], places: Sequence[Placement]) -> RunLength:
    train = recipe.train
    buckets, repeats = [place.bucket_wh for place in places], [sample.repeats for sample in samples]
    return run_length(buckets, repeats, train.batch_size, train.gradient_accumulation, train.length, train.seed)


def _contradictions(values: Mapping[str, Any], facts: ModelFacts | None) -> Iterator[Problem]:
    """What is allowed by itself and cannot work together."""
    model: ModelSettings | None = values.get("model")
    if model is not None and model.t5_tokens is not None and facts is not None and facts.usual_t5_tokens is None:
        what = f"{model.t5_tokens}, but {facts.name} has no T5 text encoder (its family is '{facts.family}'). Leave it out."
        yield Problem("model.t5_tokens", what)
    data: DataSettings | None = values.get("data")
    if data is not None and data.augment.face_crop is not None:
        try:
            require_faces()
        except MissingExtra as error:
            yield Problem("data.augment.face_crop", str(error))
    rates: RateSettings | None = values.get("rates")
    if rates is not None and rates.lr == 0 and not rates.text_encoder_lr:
        what = "0 here and for the text encoder: nothing would be trained. Give one of them a value."
        yield Problem("optimizer.lr", what)
    train: TrainSettings | None = values.get("train")
    adapter: Choice | None = values.get("adapter")
    if train is not None and adapter is not None and train.precision == "bf16" and adapter_card(adapter).trains_base:
        what = f"'bf16': adapter '{adapter.name}' trains the weights themselves, which needs fp32. Leave precision out."
        yield Problem("train.precision", what)


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
        data: DataSettings = values["data"]
        dataset = open_datasets(data.folders, class_tokens=data.class_tokens, every_line=data.captions.wildcards)
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
) -> tuple[tuple[Sample, ...], tuple[Placement, ...]]:
    """Every sample once for each size it is seen at, and how it gets there."""
    if facts is None or "data" not in values:
        return (), ()
    given: BucketConfig = values["data"].buckets
    buckets = resolve_buckets(given, facts)
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
        return (), ()
    entries: list[tuple[Sample, Placement]] = []
    for sample in dataset.samples:
        try:
            entries += [(sample, placement) for placement in placements(sample.size, buckets)]
        except UserError as error:
            problems.append(Problem(sample.name, str(error)))
    return tuple(sample for sample, _ in entries), tuple(placement for _, placement in entries)


def _too_small(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Pictures that are not seen at every size."""
    others = recipe.data.buckets.each()[1:]
    for config in others:
        area = config.resolution_wh[0] * config.resolution_wh[1]
        names = [sample.name for sample in dataset.samples if sample.width * sample.height < area]
        if names:
            which = f"{len(names)} of {len(dataset)} pictures are too small for resolution {config.resolution}"
            what = (
                "none is left, so it does nothing"
                if len(names) == len(dataset)
                else "and are trained on at smaller ones only"
            )
            yield f"data.buckets.resolutions: {which}, {what}: {named(names)}."


def _warnings(
    recipe: Recipe,
    facts: ModelFacts,
    dataset: Dataset,
    samples: Sequence[Sample],
    places: Sequence[Placement],
    captions: Sequence[SeenCaption],
    length: RunLength,
) -> tuple[str, ...]:
    options = family_card(facts).text_options
    texts = [sample.caption for sample in dataset.samples]
    return (
        *facts.notes,
        *(f"{warning.where}: {warning.what}" for warning in dataset.warnings),
        *dataset.notes,
        *_idle_class_tokens(recipe.data, dataset),
        *_idle_text_options(recipe, facts, options),
        *(f"data.captions.{idle}" for idle in idle_captions(recipe.data.captions)),
        *(f"data.captions: {unfit}" for unfit in unfit_captions(texts, recipe.data.captions)),
        *(
            f"data.captions: {unfit}"
            for unfit in unfit_lengths(recipe.data.captions, length.steps_per_epoch, length.steps)
        ),
        *(
            f"data.augment.{idle}"
            for idle in idle_augment(recipe.data.augment, [sample.size for sample in samples], places)
        ),
        *_too_small(recipe, dataset),
        *(f"data.buckets.{idle}" for idle in idle_buckets(recipe.data.buckets)),
        *(f"objective.{idle}" for idle in idle_rules(recipe.objective)),
        *token_warnings(captions, recipe.model.reading(options), recipe.data.captions),
    )


def _idle_class_tokens(data: DataSettings, dataset: Dataset) -> Iterator[str]:
    if data.class_tokens is not None and not any(sample.caption_source == "class_tokens" for sample in dataset.samples):
        yield "data.class_tokens does nothing: every picture has a caption file or lies in a folder named R_name."


def _idle_text_options(recipe: Recipe, facts: ModelFacts, options: Set[TextOption]) -> Iterator[str]:
    """Given settings about text that the family's models do not have."""
    names: tuple[TextOption, ...] = typing.get_args(TextOption)
    for name in names:
        if name not in options and getattr(recipe.model, name) != type(recipe.model).model_fields[name].default:
            yield f"model.{name} does nothing: models of the family '{facts.family}' have no such setting."
