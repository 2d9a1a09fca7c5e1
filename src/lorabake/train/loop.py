"""The loop. Families say how to predict, adapters how a layer changes, objectives what to ask for; this joins them, and is the only one.

Legend: B batch, C channels, H and W latent height and width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorabake.base.errors import NotFinite
from lorabake.base.events import Events
from lorabake.base.streams import random_stream, stream_seed, torch_stream
from lorabake.dataset.caption import Moment, caption_for_step
from lorabake.dataset.order import Batch, epoch_batches
from lorabake.optimizers._build import rates_now
from lorabake.optimizers._flat import clip_gradients
from lorabake.optimizers.schedules import factor
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Model
from lorabake.protocols.objective import Objective
from lorabake.train.ahead import announced
from lorabake.train.asked import Asked
from lorabake.train.bake import Bake
from lorabake.train.capture import Inputs
from lorabake.train.diagnosis import diagnosis
from lorabake.train.picture_losses import by_picture
from lorabake.train.preservation import base_answer, kept_losses, taken
from lorabake.train.scaling import take_step
from lorabake.train.text import conditioning_of


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did; ``more`` is what else there is to tell of it."""

    loss: float
    grad_norm: float
    images: int
    pictures: Sequence[tuple[int, float, float]] = ()
    """Sample, timestep and loss of each row, to six digits; the loss is the picture's own, before any weight of it."""
    more: Mapping[str, float] = field(default_factory=dict)


def run_loop(bake: Bake, first_step: int, events: Events, after_step: Callable[[int], bool]) -> int:
    """Train from optimizer step ``first_step`` to the end.

    Args:
        bake: what to train.
        first_step: steps already done.
        events: told of every step.
        after_step: called with the steps done; returning True ends the run early.

    Returns:
        Steps done.

    Raises:
        NotFinite: a loss or gradient is NaN or infinite; weights are as they were before that step.
    """
    step = first_step
    try:
        for batches in _steps(bake, first_step):
            done = optimizer_step(bake, step, batches)
            step += 1
            events.emit(
                "step",
                step=step,
                epoch=(step - 1) // bake.steps_per_epoch + 1,
                loss=done.loss,
                grad_norm=done.grad_norm,
                images=done.images,
                lr=rates_now(bake.groups, bake.optimizer, bake.rate_of),
                pictures=done.pictures,
                **done.more,
            )
            if after_step(step):
                return step
    finally:
        if bake.pictures:
            bake.pictures.stop()
    return step


