"""From a checked recipe to everything the loop works with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from lorabake.adapters import graft
from lorabake.adapters._norms import norm_limit
from lorabake.base.cards import find
from lorabake.base.errors import Interrupted, UserError
from lorabake.base.events import Events
from lorabake.dataset.caption import is_static
from lorabake.dataset.order import batches_per_epoch
from lorabake.families import family_card, load_model
from lorabake.optimizers._averages import Averages
from lorabake.optimizers._build import build
from lorabake.optimizers._flat import FlatGroup
from lorabake.optimizers.schedules import ScheduleSettings
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model, Part
from lorabake.protocols.objective import Objective
from lorabake.protocols.optimizer import OptimizerCard, OptimizerSettings
from lorabake.recipe import Checked
from lorabake.recipe.sections import TrainSettings
from lorabake.train.capture import Captured, CudaGraphs
from lorabake.train.latents import View, cached_latents
from lorabake.train.loop import Bake, loss_of
from lorabake.train.rates import begins_at_zero, rate_groups, rates_by_part
from lorabake.train.text import TextSource

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHE = Path(".lorabake", "latents")
"""Where a dataset keeps its latents. Safe to delete."""


def prepare(checked: Checked, events: Events, stop: Callable[[], bool] = lambda: False) -> Bake:
    """Load the model, graft the adapter, encode what is not cached, and build the optimizer.

    Raises:
        Interrupted: ``stop()`` was true while pictures were being encoded; those that are done stay in the cache.
        UserError: the recipe wants a GPU, and there is none.
    """
    recipe = checked.recipe
    dtype, device = _DTYPES[recipe.train.precision or "fp32"], recipe.train.device or "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            'train.device is "cuda", and PyTorch finds no GPU here: its driver may be missing, or this PyTorch be one for CPUs only. '
            'Set train.device = "cpu", or leave it out.'
        )
    reading = recipe.model.reading(family_card(checked.facts).text_options)
    model = load_model(checked.facts, dtype=dtype, device=device, **reading)
    views = _views(checked)
    latents = _latents(checked, views, model, events, stop)
    rates = rates_by_part(recipe.rates, tuple(model.parts))
    parts: tuple[Part, ...] = tuple(rates)
    grafted = graft(model, recipe.adapter.name, recipe.adapter.settings, seed=recipe.train.seed, parts=parts)
    ups = begins_at_zero(grafted) if recipe.rates.lora_plus_ratio else frozenset()
    grafted.training = True
    model.checkpoint_gradients(recipe.train.gradient_checkpointing)
    groups, base_rates = rate_groups(grafted, recipe.rates, rates, ups)
    buckets = [placement.bucket_wh for placement in checked.placements]
    per_epoch = steps_per_epoch(checked)
    total_steps = recipe.train.length.steps(per_epoch)
    warmup = cast(ScheduleSettings, recipe.schedule.settings).warmup
    if warmup.steps(total_steps) >= total_steps:
        raise UserError(
            f"schedule.warmup is {warmup}, and the whole run has {total_steps}: the learning rate would never be reached. "
            "Shorten the warm-up, or lengthen the run. Nothing was started."
        )
    objective = find("objective", recipe.objective.name).load()(recipe.objective.settings, model)
    averages = Averages(groups, recipe.train.ema) if recipe.train.ema else None
    card = cast(OptimizerCard, find("optimizer", recipe.optimizer.name))
    return Bake(
        recipe=recipe,
        model=model,
        graft=grafted,
        objective=objective,
        text=TextSource(
            model, trained=any(part != "denoiser" for part in parts), repeating=is_static(recipe.data.captions)
        ),
        groups=groups,
        base_rates=base_rates,
        optimizer=build(card, cast(OptimizerSettings, recipe.optimizer.settings), groups, base_rates),
        rate_of=card.rate,
        averages=averages,
        settle=_settling(recipe.train, grafted, averages),
        samples=checked.dataset.samples,
        latents=latents,
        framings=[[view.framing for view in of_sample] for of_sample in views],
        buckets=buckets,
        steps_per_epoch=per_epoch,
        total_steps=total_steps,
        captured=_captured(model, objective, grafted, groups, events),
    )


def steps_per_epoch(checked: Checked) -> int:
    """Optimizer steps of one epoch."""
    recipe, samples = checked.recipe, checked.dataset.samples
    buckets = [placement.bucket_wh for placement in checked.placements]
    batches = batches_per_epoch(buckets, [sample.repeats for sample in samples], recipe.train.batch_size)
    return math.ceil(batches / recipe.train.gradient_accumulation)


def _views(checked: Checked) -> list[list[View]]:
    """The ways each sample is seen: as it is, and mirrored if that is asked for."""
    mirrorings = (False, True) if checked.recipe.data.flip else (False,)
    return [
        [View(sample, place, mirrored) for mirrored in mirrorings]
        for sample, place in zip(checked.dataset.samples, checked.placements, strict=True)
    ]


def _latents(
    checked: Checked, views: list[list[View]], model: Model, events: Events, stop: Callable[[], bool]
) -> list[list[torch.Tensor]]:
    def progress(done: int, total: int) -> None:
        events.emit("encoding", done=done, total=total)
        if stop():
            raise Interrupted(f"Stopped after encoding {done} of {total} pictures. The same command continues.")

    def not_kept(reason: str) -> None:
        events.emit("latents_not_kept", reason=reason)

    flat = [view for of_sample in views for view in of_sample]
    found = iter(cached_latents(flat, model, checked.dataset.path / CACHE, progress, not_kept))
    return [[next(found) for _ in of_sample] for of_sample in views]


def _settling(
    train: TrainSettings, grafted: Graft, averages: Averages | None
) -> tuple[Callable[[int], Mapping[str, float]], ...]:
    """What happens to the weights after each step: limits first, then averages of what they left."""
    found: list[Callable[[int], Mapping[str, float]]] = []
    if train.max_weight_norm is not None:
        limit = norm_limit(grafted, train.max_weight_norm)
        found.append(lambda step: limit())
    if averages is not None:

        def average(step: int) -> Mapping[str, float]:
            averages.update(step)
            return {}

        found.append(average)
    return tuple(found)


def _captured(
    model: Model, objective: Objective, grafted: Graft, groups: Sequence[FlatGroup], events: Events
) -> Captured | None:
    """Recordings pay on a GPU, where launching costs more than computing; a CPU has nothing to gain."""
    if model.device.type != "cuda":
        return None

    def not_recorded(reason: str) -> None:
        events.emit("not_recorded", reason=reason)

    of_inputs, record = functools.partial(loss_of, model, objective), CudaGraphs(model.device)
    return Captured(of_inputs, groups, model.device, record, not_recorded, grafted.ahead)
