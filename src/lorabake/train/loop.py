"""The loop. Families say how to predict, adapters how a layer changes, objectives what to ask for; this joins them, and is the only one.

Legend: B batch, C channels, H and W latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabake.base.errors import NotFinite
from lorabake.base.events import Events
from lorabake.base.streams import random_stream, stream_seed, torch_stream
from lorabake.dataset.caption import Moment, caption_for_step
from lorabake.dataset.folder import Sample
from lorabake.dataset.order import Batch, epoch_batches
from lorabake.optimizers._flat import FlatGroup, clip_gradients
from lorabake.optimizers.schedules import factor
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Framing, Model
from lorabake.protocols.objective import Objective
from lorabake.protocols.optimizer import Optimizer
from lorabake.recipe import Recipe
from lorabake.train.capture import Captured, Inputs
from lorabake.train.text import TextSource, conditioning_of


@dataclass(frozen=True, slots=True)
class Bake:
    """Everything one run works with, ready to step."""

    recipe: Recipe
    model: Model
    graft: Graft
    objective: Objective
    text: TextSource
    groups: Sequence[FlatGroup]
    base_rates: Sequence[float]
    optimizer: Optimizer
    samples: Sequence[Sample]
    latents: Sequence[Sequence[Tensor]]
    """Latents of each sample, one per view: each of its looks as it is and, with flip, mirrored."""
    framings: Sequence[Sequence[Framing]]
    """How each of those views came to its size."""
    buckets: Sequence[tuple[int, int]]
    steps_per_epoch: int
    total_steps: int
    token_warmup_steps: int = 0
    """Optimizer steps until captions are shown with all their tags."""
    captured: Captured | None = None
    """Computes a batch's gradient from a recording, where there is something to gain from it (on a GPU)."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    images: int


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
    step, per_epoch = first_step, bake.steps_per_epoch
    while step < bake.total_steps:
        for batches in _epoch(bake, step // per_epoch, skip=step % per_epoch):
            done = optimizer_step(bake, step, batches)
            step += 1
            rates = {
                group.name: param_group["lr"]
                for group, param_group in zip(bake.groups, bake.optimizer.param_groups, strict=True)
            }
            events.emit(
                "step",
                step=step,
                epoch=(step - 1) // per_epoch + 1,
                loss=done.loss,
                grad_norm=done.grad_norm,
                images=done.images,
                lr=rates,
            )
            if after_step(step) or step == bake.total_steps:
                return step
    return step


def optimizer_step(bake: Bake, step: int, batches: Sequence[Batch]) -> Step:
    """Forward and backward of every batch in ``batches``, then one step of the optimizer on their mean gradient."""
    recipe = bake.recipe
    scale = factor(recipe.schedule.name, recipe.schedule.settings, step, bake.total_steps)  # pyright: ignore[reportArgumentType]
    for group, rate, param_group in zip(bake.groups, bake.base_rates, bake.optimizer.param_groups, strict=True):
        group.zero_gradient()
        param_group["lr"] = rate * scale
    _seed_dropout(stream_seed(recipe.train.seed, "dropout", step), bake.model.device)
    total = torch.zeros((), device=bake.model.device)
    for micro, batch in enumerate(batches):
        total += _add_gradient(bake, step, micro, batch, len(batches))
    norm = clip_gradients(list(bake.groups), recipe.train.max_grad_norm)
    loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()  # the only time a step waits for a GPU
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        raise NotFinite(_diagnose(bake, step, batches, loss_value))
    bake.optimizer.step()
    return Step(loss_value, norm_value, sum(map(len, batches)))


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
        loss.backward()
    return loss.detach()


def batch_loss(bake: Bake, step: int, micro: int, batch: Batch) -> Tensor:
    """Mean loss of one batch, differentiable in the adapter's weights."""
    inputs = batch_inputs(bake, step, micro, batch)
    on_device = {name: tensor.to(bake.model.device, non_blocking=True) for name, tensor in inputs.items()}
    return loss_of(bake.model, bake.objective, on_device)


def batch_inputs(bake: Bake, step: int, micro: int, batch: Batch) -> Inputs:
    """All that one batch's loss is computed from, on the CPU: whatever is drawn, read or looked up happens here.

    ``latents_BCHW`` and ``noise_BCHW`` (float32), ``timesteps_B``, and under names of their own what is told of captions and framings.
    Every tensor has the batch first. For a GPU they lie in pinned memory, from where copies need no waiting.
    """
    seed = bake.recipe.train.seed
    views = list(_draw_views(bake, step, micro, batch))
    latents_BCHW = torch.stack([bake.latents[index][view] for index, view in views])
    moment = Moment(step, step // bake.steps_per_epoch + 1, bake.token_warmup_steps)
    captions = [
        caption_for_step(
            bake.samples[index].caption,
            bake.recipe.data.captions,
            random_stream(seed, "captions", step, micro, slot),
            moment,
        )
        for slot, index in enumerate(batch)
    ]
    inputs: Inputs = {
        "latents_BCHW": latents_BCHW,
        "noise_BCHW": torch.randn(latents_BCHW.shape, generator=torch_stream(seed, "noise", step, micro)),
        "timesteps_B": bake.objective.draw_timesteps(latents_BCHW.shape, torch_stream(seed, "timesteps", step, micro)),
        **bake.text(captions),
        **bake.model.frame([bake.framings[index][view] for index, view in views]),
    }
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


def loss_of(model: Model, objective: Objective, inputs: Inputs) -> Tensor:
    """Mean loss of a batch, 0-d, given its inputs on the model's device.

    Nothing but operations on that device, whose order depends on shapes alone: so a GPU can record them and run them again.
    """
    told = dict(inputs)
    latents_BCHW, noise_BCHW, timesteps_B = (told.pop(name) for name in ("latents_BCHW", "noise_BCHW", "timesteps_B"))
    noisy_BCHW = objective.corrupt(latents_BCHW, noise_BCHW, timesteps_B)
    prediction_BCHW = model.predict(noisy_BCHW, timesteps_B, conditioning_of(model, told))
    target_BCHW = objective.target(latents_BCHW, noise_BCHW, timesteps_B)
    error_B = objective.error(prediction_BCHW, target_BCHW, timesteps_B).mean((1, 2, 3))
    return objective.weigh(error_B, timesteps_B).mean()


def _epoch(bake: Bake, epoch: int, skip: int) -> Iterator[Sequence[Batch]]:
    """The batches of each optimizer step of one epoch, from step ``skip`` of it."""
    train = bake.recipe.train
    repeats = [sample.repeats for sample in bake.samples]
    batches = epoch_batches(bake.buckets, repeats, train.batch_size, train.seed, epoch)
    for start in range(skip * train.gradient_accumulation, len(batches), train.gradient_accumulation):
        yield batches[start : start + train.gradient_accumulation]


def _diagnose(bake: Bake, step: int, batches: Sequence[Batch], loss: float) -> str:
    names = sorted({bake.samples[index].name for batch in batches for index in batch})
    where = f"Step {step + 1}: the {'gradient' if torch.isfinite(torch.tensor(loss)) else 'loss'} is not finite"
    pictures = f"Pictures in it: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
    bad = [name for group in bake.groups if not bool(torch.isfinite(group.values).all()) for name in [group.name]]
    if bad:
        cause = f"The trained weights of {' and '.join(bad)} are already not finite"
    elif bake.model.dtype != torch.float32:
        cause = f"Likely an overflow in {bake.model.dtype}: train with precision fp32"
    else:
        rates = ", ".join(f"{group['lr']:g}" for group in bake.optimizer.param_groups)
        cause = f"Likely a learning rate that is too high (now {rates}): try a tenth of it"
    return f"{where}. {pictures} {cause}. The last good files are kept."
