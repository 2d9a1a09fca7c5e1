"""From a checked recipe to everything the loop works with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from lorabake.adapters import graft
from lorabake.adapters._norms import norm_limit
from lorabake.base.cards import find
from lorabake.base.errors import Interrupted
from lorabake.base.events import Events
from lorabake.base.machine import check_device
from lorabake.base.streams import random_stream
from lorabake.base.units import size
from lorabake.dataset.augment import Box
from lorabake.dataset.caption import caption_for_step, full_caption, is_static, warmup_steps, without_additions
from lorabake.dataset.folder import Sample
from lorabake.families import family_card, load_model
from lorabake.families.networks.noise import reschedule
from lorabake.families.networks.quantised import quantise, saved
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.optimizers._averages import Averages
from lorabake.optimizers._build import build
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model, Part, Resident
from lorabake.protocols.objective import LearningObjective, Objective
from lorabake.protocols.optimizer import OptimizerCard, OptimizerSettings
from lorabake.recipe import Checked
from lorabake.recipe.sections import TrainSettings
from lorabake.train.ahead import PicturesAhead
from lorabake.train.asked import Asked
from lorabake.train.bake import Bake
from lorabake.train.behind import behind
from lorabake.train.beside import Beside
from lorabake.train.capture import Captured, CudaGraphs, Inputs
from lorabake.train.checkpoint import hashes_of
from lorabake.train.faces import cached_faces
from lorabake.train.latents import View, cached_latents
from lorabake.train.loop import loss_of
from lorabake.train.masks import MaskInputs, masks_of, weights
from lorabake.train.preservation import KeptInputs
from lorabake.train.rates import begins_at_zero, rate_groups, rates_by_part
from lorabake.train.scaling import LossScale
from lorabake.train.starting import start_from_file
from lorabake.train.text import TextSource
from lorabake.train.validation import HeldOut, inputs_of
from lorabake.train.views import each_of, views_of

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHE = Path(".lorabake", "latents")
"""Where a dataset keeps its latents. Safe to delete."""
TEXT_CACHE = Path(".lorabake", "text")
"""Where a dataset keeps what text encoders say of captions. Safe to delete."""
FACES_CACHE = Path(".lorabake", "faces")
"""Where a dataset keeps where its pictures have faces. Safe to delete."""


def prepare(checked: Checked, events: Events, stop: Callable[[], bool] = lambda: False) -> Bake:
    """Load the model, graft the adapter, encode what is not cached, and build the optimizer.

    Raises:
        Interrupted: ``stop()`` was true while pictures were being encoded; those that are done stay in the cache.
        UserError: the recipe wants a GPU, and there is none.
    """
    recipe = checked.recipe
    dtype, device = _DTYPES[recipe.train.precision or "fp32"], recipe.train.device or "cpu"
    check_device(device, "train.device")
    hashes = behind(lambda: hashes_of(checked.facts))
    reading = recipe.model.reading(family_card(checked.facts).text_options)
    model = load_model(checked.facts, late=True, dtype=dtype, device=device, **reading)
    objective = recipe.objective.settings
    reschedule(model, objective.schedule() if isinstance(objective, ObjectiveSettings) else {})
    if recipe.model.quantize:
        quantise(model, recipe.model.quantize)
        reading = {**reading, "quantize": recipe.model.quantize}
    swapped = model.swap_blocks(recipe.train.blocks_to_swap) if recipe.train.blocks_to_swap else None
    seen = _seen(checked, events, stop)
    pictures = PicturesAhead([views for own in seen for views in own]) if recipe.data.augment.fresh else None
    latents = pictures.latents(model) if pictures else _latents_trained(checked, seen, model, events, stop)
    asked_views = _views_held_out(checked)
    asked_latents = _latents(asked_views, checked.held_out.home, model, events, stop) if checked.held_out else []
    rates = rates_by_part(recipe.rates, tuple(model.parts))
    parts: tuple[Part, ...] = tuple(rates)
    text = TextSource(model, trained=parts != ("denoiser",), repeating=is_static(recipe.data.captions), reading=reading)
    idle = _free(model, text, checked, pictures is not None, events, stop)
    if swapped:
        events.emit("note", text=f"train.blocks_to_swap: {swapped()}")
    grafted = graft(model, recipe.adapter.name, recipe.adapter.settings, seed=recipe.train.seed, parts=parts)
    ups = begins_at_zero(grafted) if recipe.rates.lora_plus_ratio else frozenset()
    grafted.training = True
    began = recipe.start.start_from
    started_from = start_from_file(Path(began), grafted, checked.facts, events) if began else None
    model.checkpoint_gradients(float(recipe.train.gradient_checkpointing))
    groups, base_rates = rate_groups(grafted, recipe.rates, rates, ups)
    averages = Averages(groups, recipe.train.ema) if recipe.train.ema else None
    card = cast(OptimizerCard, find("optimizer", recipe.optimizer.name))
    per_epoch, total = checked.length.steps_per_epoch, checked.length.steps
    objective = find("objective", recipe.objective.name).load()(recipe.objective.settings, model)
    noted_2B = torch.zeros(2, recipe.train.batch_size, device=model.device)
    beside = Beside.of(objective)
    learning = groups if beside is None else [*groups, beside.group]
    optimizer = build(card, cast(OptimizerSettings, recipe.optimizer.settings), groups, base_rates)
    scale = LossScale(optimizer, learning) if dtype == torch.float16 else None
    return Bake(
        recipe=recipe,
        model=model,
        graft=grafted,
        objective=objective,
        text=text,
        groups=groups,
        base_rates=base_rates,
        optimizer=optimizer,
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
        captured=_captured(model, objective, grafted, noted_2B, learning, events, scale, swapped is not None),
        noted_2B=noted_2B,
        held_out=_held_out(checked, asked_views, asked_latents, model, grafted, objective, text),
        turns=checked.regularisation.turns if checked.regularisation else None,
        more_inputs=list(_more_inputs(checked, seen, text)),
        beside=beside,
        started_from=started_from,
        idle=idle,
        scale=scale,
        hashes=hashes,
        pictures=pictures,
    )


def _free(
    model: Model, text: TextSource, checked: Checked, fresh: bool, events: Events, stop: Callable[[], bool]
) -> frozenset[Resident]:
    """Have in memory what steps need, and nothing else; returns what they do not need. One comes after the other has gone."""
    everything: set[Resident] = {*model.parts, "vae"}
    idle: set[Resident] = set() if fresh else {"vae"}
    model.rest(idle)
    if text.keeps:
        _keep_text(text, checked, events, stop)
        idle = (everything - {"denoiser", "vae"}) | idle
        model.rest(idle)
    model.wake(everything - idle)
    if checked.recipe.model.quantize:
        layers, now, before = saved(model)
        events.emit("note", text=f"model.quantize: {layers} layers take {size(now)} in place of {size(before)}.")
    return frozenset(idle)


def _progress(events: Events, kind: str, what: str, stop: Callable[[], bool]) -> Callable[[int, int], None]:
    """Tells how far preparing has come, and ends it where it is to stop: what is done is kept."""

    def progress(done: int, total: int) -> None:
        events.emit(kind, done=done, total=total)
        if stop():
            raise Interrupted(f"Stopped after {what.format(done, total)}. The same command continues.")

    return progress


def _not_kept(events: Events, kind: str) -> Callable[[str], None]:
    return lambda reason: events.emit(kind, reason=reason)


def _seen(checked: Checked, events: Events, stop: Callable[[], bool]) -> list[list[Sequence[View]]]:
    """The views of every picture of every folder. Where faces are is kept in the folder, as latents are."""
    progress = _progress(events, "finding_faces", "looking for faces in {} of {} pictures", stop)
    told = _not_kept(events, "faces_not_kept")

    def faces_in(home: Path) -> Callable[[Sequence[Sample]], list[list[Box]]]:
        return lambda samples: cached_faces(samples, home / FACES_CACHE, progress, told)

    data = checked.recipe.data
    return [views_of(own.samples, own.placements, data, faces_in(own.home), events) for own in checked.pictures]


def _latents_trained(
    checked: Checked, seen: Sequence[Sequence[Sequence[View]]], model: Model, events: Events, stop: Callable[[], bool]
) -> list[Sequence[torch.Tensor]]:
    """The latents of every picture of every folder, where they are kept."""
    folders = zip(seen, checked.pictures, strict=True)
    return [found for views, folder in folders for found in _latents(views, folder.home, model, events, stop)]


def _latents(
    views: Sequence[Sequence[View]],
    home: Path,
    model: Model,
    events: Events,
    stop: Callable[[], bool],
) -> list[Sequence[torch.Tensor]]:
    """The latents of a folder's pictures, kept in the folder itself: others may be trained with them too."""
    flat = [view for of_sample in views for view in of_sample]
    progress = _progress(events, "encoding", "encoding {} of {} pictures", stop)
    found = iter(cached_latents(flat, model, home / CACHE, progress, _not_kept(events, "latents_not_kept")))
    return [[next(found) for _ in of_sample] for of_sample in views]


