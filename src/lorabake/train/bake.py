"""From a checked recipe to everything the loop works with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from lorabake.adapters import graft
from lorabake.base.cards import find
from lorabake.base.errors import Interrupted, UserError
from lorabake.base.events import Events
from lorabake.dataset.caption import is_static, warmup_steps
from lorabake.families import family_card, load_model
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model, Part
from lorabake.protocols.objective import Objective
from lorabake.protocols.optimizer import Optimizer
from lorabake.recipe import Checked, Recipe
from lorabake.train.asked import Asked
from lorabake.train.capture import Captured, CudaGraphs, Inputs
from lorabake.train.latents import View, cached_latents, fresh_latent
from lorabake.train.loop import Bake, loss_of
from lorabake.train.masks import MaskInputs, masks_of, weights
from lorabake.train.preservation import KeptInputs
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
    seen = [views_of(own.samples, own.placements, recipe.data, events) for own in checked.pictures]
    fresh = recipe.data.augment.fresh
    latents = [found for views, folder in zip(seen, checked.pictures, strict=True)
               for found in _latents(views, folder.home, model, events, stop, fresh=fresh)]  # fmt: skip
    text_rate = recipe.rates.text_encoder_lr or 0.0
    rates: dict[Part, float] = dict.fromkeys(model.parts, text_rate)
    rates["denoiser"] = recipe.rates.lr or 0.0
    parts: tuple[Part, ...] = tuple(part for part in model.parts if rates[part] > 0)
    grafted = graft(model, recipe.adapter.name, recipe.adapter.settings, seed=recipe.train.seed, parts=parts)
    grafted.training = True
    model.checkpoint_gradients(recipe.train.gradient_checkpointing)
    groups = [FlatGroup(part, parameters) for part, parameters in grafted.parameters().items()]
    base_rates = [rates[group.name] for group in groups]  # pyright: ignore[reportArgumentType]
    text = TextSource(model, trained=text_rate > 0, repeating=is_static(recipe.data.captions))
    per_epoch, total = checked.length.steps_per_epoch, checked.length.steps
    objective = find("objective", recipe.objective.name).load()(recipe.objective.settings, model)
    noted_2B = torch.zeros(2, recipe.train.batch_size, device=model.device)
    return Bake(
        recipe=recipe,
        model=model,
        graft=grafted,
        objective=objective,
        text=text,
        groups=groups,
        base_rates=base_rates,
        optimizer=_optimizer(recipe, groups, base_rates),
        samples=[sample for pictures in checked.pictures for sample in pictures.samples],
        latents=latents,
        framings=[
            each_of(views, lambda at, views=views: views[at].framing) for of_folder in seen for views in of_folder
        ],
        buckets=[placement.bucket_wh for pictures in checked.pictures for placement in pictures.placements],
        steps_per_epoch=per_epoch,
        total_steps=total,
        token_warmup_steps=warmup_steps(recipe.data.captions, per_epoch, total),
        captured=_captured(model, objective, grafted, noted_2B, groups, events),
        noted_2B=noted_2B,
        held_out=_held_out(checked, model, grafted, objective, text, events, stop),
        turns=checked.regularisation.turns if checked.regularisation else None,
        more_inputs=list(_more_inputs(checked, seen, text)),
    )


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


def _optimizer(recipe: Recipe, groups: list[FlatGroup], rates: list[float]) -> Optimizer:
    card = find("optimizer", recipe.optimizer.name)
    arguments = recipe.optimizer.settings.model_dump()
    return card.load()(
        [{"params": [group.values], "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        **arguments,
    )