def optimizer_step(bake: Bake, step: int, batches: Sequence[Batch]) -> Step:
    """Forward and backward of every batch in ``batches``, then one step of the optimizer on their mean gradient."""
    recipe = bake.recipe
    scale = factor(recipe.schedule.name, recipe.schedule.settings, step, bake.total_steps)  # pyright: ignore[reportArgumentType]
    for group, rate, param_group in zip(bake.groups, bake.base_rates, bake.optimizer.param_groups, strict=True):
        group.zero_gradient()
        param_group["lr"] = rate * scale
    if bake.beside:
        bake.beside.group.zero_gradient()
    if bake.scale:
        bake.scale.begin()
    _seed_dropout(stream_seed(recipe.train.seed, "dropout", step), bake.model.device)
    total = torch.zeros((), device=bake.model.device)
    noted: list[Tensor] = []
    for micro, batch in enumerate(batches):
        total += _add_gradient(bake, step, micro, batch, len(batches))
        if bake.noted_2B is not None:
            noted.append(bake.noted_2B[:, : len(batch)].clone().flatten())  # the next batch overwrites it
    if bake.scale:
        bake.scale.unscale()
    norm = clip_gradients(list(bake.groups), recipe.train.max_grad_norm)
    # the only time a step waits for a GPU
    loss_value, norm_value, *told = torch.cat([total[None], norm.to(total)[None], *noted]).tolist()
    if not (math.isfinite(loss_value) and (bake.scale or math.isfinite(norm_value))):
        raise NotFinite(diagnosis(bake, step, batches, loss_value))
    more = dict(take_step(bake.scale, norm_value, bake.optimizer, bake.beside))
    for settle in bake.settle:
        more |= settle(step)
    shown_norm = norm_value if math.isfinite(norm_value) else 0.0
    return Step(loss_value, shown_norm, sum(map(len, batches)), by_picture(batches, told), more)


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Layers' own dropout draws from the device's global generator. (``torch.manual_seed`` would keep a note of every call.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _add_gradient(bake: Bake, step: int, micro: int, batch: Batch, batches: int) -> Tensor:
    """Add one batch's share of the gradient of a step of ``batches``; returns its share of the loss, 0-d, without a history."""
    if bake.captured is not None:
        return bake.captured(batch_inputs(bake, step, micro, batch), batches)
    with bake.graft.ahead():
        loss = batch_loss(bake, step, micro, batch) / batches
        loss.backward(bake.scale and bake.scale.factor)
    return loss.detach()


def batch_loss(bake: Bake, step: int, micro: int, batch: Batch) -> Tensor:
    """Mean loss of one batch, differentiable in the adapter's weights."""
    inputs = batch_inputs(bake, step, micro, batch)
    on_device = {name: tensor.to(bake.model.device, non_blocking=True) for name, tensor in inputs.items()}
    return loss_of(bake.model, bake.objective, on_device, bake.graft, bake.noted_2B)


def batch_inputs(bake: Bake, step: int, micro: int, batch: Batch) -> Inputs:
    """All that one batch's loss is computed from, on the CPU: whatever is drawn, read or looked up happens here.

    ``latents_BCHW`` and ``noise_BCHW`` (float32; ``mixed_BCHW`` if that is mixed in instead), ``timesteps_B``, and under names of their own
    what is told of captions and framings.
    Every tensor has the batch first. For a GPU they lie in pinned memory, from where copies need no waiting.
    """
    seed = bake.recipe.train.seed
    views = list(_draw_views(bake, step, micro, batch))
    latents_BCHW = torch.stack([bake.latents[index][view] for index, view in views])
    moment = Moment(step, step // bake.steps_per_epoch + 1, bake.token_warmup_steps)
    captions = [
        caption_for_step(
            bake.samples[index].caption,
            bake.captions_of(index),
            random_stream(seed, "captions", step, micro, slot),
            moment,
        )
        for slot, index in enumerate(batch)
    ]
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=torch_stream(seed, "noise", step, micro))

    def stream(name: str, slot: int) -> torch.Generator:
        """A picture's own, and one more for each time that it is in the batch."""
        return torch_stream(seed, name, step, micro, batch[slot], batch[:slot].count(batch[slot]))

    inputs: Inputs = {
        "latents_BCHW": latents_BCHW,
        **bake.objective.noise(noise_BCHW, latents_BCHW, stream),
        "timesteps_B": bake.objective.draw_timesteps(latents_BCHW.shape, torch_stream(seed, "timesteps", step, micro)),
        **bake.text(captions),
        **bake.model.frame([bake.framings[index][view] for index, view in views]),
    }
    for more in bake.more_inputs:
        inputs |= more(Asked(step, micro, views, captions))
    if bake.model.device.type == "cuda":
        return {name: tensor.pin_memory() for name, tensor in inputs.items()}
    return inputs


def _draw_views(bake: Bake, step: int, micro: int, batch: Batch) -> Iterator[tuple[int, int]]:
    """Each sample of a batch with one of its views: which look, and whether it is mirrored, are drawn from streams of their own."""
    seed, data = bake.recipe.train.seed, bake.recipe.data
    ways, mirrors = 1 + data.flip, random_stream(seed, "flip", step, micro)
    looks = random_stream(seed, "looks", step, micro) if data.augment.varies else None
    for index in batch:
        look = looks.randrange(len(bake.latents[index]) // ways) if looks else 0
        yield index, look * ways + mirrors.randrange(ways)


def loss_of(
    model: Model, objective: Objective, inputs: Inputs, graft: Graft | None = None, noted_2B: Tensor | None = None
) -> Tensor:
    """Mean loss of a batch, 0-d, given its inputs on the model's device.

    Nothing but operations on that device, whose order depends on shapes alone: so a GPU can record them and run them again. Inputs that
    not every run has: ``mask_B1HW``, how much each place counts in the mean over a picture; ``weight_B``, how much each picture;
    ``outside_B1HW``, how much the base's own answer counts at each place; and what is told of captions that are to be answered as the base
    does (:mod:`lorabake.train.preservation`). For the last two the adapter is needed, to ask the base without it.
    Each row's own loss and timestep are noted in ``noted_2B``, if given.
    """
    told = dict(inputs)
    latents_BCHW, noise_BCHW, timesteps_B = (told.pop(name) for name in ("latents_BCHW", "noise_BCHW", "timesteps_B"))
    mask_B1HW, weight_B, outside_B1HW = (told.pop(name, None) for name in ("mask_B1HW", "weight_B", "outside_B1HW"))
    kept, mixed_BCHW = taken(told), told.pop("mixed_BCHW", noise_BCHW)
    noisy_BCHW = objective.corrupt(latents_BCHW, mixed_BCHW, timesteps_B)
    prediction_BCHW = model.predict(noisy_BCHW, timesteps_B, conditioning_of(model, told))
    target_BCHW = objective.target(latents_BCHW, noise_BCHW, timesteps_B)
    error_BCHW = objective.error(prediction_BCHW, target_BCHW, timesteps_B)
    if mask_B1HW is not None:
        error_BCHW = error_BCHW * mask_B1HW
    if outside_B1HW is not None:
        base_BCHW = base_answer(model, graft, noisy_BCHW, timesteps_B, told)
        error_BCHW = error_BCHW + objective.error(prediction_BCHW, base_BCHW, timesteps_B) * outside_B1HW
    loss_B = objective.weigh(error_BCHW.mean((1, 2, 3)), timesteps_B)
    if noted_2B is not None:
        noted_2B[0, : len(loss_B)], noted_2B[1, : len(loss_B)] = loss_B.detach(), timesteps_B
    if weight_B is not None:
        loss_B = loss_B * weight_B
    if kept:
        loss_B = loss_B + kept_losses(model, objective, graft, noisy_BCHW, timesteps_B, told, kept)
    return loss_B.mean()


def _steps(bake: Bake, first_step: int) -> Iterator[Sequence[Batch]]:
    """The batches of each optimizer step from ``first_step`` to the last; where pictures are read at each, the next one's have been begun."""

    def all_steps() -> Iterator[Sequence[Batch]]:
        step, per_epoch = first_step, bake.steps_per_epoch
        while step < bake.total_steps:
            rest = itertools.islice(_epoch(bake, step // per_epoch, skip=step % per_epoch), bake.total_steps - step)
            for batches in rest:
                yield batches
                step += 1

    def rows(step: int, batches: Sequence[Batch]) -> Iterator[tuple[int, int]]:
        return (row for micro, batch in enumerate(batches) for row in _draw_views(bake, step, micro, batch))

    if bake.pictures is None:
        return all_steps()
    told = ((batches, rows(step, batches)) for step, batches in enumerate(all_steps(), first_step))
    return announced(told, bake.pictures)


def _epoch(bake: Bake, epoch: int, skip: int) -> Iterator[Sequence[Batch]]:
    """The batches of each optimizer step of one epoch, from step ``skip`` of it."""
    train = bake.recipe.train
    repeats = [sample.repeats for sample in bake.samples[: bake.trained]]
    if bake.turns is not None:
        repeats += bake.turns.of_epoch(epoch)
    batches = epoch_batches(bake.buckets, repeats, train.batch_size, train.seed, epoch)
    for start in range(skip * train.gradient_accumulation, len(batches), train.gradient_accumulation):
        yield batches[start : start + train.gradient_accumulation]