def _keep_text(text: TextSource, checked: Checked, events: Events, stop: Callable[[], bool]) -> None:
    """Have every caption encoded that the run will show, ask about or keep as the base answers it."""
    home, *_ = (pictures.home for pictures in checked.pictures)
    progress = _progress(events, "encoding_text", "encoding {} of {} captions", stop)
    text.keep(captions_of(checked), home / TEXT_CACHE, progress, _not_kept(events, "text_not_kept"))


def captions_of(checked: Checked) -> Iterator[str]:
    """Every caption of a run whose captions are static (:func:`lorabake.dataset.caption.is_static`), some of them several times."""
    recipe = checked.recipe
    config, (training, *regularising) = recipe.data.captions, checked.pictures
    own = [(sample.caption, config) for sample in training.samples]
    own += [(sample.caption, without_additions(config)) for folder in regularising for sample in folder.samples]
    shown = [caption_for_step(caption, how, random_stream(recipe.train.seed, "captions")) for caption, how in own]
    shown += [""] * (config.caption_dropout_every_n_epochs > 0)
    yield from shown
    if recipe.preservation.weight > 0:
        yield from map(recipe.preservation.kept_caption, shown)
    if checked.held_out:
        yield from (full_caption(sample.caption, config) for sample in checked.held_out.samples)


