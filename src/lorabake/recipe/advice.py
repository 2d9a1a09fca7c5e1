"""What a checked recipe says before it is run: settings that do nothing, and what follows from everything together."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Sequence, Set

from lorabake.dataset.augment import idle_settings as idle_augment
from lorabake.dataset.buckets import idle_settings as idle_buckets
from lorabake.dataset.caption import idle_settings as idle_captions
from lorabake.dataset.caption import unfit_captions, unfit_lengths
from lorabake.dataset.folder import Dataset
from lorabake.dataset.masks import idle_settings as idle_masks
from lorabake.dataset.scan import named
from lorabake.families import family_card
from lorabake.protocols.adapter import ForLayers
from lorabake.protocols.family import ModelFacts, TextOption
from lorabake.recipe.checked import Checked
from lorabake.recipe.objectives import objective_warnings
from lorabake.recipe.optimizers import optimizer_warnings
from lorabake.recipe.pictures import idle_settings as idle_pictures
from lorabake.recipe.pictures import regularisation_notes
from lorabake.recipe.preservation import preservation_notes
from lorabake.recipe.recipe import Recipe
from lorabake.recipe.resolve import adapter_card
from lorabake.recipe.sections import DataSettings
from lorabake.recipe.seen import token_warnings
from lorabake.recipe.validation import validation_notes


def advice(checked: Checked, notes: Sequence[str]) -> Iterator[str]:
    """Everything worth knowing of a run before it is started, each in a sentence or two.

    Args:
        checked: what is to be run.
        notes: what was met while its pictures were read.
    """
    yield from _by_section(checked)
    yield from notes
    yield from preservation_notes(checked.recipe.preservation, checked.recipe.data, checked.dataset.samples)
    if checked.regularisation:
        yield from regularisation_notes(checked.regularisation, checked.entries, math.ceil(checked.length.epochs))
    yield from validation_notes(checked.recipe.validation, checked.held_out, len(checked.dataset))


def _by_section(checked: Checked) -> Iterator[str]:
    recipe, facts, dataset, length = checked.recipe, checked.facts, checked.dataset, checked.length
    options, data = family_card(facts).text_options, recipe.data
    texts = [sample.caption for sample in dataset.samples]
    yield from facts.notes
    yield from (f"{warning.where}: {warning.what}" for warning in dataset.warnings)
    yield from dataset.notes
    yield from _idle_class_tokens(data, dataset)
    yield from _idle_text_options(recipe, facts, options)
    yield from (f"data.captions.{idle}" for idle in idle_captions(data.captions))
    yield from (f"data.captions: {unfit}" for unfit in unfit_captions(texts, data.captions))
    unfit = unfit_lengths(data.captions, length.steps_per_epoch, length.steps)
    yield from (f"data.captions: {told}" for told in unfit)
    sizes = [sample.size for pictures in checked.pictures for sample in pictures.samples]
    places = [place for pictures in checked.pictures for place in pictures.placements]
    yield from (f"data.augment.{idle}" for idle in idle_augment(data.augment, sizes, places))
    yield from _too_small(recipe, dataset)
    yield from (f"data.{idle}" for idle in idle_pictures(data))
    yield from (f"data.masks.{idle}" for idle in idle_masks(data.masks))
    yield from (f"data.buckets.{idle}" for idle in idle_buckets(data.buckets))
    yield from optimizer_warnings(recipe)
    told = objective_warnings(recipe.objective, facts.prediction, recipe.train.batch_size)
    yield from (f"objective.{warning}" for warning in told)
    yield from _idle_samples(recipe)
    yield from _idle_for_models(recipe)
    yield from _idle_for_layers(recipe, facts)
    if recipe.train.precision == "fp16" and recipe.train.device == "cpu":
        yield "train.precision = 'fp16': a CPU computes it by way of other types, slower than fp32, and gains only memory."
    if recipe.train.blocks_to_swap and recipe.train.device == "cpu":
        yield "train.blocks_to_swap: on a CPU there is no other memory to wait in; blocks are copied for nothing."
    yield from token_warnings(checked.captions, recipe.model.reading(options), data.captions)


def _idle_samples(recipe: Recipe) -> Iterator[str]:
    """A rhythm for nothing."""
    if recipe.sample.every is not None and not recipe.sample.prompts and recipe.sample.prompts_file is None:
        yield "sample.every does nothing without sample.prompts or sample.prompts_file."


def _idle_for_models(recipe: Recipe) -> Iterator[str]:
    """What is for LoRA files alone."""
    if adapter_card(recipe.adapter).trains_base:
        whole = f"adapter '{recipe.adapter.name}' saves model folders"
        for name, value in recipe.save.changed("dtype").items():
            yield f"save.{name} = {value} does nothing: {whole}, always in fp32."
        for name, value in recipe.output.changed("trigger", "comment").items():
            yield f"output.{name} = {value} does nothing: {whole}, which have no place for it."


def _idle_for_layers(recipe: Recipe, facts: ModelFacts) -> Iterator[str]:
    """Settings of the network type for layers that the model has not."""
    for name, value in recipe.adapter.settings.changed().items():
        for mark in recipe.marks(f"adapter.{name}"):
            if isinstance(mark, ForLayers) and mark.group not in family_card(facts).groups:
                yield f"adapter.{name} = {value} does nothing: {facts.name} has no {mark.called} (its family is '{facts.family}')."


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


def _idle_class_tokens(data: DataSettings, dataset: Dataset) -> Iterator[str]:
    if data.class_tokens is not None and not any(sample.caption_source == "class_tokens" for sample in dataset.samples):
        yield "data.class_tokens does nothing: every picture has a caption file or lies in a folder named R_name."


def _idle_text_options(recipe: Recipe, facts: ModelFacts, options: Set[TextOption]) -> Iterator[str]:
    """Given settings about text that the family's models do not have."""
    for name in recipe.model.changed(*typing.get_args(TextOption)):
        if name not in options:
            yield f"model.{name} does nothing: models of the family '{facts.family}' have no such setting."
