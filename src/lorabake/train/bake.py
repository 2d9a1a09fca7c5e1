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
from lorabake.dataset.caption import is_static
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
from lorabake.recipe.pictures import Pictures
from lorabake.recipe.sections import TrainSettings
from lorabake.train.asked import Asked
from lorabake.train.beside import Beside
from lorabake.train.capture import Captured, CudaGraphs, Inputs
from lorabake.train.latents import View, cached_latents
from lorabake.train.loop import Bake, loss_of
from lorabake.train.masks import MaskInputs, weights
from lorabake.train.preservation import KeptInputs
from lorabake.train.rates import begins_at_zero, rate_groups, rates_by_part
from lorabake.train.starting import start_from_file
from lorabake.train.text import TextSource
from lorabake.train.validation import HeldOut, inputs_of

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
    seen = [_seen(pictures, recipe.data.flip) for pictures in checked.pictures]
    latents = [found for views, folder in zip(seen, checked.pictures, strict=True)
               for found in _latents(views, folder.home, model, events, stop)]  # fmt: skip
    views = [of_sample for of_folder in seen for of_sample in of_folder]
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
        framings=[[view.framing for view in of_sample] for of_sample in views],
        buckets=[placement.bucket_wh for pictures in checked.pictures for placement in pictures.placements],
        steps_per_epoch=checked.steps_per_epoch,
        total_steps=checked.total_steps,
        captured=_captured(model, objective, grafted, noted_2B, learning, events),
        noted_2B=noted_2B,
        held_out=_held_out(checked, model, grafted, objective, text, events, stop),
        turns=checked.regularisation.turns if checked.regularisation else None,
        more_inputs=list(_more_inputs(checked, views, latents, text)),
        beside=beside,
        started_from=started_from,
    )


def _reschedule(model: Model, settings: Settings) -> None:
    """Give the model the noise schedule that its objective wants, for steps and samples alike."""
    changes = settings.schedule() if isinstance(settings, ObjectiveSettings) else {}
    if changes:
        model.sampler = {**model.sampler, **changes}
        model.betas_T = betas_of(model.sampler)


def _seen(pictures: Pictures, flip: bool) -> list[list[View]]:
    """The ways each picture is seen: as it is, and mirrored if that is asked for."""
    return [
        [View(sample, place, mirrored) for mirrored in ((False, True) if flip else (False,))]
        for sample, place in zip(pictures.samples, pictures.placements, strict=True)
    ]


def _latents(
    views: list[list[View]], home: Path, model: Model, events: Events, stop: Callable[[], bool]
) -> list[list[torch.Tensor]]:
    """The latents of a folder's pictures, kept in the folder itself: others may be trained with them too."""

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
    views = _seen(pictures, flip=False)
    latents = [view for (view,) in _latents(views, pictures.home, model, events, stop)]
    shown = [None if mask is None else weights(mask, recipe.data.masks, mirrored=False) for mask in pictures.masks]
    masks = shown or [None] * len(pictures.samples)
    framings = [view.framing for (view,) in views]
    inputs = inputs_of(
        pictures, latents, framings, masks, model, objective, text, recipe.data.captions, recipe.validation
    )
    return HeldOut(inputs, functools.partial(loss_of, model, objective), model, grafted)


def _more_inputs(
    checked: Checked, views: Sequence[Sequence[View]], latents: Sequence[Sequence[torch.Tensor]], text: TextSource
) -> Iterator[Callable[[Asked], Inputs]]:
    """What makes the inputs that not every run's loss is computed from."""
    recipe, regularisation = checked.recipe, checked.regularisation
    if recipe.preservation.weight > 0:
        yield KeptInputs(text, recipe.preservation, recipe.train.seed)
    masks = [mask for of in checked.pictures for mask in of.masks or [None] * len(of.samples)]
    if any(mask is not None for mask in masks):
        mirrored = [[view.mirrored for view in of_sample] for of_sample in views]
        cells = [of_sample[0].shape[1:] for of_sample in latents]
        outside = recipe.preservation.outside_masks
        yield MaskInputs(masks, mirrored, cells, recipe.data.masks, recipe.train.seed, outside)
    if regularisation and regularisation.weight != 1:
        counts = [1.0] * len(checked.dataset) + [regularisation.weight] * len(regularisation.samples)
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