def _views_held_out(checked: Checked) -> list[list[View]]:
    """Each picture that is not trained on, seen as it is."""
    pictures = checked.held_out
    pairs = zip(pictures.samples, pictures.placements, strict=True) if pictures else ()
    return [[View(sample, place, mirrored=False)] for sample, place in pairs]


def _held_out(
    checked: Checked,
    views: Sequence[Sequence[View]],
    latents: Sequence[Sequence[torch.Tensor]],
    model: Model,
    grafted: Graft,
    objective: Objective,
    text: TextSource,
) -> HeldOut | None:
    """What asks about pictures that are not trained on, where there are any."""
    pictures, recipe = checked.held_out, checked.recipe
    if pictures is None:
        return None
    shown = [None if mask is None else weights(mask, recipe.data.masks, mirrored=False) for mask in pictures.masks]
    masks = shown or [None] * len(pictures.samples)
    framings = [view.framing for (view,) in views]
    inputs = inputs_of(
        pictures,
        [latent for (latent,) in latents],
        framings,
        masks,
        model,
        objective,
        text,
        recipe.data.captions,
        recipe.validation,
    )
    measure = objective.unlearned() if isinstance(objective, LearningObjective) else objective
    return HeldOut(inputs, functools.partial(loss_of, model, measure), model, grafted)


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
    scale: LossScale | None,
    swapped: bool,
) -> Captured | None:
    """Recordings pay on a GPU, where launching costs more than computing; a CPU has nothing to gain. What is recorded is where weights lie, so that
    they cannot come and go."""
    if model.device.type != "cuda" or swapped:
        return None

    def not_recorded(reason: str) -> None:
        events.emit("not_recorded", reason=reason)

    of_inputs, record = (
        functools.partial(loss_of, model, objective, graft=grafted, noted_2B=noted_2B),
        CudaGraphs(model.device),
    )
    factor = scale.factor if scale else None
    return Captured(of_inputs, groups, model.device, record, not_recorded, grafted.ahead, factor)
