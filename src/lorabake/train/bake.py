"""From a checked recipe to everything the loop works with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from lorabake.adapters import graft
from lorabake.adapters._norms import norm_limit
from lorabake.base.cards import Settings, find
from lorabake.base.errors import Interrupted, UserError
from lorabake.base.events import Events
from lorabake.dataset.caption import is_static, warmup_steps
from lorabake.families import family_card, load_model
from lorabake.families.networks.noise import betas_of
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.optimizers._averages import Averages
from lorabake.optimizers._build import build
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model, Part
from lorabake.protocols.objective import Objective
from lorabake.protocols.optimizer import OptimizerCard, OptimizerSettings
from lorabake.recipe import Checked
from lorabake.recipe.sections import TrainSettings
from lorabake.train.asked import Asked
from lorabake.train.beside import Beside
from lorabake.train.capture import Captured, CudaGraphs, Inputs
from lorabake.train.checkpoint import hashes_of
from lorabake.train.latents import View, cached_latents, fresh_latent
from lorabake.train.loop import Bake, loss_of
from lorabake.train.masks import MaskInputs, masks_of, weights
from lorabake.train.preservation import KeptInputs
from lorabake.train.rates import begins_at_zero, rate_groups, rates_by_part
from lorabake.train.starting import start_from_file
from lorabake.train.text import TextSource
from lorabake.train.validation import HeldOut, inputs_of
from lorabake.train.views import each_of, views_of

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
    _reschedule(model, recipe.objective.settings)
    seen = [views_of(own.samples, own.placements, recipe.data, events) for own in checked.pictures]
    fresh = recipe.data.augment.fresh
    latents = [found for views, folder in zip(seen, checked.pictures, strict=True)
               for found in _latents(views, folder.home, model, events, stop, fresh=fresh)]  # fmt: skip
    rates = rates_by_part(recipe.rates, tuple(model.parts))
    parts: tuple[Part, ...] = tuple(rates)
    grafted = graft(model, recipe.adapter.name, recipe.adapter.settings, seed=recipe.train.seed, parts=parts)
    ups = begins_at_zero(grafted) if recipe.rates.lora_plus_ratio else frozenset()
    grafted.training = True
    began = recipe.start.start_from
    started_from = start_from_file(Path(began), grafted, checked.facts, events) if began else None
    model.checkpoint_gradients(recipe.train.gradient_checkpointing)
    groups, base_rates = rate_groups(grafted, recipe.rates, rates, ups)
    averages = Averages(groups, recipe.train.ema) if recipe.train.ema else None
    card = cast(OptimizerCard, find("optimizer", recipe.optimizer.name))
    text = TextSource(model, trained=parts != ("denoiser",), repeating=is_static(recipe.data.captions))
    per_epoch, total = checked.length.steps_per_epoch, checked.length.steps
    objective = find("objective", recipe.objective.name).load()(recipe.objective.settings, model)
    noted_2B = torch.zeros(2, recipe.train.batch_size, device=model.device)
    beside = Beside.of(objective)
    learning = groups if beside is None else [*groups, beside.group]
    return Bake(
        recipe=recipe,
        model=model,
        graft=grafted,
        objective=objective,
        text=text,
        groups=groups,
        base_rates=base_rates,
        optimizer=build(card, cast(OptimizerSettings, recipe.optimizer.settings), groups, base_rates),
        rate_of=card.rate,
        averages=averages,
        settle=_settling(recipe.train, grafted, averages),
        samples=[sample for pictures in checked.pictures for sample in pictures.samples],
        latents=latents,
        framings=[
            each_of(views, lambda at, views=views: views[at].framing) for of_folder in seen for views in of_folder
        ],
        buckets=[placement.bucket_wh for pictures in checked.pictures for placement in pictures.placements],
        steps_per_epoch=per_epoch,
        total_steps=total,
        token_warmup_steps=warmup_steps(recipe.data.captions, per_epoch, total),
        captured=_captured(model, objective, grafted, noted_2B, learning, events),
        noted_2B=noted_2B,
        held_out=_held_out(checked, model, grafted, objective, text, events, stop),
        turns=checked.regularisation.turns if checked.regularisation else None,
        more_inputs=list(_more_inputs(checked, seen, text)),
        beside=beside,
        started_from=started_from,
        hashes=hashes_of(checked.facts, events),
    )


def _reschedule(model: Model, settings: Settings) -> None:
    """Give the model the noise schedule that its objective wants, for steps and samples alike."""
    changes = settings.schedule() if isinstance(settings, ObjectiveSettings) else {}
    if changes:
        model.sampler = {**model.sampler, **changes}
        model.betas_T = betas_of(model.sampler)


def _latents(
    views: Sequence[Sequence[View]],
    home: Path,
    model: Model,
    events: Events,
    stop: Callable[[], bool],
    *,
    fresh: bool = False,
) -> list[Sequence[torch.Tensor]]:
    """The latents of a folder's pictures, kept in the folder itself: others may be trained with them too. ``fresh`` ones are not kept."""
    if fresh:
        return [each_of(own, lambda at, own=own: fresh_latent(own[at], model)) for own in views]

    def progress(done: int, total: int) -> None:
        events.emit("encoding", done=done, total=total)
        if stop():
            raise Interrupted(f"Stopped after encoding {done} of {total} pictures. The same command continues.")

    def not_kept(reason: str) -> None:
        events.emit("latents_not_kept", reason=reason)

    flat = [view for of_sample in views for view in of_sample]
    found = iter(cached_latents(flat, model, home / CACHE, progress, not_kept))
    return [[next(found) for _ in of_sample] for of_sample in views]


