"""Fills in what a recipe leaves open, from the base model and the machine, each with its reason."""

from __future__ import annotations

from typing import cast

from lorabake.base.cards import find
from lorabake.base.machine import cores, usual_device, usual_precision
from lorabake.dataset.augment import USUAL_VIEWS
from lorabake.dataset.buckets import BucketConfig
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import ModelFacts
from lorabake.recipe.optimizers import optimizer_card
from lorabake.recipe.preservation import with_trigger
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.sections import file_name

SMALL_MODEL_LR = 1.5e-3
_OF_SMALL_MODELS = 15
"""Times the usual rate, for network types whose usual rate is low."""


def adapter_card(choice: Choice) -> AdapterCard:
    """The card of the chosen network type."""
    return cast(AdapterCard, find("adapter", choice.name))


def resolve(recipe: Recipe, facts: ModelFacts) -> Recipe:
    """A recipe with nothing left open. Resolving twice changes nothing."""
    buckets = resolve_buckets(recipe.data.buckets, facts)
    if buckets is not recipe.data.buckets:
        work = f"{facts.name} works at {facts.resolution} px"
        whys = {
            "resolution": "the largest of resolutions" if buckets.resolutions else work,
            "step": f"{facts.name} takes sides in such steps",
        }
        given = recipe.data.buckets.model_fields_set
        reasons = {f"data.buckets.{name}": why for name, why in whys.items() if name not in given}
        recipe = recipe.with_values("data", "buckets", buckets, reasons)
    augment = recipe.data.augment
    if augment.varies and augment.views is None:
        why = f'{USUAL_VIEWS} views of each picture: steps stay as fast as with one; views = "fresh" makes a new one at every step'
        views = augment.model_copy(update={"views": USUAL_VIEWS})
        recipe = recipe.with_values("data", "augment", views, {"data.augment.views": why})
    if recipe.model.t5_tokens is None and facts.usual_t5_tokens is not None:
        recipe = recipe.with_value(
            "model", "t5_tokens", facts.usual_t5_tokens, f"{facts.name} was trained with as many"
        )
    if isinstance(recipe.objective.settings, ObjectiveSettings):
        for name, value, why in recipe.objective.settings.derived(facts):
            recipe = recipe.with_value("objective", name, value, why)
    if (kept := with_trigger(recipe.preservation, recipe.output.trigger)) is not recipe.preservation:
        recipe = recipe.with_value("preservation", "trigger", kept.trigger, "output.trigger")
    recipe = _rates(recipe, facts)
    recipe = _machine(recipe, facts)
    if recipe.output.name is None:
        first, *more = recipe.data.folders
        which = "the first dataset folder's name" if more else "the dataset folder's name"
        recipe = recipe.with_value("output", "name", file_name(first.resolve().name), which)
    return recipe


def resolve_buckets(buckets: BucketConfig, facts: ModelFacts) -> BucketConfig:
    """The same with what the model decides filled in, where it was not given."""
    derived = {"resolution": max(buckets.resolutions, default=facts.resolution), "step": facts.pixel_step}
    missing = {name: value for name, value in derived.items() if name not in buckets.model_fields_set}
    return buckets.model_copy(update=missing) if missing else buckets


def _rates(recipe: Recipe, facts: ModelFacts) -> Recipe:
    card, optimizer = adapter_card(recipe.adapter), optimizer_card(recipe.optimizer)
    if recipe.rates.lr is None:
        lr, why = card.usual_lr, f"usual for AdamW and adapter '{card.name}'"
        higher = min(float(f"{lr * _OF_SMALL_MODELS:g}"), SMALL_MODEL_LR)
        if facts.small and not card.trains_base and higher > lr:
            lr, why = higher, f"{facts.name} is small: narrow layers need a higher rate than the usual {lr:g}"
        if optimizer.adapts:
            lr, why = 1.0, f"'{optimizer.name}' finds the learning rate itself: this is a factor on it"
        elif optimizer.of_adamw != 1:
            lr, why = float(f"{lr * optimizer.of_adamw:g}"), f"{optimizer.of_adamw:g} times what AdamW takes: {why}"
        recipe = recipe.with_value("optimizer", "lr", lr, why)
    if recipe.rates.text_encoder_lr is None:
        rate, why = (recipe.rates.lr or 0) / 2, "half of lr: the text encoder over-trains first"
        if optimizer.adapts:
            rate, why = recipe.rates.lr or 0.0, f"'{optimizer.name}' finds the learning rate itself"
        if facts.prediction == "flow":
            rate, why = (
                0.0,
                "flow models are told most by a text encoder too large to train; its output is cached instead",
            )
        recipe = recipe.with_value("optimizer", "text_encoder_lr", rate, why)
    if optimizer.limits_updates and "max_grad_norm" not in recipe.train.model_fields_set:
        recipe = recipe.with_value("train", "max_grad_norm", 0.0, f"'{optimizer.name}' limits its updates itself")
    return recipe


def _machine(recipe: Recipe, facts: ModelFacts) -> Recipe:
    if recipe.train.device is None:
        recipe = recipe.with_value("train", "device", *usual_device())
    if recipe.train.precision is None:
        if adapter_card(recipe.adapter).trains_base:
            precision, why = "fp32", "the weights themselves are trained, and bf16 would round small steps away"
        else:
            precision, why = usual_precision(recipe.train.device or "cpu")
        recipe = recipe.with_value("train", "precision", precision, why)
    if recipe.train.threads is None:
        threads, why = (1, "small models run fastest on one thread") if facts.small else (cores(), "all cores")
        recipe = recipe.with_value("train", "threads", threads, why)
    return recipe
