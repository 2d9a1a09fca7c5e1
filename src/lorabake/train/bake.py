"""From a checked recipe to everything the loop works with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
from lorabake.train.capture import Captured, CudaGraphs
from lorabake.train.latents import View, cached_latents, fresh_latent
from lorabake.train.loop import Bake, loss_of
from lorabake.train.text import TextSource
from lorabake.train.views import Lazy, views_of

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
    views = views_of(checked.samples, checked.placements, recipe.data, events)
    latents = _latents(checked, views, model, events, stop)
    text_rate = recipe.rates.text_encoder_lr or 0.0
    rates: dict[Part, float] = dict.fromkeys(model.parts, text_rate)
    rates["denoiser"] = recipe.rates.lr or 0.0
    parts: tuple[Part, ...] = tuple(part for part in model.parts if rates[part] > 0)
    grafted = graft(model, recipe.adapter.name, recipe.adapter.settings, seed=recipe.train.seed, parts=parts)
    grafted.training = True
    model.checkpoint_gradients(recipe.train.gradient_checkpointing)
    groups = [FlatGroup(part, parameters) for part, parameters in grafted.parameters().items()]
    base_rates = [rates[group.name] for group in groups]  # pyright: ignore[reportArgumentType]
    buckets = [placement.bucket_wh for placement in checked.placements]
    per_epoch, total = checked.length.steps_per_epoch, checked.length.steps
    objective = find("objective", recipe.objective.name).load()(recipe.objective.settings, model)
    return Bake(
        recipe=recipe,
        model=model,
        graft=grafted,
        objective=objective,
        text=TextSource(model, trained=text_rate > 0, repeating=is_static(recipe.data.captions)),
        groups=groups,
        base_rates=base_rates,
        optimizer=_optimizer(recipe, groups, base_rates),
        samples=checked.samples,
        latents=latents,
        framings=[Lazy(len(of_sample), lambda at, own=of_sample: own[at].framing) for of_sample in views],
        buckets=buckets,
        steps_per_epoch=per_epoch,
        total_steps=total,
        token_warmup_steps=warmup_steps(recipe.data.captions, per_epoch, total),
        captured=_captured(model, objective, grafted, groups, events),
    )


def _latents(
    checked: Checked, views: Sequence[Sequence[View]], model: Model, events: Events, stop: Callable[[], bool]
) -> list[Sequence[torch.Tensor]]:
    if checked.recipe.data.augment.fresh:
        return [Lazy(len(own), lambda at, own=own: fresh_latent(own[at], model)) for own in views]

    def progress(done: int, total: int) -> None:
        events.emit("encoding", done=done, total=total)
        if stop():
            raise Interrupted(f"Stopped after encoding {done} of {total} pictures. The same command continues.")

    def not_kept(reason: str) -> None:
        events.emit("latents_not_kept", reason=reason)

    flat = [view for of_sample in views for view in of_sample]
    found = iter(cached_latents(flat, model, checked.dataset.path / CACHE, progress, not_kept))
    return [[next(found) for _ in of_sample] for of_sample in views]


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


def _optimizer(recipe: Recipe, groups: list[FlatGroup], rates: list[float]) -> Optimizer:
    card = find("optimizer", recipe.optimizer.name)
    arguments = recipe.optimizer.settings.model_dump()
    return card.load()(
        [{"params": [group.values], "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        **arguments,
    )
