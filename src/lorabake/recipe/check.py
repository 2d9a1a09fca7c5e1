"""Everything that can be wrong before a run, found before the run, and told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabake.base.errors import MissingExtra, Problem, Problems, UserError
from lorabake.base.header import read_header
from lorabake.base.places import expanded
from lorabake.dataset.buckets import BucketConfig, Placement, bucket_problems
from lorabake.dataset.caption import CaptionConfig
from lorabake.dataset.faces import require_faces
from lorabake.dataset.folder import Dataset, Sample
from lorabake.dataset.masks import MaskConfig, Masks, read_masks
from lorabake.dataset.order import RunLength, run_length
from lorabake.dataset.several import open_datasets
from lorabake.families import caption_readers, family_card, inspect_model, too_few_to_swap
from lorabake.protocols.family import ModelFacts
from lorabake.recipe.advice import advice
from lorabake.recipe.checked import Checked
from lorabake.recipe.load import anchored, parse_model, parse_sections, read_raw
from lorabake.recipe.optimizers import optimizer_problems, schedule_problems
from lorabake.recipe.pictures import Pictures, Regularisation, open_beside, open_regularisation, pictures, placed
from lorabake.recipe.preservation import preservation_problems, with_trigger
from lorabake.recipe.prompts import sample_prompts, shortened, unfit
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.resolve import adapter_card, resolve, resolve_buckets
from lorabake.recipe.sections import (
    DataSettings,
    ModelSettings,
    RateSettings,
    StartSettings,
    TrainSettings,
    ValidationSettings,
)
from lorabake.recipe.seen import SeenCaption, see_captions
from lorabake.recipe.validation import split, trained_after_all


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
    samples, places = _placements(values, facts, dataset, problems)
    masks = _masks(values, facts, samples, places, problems)
    notes = list(masks.notes)
    regularisation = _regularisation(values, facts, dataset, samples, problems, notes)
    held_out = _held_out(values, facts, dataset, kept_back, problems)
    problems.extend(trained_after_all(held_out, regularisation))
    captions = _captions(values, facts, dataset, problems)
    problems.extend(_contradictions(values, facts, captions))
    problems.extend(_preservation(values, dataset))
    problems.extend(_start(values))
    problems.extend(_samples(values, facts))
    if problems or facts is None or dataset is None:
        raise Problems(subject, problems, "`lorabake explain SECTION` lists what a section accepts.")
    recipe = resolve(Recipe(**values), facts)
    length = _length(recipe, samples, places, regularisation)
    checked = Checked(
        recipe, facts, dataset, samples, places, (), captions, length, masks.of_samples, regularisation, held_out
    )
    if too_long := list(schedule_problems(recipe, checked.length.steps)):
        raise Problems(subject, too_long, "`lorabake explain schedule` lists what it accepts.")
    return dataclasses.replace(checked, warnings=tuple(advice(checked, notes)))


def _length(
    recipe: Recipe, samples: Sequence[Sample], places: Sequence[Placement], regularisation: Regularisation | None
) -> RunLength:
    train = recipe.train
    buckets, repeats = [place.bucket_wh for place in places], [sample.repeats for sample in samples]
    if regularisation:
        buckets += regularisation.turns.buckets
        repeats += regularisation.turns.of_epoch(0)  # every epoch has as many of each bucket
    return run_length(buckets, repeats, train.batch_size, train.gradient_accumulation, train.length, train.seed)


def _contradictions(
    values: Mapping[str, Any], facts: ModelFacts | None, captions: Sequence[SeenCaption]
) -> Iterator[Problem]:
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
    half = train is not None and train.precision in ("bf16", "fp16")
    if train is not None and adapter is not None and half and adapter_card(adapter).trains_base:
        what = f"'{train.precision}': adapter '{adapter.name}' trains the weights themselves, which needs fp32. Leave precision out."
        yield Problem("train.precision", what)
    if model is not None and adapter is not None and model.quantize and adapter_card(adapter).trains_base:
        what = f"'{model.quantize}': adapter '{adapter.name}' trains the weights themselves, which must be whole. Leave it out."
        yield Problem("model.quantize", what)
    if train is not None and facts is not None and train.precision == "fp16" and not family_card(facts).fp16:
        what = f"'fp16': {facts.name} overflows in it (its family is '{facts.family}'). Set 'bf16' or 'fp32'."
        yield Problem("train.precision", what)
    if train is not None and adapter is not None and train.max_weight_norm and adapter_card(adapter).trains_base:
        what = (
            f"adapter '{adapter.name}' trains the weights themselves, whose size is not that of a change. Leave it out."
        )
        yield Problem("train.max_weight_norm", what)
    if train is not None:
        yield from _swapping(train, trains_base=adapter is not None and adapter_card(adapter).trains_base)
    if train is not None and len({f"{decay:g}" for decay in train.ema}) < len(train.ema):
        yield Problem(
            "train.ema", f"{list(train.ema)}: two of them are the same in six digits, by which their files are named."
        )


def _swapping(train: TrainSettings, trains_base: bool) -> Iterator[Problem]:
    name, count = "train.blocks_to_swap", train.blocks_to_swap
    if why := too_few_to_swap(count):
        yield Problem(name, why)
    if count and trains_base:
        yield Problem(
            name, f"{count}: this adapter trains the blocks themselves, which must stay where they are. Leave it out."
        )
    elif count and train.gradient_checkpointing is not True:
        what = f"{count}: blocks that come and go must be recomputed. Set train.gradient_checkpointing = true as well."
        yield Problem(name, what)


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


def _samples(values: Mapping[str, Any], facts: ModelFacts | None) -> Iterator[Problem]:
    """Prompts of pictures that cannot be read, or that this model cannot draw."""
    if "sample" not in values or facts is None:
        return
    try:
        prompts = sample_prompts(values["sample"])
    except Problems as error:
        yield from error.problems
        return
    own = len(values["sample"].prompts)
    for number, prompt in enumerate(prompts, 1):
        where = f"sample.prompts {number}" if number <= own else "sample.prompts_file"
        if wrong := "; ".join(f"{name} {what.rstrip('.')}" for name, what in unfit(prompt, facts)):
            yield Problem(where, f"'{shortened(prompt.text)}': {wrong}.")


def _facts(model: ModelSettings | None, problems: list[Problem]) -> ModelFacts | None:
    if model is None:
        return None
    try:
        return inspect_model(**model.source())
    except Problems as error:
        part = Path(error.subject)  # the base, or one of its parts wherever it lies
        name = "" if part == expanded(model.base) else f"{part}: "
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
        options = {"class_tokens": data.class_tokens, "every_line": data.captions.wildcards}
        dataset = open_datasets(data.folders, data.repeats_of_each, **options)
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
    return placed(dataset.samples, buckets, problems)


def _masks(
    values: Mapping[str, Any],
    facts: ModelFacts | None,
    samples: tuple[Sample, ...],
    placements: Sequence[Placement],
    problems: list[Problem],
) -> Masks:
    """The pictures' masks; empty where anything that they depend on is not right yet."""
    if facts is None or not samples:
        return Masks(())
    config: MaskConfig = values["data"].masks
    found = read_masks(samples, placements, config, facts.latent_scale)
    problems.extend(found.problems)
    if config.source != "none" and not found.problems and not any(mask is not None for mask in found.of_samples):
        wanted = {
            "files": "Put a mask 001.png for the picture 001.png into a folder masks, or 001-masklabel.png beside it",
            "alpha": "Use pictures with transparency",
        }
        why = " ".join(found.notes) or f"none of the {len(set(samples))} pictures has a mask."
        problems.append(
            Problem("data.masks.source", f"'{config.source}': {why} {wanted[config.source]}, or leave this out.")
        )
    return found


def _regularisation(
    values: Mapping[str, Any],
    facts: ModelFacts | None,
    dataset: Dataset | None,
    samples: Sequence[Sample],
    problems: list[Problem],
    notes: list[str],
) -> Regularisation | None:
    if facts is None or dataset is None or "train" not in values:
        return None
    buckets = resolve_buckets(values["data"].buckets, facts)
    if bucket_problems(buckets):
        return None
    seed: int = values["train"].seed
    entries = sum(sample.repeats for sample in samples)
    return open_regularisation(values["data"], dataset, entries, buckets, facts.latent_scale, seed, problems, notes)


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
        data: DataSettings = values["data"]
        options = {"class_tokens": data.class_tokens, "every_line": data.captions.wildcards}
        found = open_beside(settings.folder, "validation.folder", settings.folder.name, dataset, problems, **options)
        if found is None:
            return None
        home, samples = found.path, found.samples
    buckets = resolve_buckets(values["data"].buckets, facts)
    if not samples or bucket_problems(buckets):
        return None
    masks, cell = values["data"].masks, facts.latent_scale
    return pictures(home, samples, buckets, masks, cell, "held-out pictures", problems, every_size=False)