def _held_out(
    checked: Checked,
    model: Model,
    grafted: Graft,
    objective: Objective,
    text: TextSource,
    events: Events,
    stop: Callable[[], bool],
) -> HeldOut | None:
    """What asks about pictures that are not trained on, where there are any."""
    pictures, recipe = checked.held_out, checked.recipe
    if pictures is None:
        return None
    views = [
        [View(sample, place, mirrored=False)]
        for sample, place in zip(pictures.samples, pictures.placements, strict=True)
    ]
    latents = [view for (view,) in _latents(views, pictures.home, model, events, stop)]
    shown = [None if mask is None else weights(mask, recipe.data.masks, mirrored=False) for mask in pictures.masks]
    masks = shown or [None] * len(pictures.samples)
    framings = [view.framing for (view,) in views]
    inputs = inputs_of(
        pictures, latents, framings, masks, model, objective, text, recipe.data.captions, recipe.validation
    )
    return HeldOut(inputs, functools.partial(loss_of, model, objective), model, grafted)


def _more_inputs(
    checked: Checked, seen: Sequence[Sequence[Sequence[View]]], text: TextSource
) -> Iterator[Callable[[Asked], Inputs]]:
    """What makes the inputs that not every run's loss is computed from; ``seen`` are the views of every picture of every folder."""
    recipe, regularisation = checked.recipe, checked.regularisation
    if recipe.preservation.weight > 0:
        yield KeptInputs(text, recipe.preservation, recipe.train.seed)
    if any(mask is not None for pictures in checked.pictures for mask in pictures.masks):
        config, cell = recipe.data.masks, checked.facts.latent_scale
        masks = [mask for pictures, views in zip(checked.pictures, seen, strict=True)
                 for mask in masks_of(pictures, views, config, cell)]  # fmt: skip
        mirrored = [each_of(own, lambda at, own=own: own[at].mirrored) for views in seen for own in views]
        sizes_wh = [placement.bucket_wh for pictures in checked.pictures for placement in pictures.placements]
        cells = [(height // cell, width // cell) for width, height in sizes_wh]
        yield MaskInputs(masks, mirrored, cells, config, recipe.train.seed, recipe.preservation.outside_masks)
    if regularisation and regularisation.weight != 1:
        counts = [1.0] * len(checked.samples) + [regularisation.weight] * len(regularisation.samples)
        yield lambda asked: {"weight_B": torch.tensor([counts[index] for index, _ in asked.views])}


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
    model: Model,
    objective: Objective,
    grafted: Graft,
    noted_2B: torch.Tensor,
    groups: Sequence[FlatGroup],
    events: Events,
) -> Captured | None:
    """Recordings pay on a GPU, where launching costs more than computing; a CPU has nothing to gain."""
    if model.device.type != "cuda":
        return None

    def not_recorded(reason: str) -> None:
        events.emit("not_recorded", reason=reason)

    of_inputs, record = (
        functools.partial(loss_of, model, objective, graft=grafted, noted_2B=noted_2B),
        CudaGraphs(model.device),
    )
    return Captured(of_inputs, groups, model.device, record, not_recorded, grafted.ahead)
