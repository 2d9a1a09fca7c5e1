"""Checkpoints: LoRA files with full metadata, or whole model folders for adapters that train the model itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lorabake
from lorabake.base.cards import find
from lorabake.base.files import sha256_file
from lorabake.dataset.folder import Sample
from lorabake.formats.hashes import legacy_file_hash
from lorabake.formats.kohya import write_lora
from lorabake.formats.metadata import TrainingFacts, training_metadata
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.optimizers.schedules import ScheduleCard, ScheduleSettings
from lorabake.protocols.family import ModelFacts
from lorabake.protocols.optimizer import OptimizerSettings
from lorabake.recipe import Checked, Recipe
from lorabake.train.awake import awake
from lorabake.train.bake import Bake


def checkpoint_name(name: str, bake: Bake, step: int) -> str:
    """``mira-000003`` after epoch 3, ``mira-step00000500`` inside an epoch, ``mira`` at the end."""
    if step >= bake.total_steps:
        return name
    epoch, inside = divmod(step, bake.steps_per_epoch)
    return f"{name}-step{step:08d}" if inside else f"{name}-{epoch:06d}"


def write_checkpoint(folder: Path, checked: Checked, bake: Bake, step: int, ema: float | None = None) -> Path:
    """Write the adapter as it is after ``step`` optimizer steps; returns its path. ``ema``: its weights are the average of this decay."""
    name = checkpoint_name(checked.recipe.output.name or "lora", bake, step) + (f"-ema{ema:g}" if ema else "")
    if bake.graft.card.saves == "model":
        with awake(bake.model):
            bake.model.save(folder / name)
        return folder / name
    path = folder / f"{name}.safetensors"
    write_lora(
        path,
        bake.graft.tensors(),
        training_metadata(replace(_facts(checked, bake, step), ema_decay=ema)),
        checked.recipe.save.dtype,
    )
    return path


def _facts(checked: Checked, bake: Bake, step: int) -> TrainingFacts:
    recipe, facts, dataset = checked.recipe, checked.facts, checked.dataset
    regularisation, augment = checked.regularisation, recipe.data.augment
    train, captions, buckets = recipe.train, recipe.data.captions, recipe.data.buckets
    schedule = cast(ScheduleCard, find("schedule", recipe.schedule.name))
    warmup = cast(ScheduleSettings, recipe.schedule.settings).warmup
    epochs = -(-bake.total_steps // bake.steps_per_epoch)
    return TrainingFacts(
        output_name=recipe.output.name or "lora",
        training_comment=recipe.output.comment,
        trigger_words=[recipe.output.trigger] if recipe.output.trigger else [],
        lorabake_version=lorabake.__version__,
        start_from=bake.started_from,
        base_model_version=facts.base_version,
        architecture=facts.architecture,
        implementation=facts.implementation,
        timestep_range=_timestep_range(recipe),
        **bake.hashes(),
        v2=facts.base_version.startswith("sd_v2"),
        prediction_type=None if facts.prediction == "flow" else facts.prediction,
        sd_model_name=facts.name,
        network_module=bake.graft.card.network_module,
        num_train_images=sum(sample.repeats for sample in checked.samples),
        num_batches_per_epoch=checked.length.batches_per_epoch,
        num_reg_images=sum(regularisation.turns.repeats) if regularisation else 0,
        num_validation_images=len(checked.held_out.samples) if checked.held_out else 0,
        **_validation(checked),
        dataset_dirs=_folders(dataset.samples, dataset.path.name),
        reg_dataset_dirs=_folders(list(dict.fromkeys(regularisation.samples)), "") if regularisation else {},
        prior_loss_weight=recipe.data.prior_loss_weight,
        tag_frequency=dataset.tag_frequency(),
        resolution=buckets.resolution_wh,
        enable_bucket=buckets.enabled,
        bucket_no_upscale=not buckets.upscale,
        min_bucket_reso=buckets.smallest,
        max_bucket_reso=buckets.largest,
        bucket_info=_bucket_info(checked),
        flip_aug=recipe.data.flip,
        color_aug=augment.tints,
        random_crop=augment.random_crop,
        face_crop_aug_range=str(augment.face_crop) if augment.face_crop else None,
        cache_latents=not augment.fresh,
        shuffle_caption=captions.shuffle,
        keep_tokens=captions.keep_tokens,
        caption_dropout_rate=captions.caption_dropout,
        caption_dropout_every_n_epochs=captions.caption_dropout_every_n_epochs,
        caption_tag_dropout_rate=captions.tag_dropout,
        max_token_length=recipe.model.max_tokens if recipe.model.max_tokens != 75 else None,
        clip_skip=recipe.model.clip_skip,
        t5xxl_max_token_length=recipe.model.t5_tokens,
        num_epochs=epochs,
        epoch=-(-step // bake.steps_per_epoch),
        steps=step,
        max_train_steps=bake.total_steps,
        batch_size_per_device=train.batch_size,
        total_batch_size=train.batch_size * train.gradient_accumulation,
        gradient_accumulation_steps=train.gradient_accumulation,
        gradient_checkpointing=bool(train.gradient_checkpointing),
        learning_rate=recipe.rates.lr or 0.0,
        unet_lr=recipe.rates.lr,
        text_encoder_lr=list(text_rates)
        if isinstance(text_rates := recipe.rates.text_encoder_lr, tuple)
        else text_rates,
        optimizer=_optimizer(checked, bake),
        lr_scheduler=schedule.kohya_name or schedule.name,
        lr_scheduler_args=recipe.schedule.settings.model_dump(mode="json", exclude_defaults=True, exclude={"warmup"}),
        lr_warmup_steps=warmup.steps(bake.total_steps),
        max_grad_norm=train.max_grad_norm,
        scale_weight_norms=train.max_weight_norm,
        mixed_precision=train.precision if train.precision in ("bf16", "fp16") else "no",
        fp8_base=recipe.model.quantize == "fp8",
        seed=train.seed,
        **_adapter_facts(recipe),
        **recipe.objective.settings.metadata(),
    )


def _adapter_facts(recipe: Recipe) -> dict[str, Any]:
    """What the adapter says of itself; rates by layer are among its arguments, as other trainers have them."""
    told = recipe.adapter.settings.metadata()
    by_layer = {"loraplus_lr_ratio": recipe.rates.lora_plus_ratio, "block_lr": recipe.rates.block_lr}
    given = {name: value for name, value in by_layer.items() if value is not None}
    return {**told, "network_args": {**told.get("network_args", {}), **given}}


def _optimizer(checked: Checked, bake: Bake) -> str:
    """The class that steps and what it was made with, as other tools write it."""
    arguments = cast(OptimizerSettings, checked.recipe.optimizer.settings).arguments()
    made_with = ",".join(f"{name}={value}" for name, value in arguments.items())
    return f"{type(bake.optimizer).__module__}.{type(bake.optimizer).__name__}({made_with})"


def hashes_of(facts: ModelFacts) -> dict[str, str]:
    """What files say of the base model's and the VAE's own files: other tools find them by it. Reads them whole; folders have no hashes."""
    found: dict[str, str] = {}
    if facts.path.is_file():
        found = {"sd_model_hash": legacy_file_hash(facts.path), "new_sd_model_hash": sha256_file(facts.path)}
    if facts.vae is not None:
        found["vae_name"] = facts.vae.name
        if facts.vae.is_file():
            found |= {"vae_hash": legacy_file_hash(facts.vae), "new_vae_hash": sha256_file(facts.vae)}
    return found


def _timestep_range(recipe: Recipe) -> str | None:
    """The range that is trained, as kohya's scripts write it; None for all."""
    settings = recipe.objective.settings
    if not isinstance(settings, ObjectiveSettings) or (settings.min_timestep, settings.max_timestep) == (0, 1000):
        return None
    return f"{settings.min_timestep},{settings.max_timestep}"


def _validation(checked: Checked) -> dict[str, Any]:
    """What kohya's scripts say of held-out pictures; nothing where there are none."""
    settings = checked.recipe.validation
    if checked.held_out is None:
        return {}
    every = settings.every
    return {
        "validation_seed": settings.seed,
        "validation_split": settings.share,
        f"validate_every_n_{every.unit}": every.count,
    }


def _folders(samples: Sequence[Sample], top: str) -> dict[str, dict[str, int]]:
    """``ss_dataset_dirs`` of some pictures; those in no folder inside their dataset are in ``top``."""
    found: dict[str, dict[str, int]] = {}
    for sample in samples:
        row = found.setdefault(sample.folder or top, {"n_repeats": sample.repeats, "img_count": 0})
        row["img_count"] += 1
    return found


def _bucket_info(checked: Checked) -> dict[str, Any]:
    counts: Counter[tuple[int, int]] = Counter()
    error = 0.0
    if checked.regularisation:
        counts.update(checked.regularisation.turns.per_epoch)
    for sample, place in zip(checked.samples, checked.placements, strict=True):
        counts[place.bucket_wh] += sample.repeats
        error += abs(sample.width / sample.height - place.bucket_wh[0] / place.bucket_wh[1])
    buckets = {
        str(index): {"resolution": list(bucket), "count": count}
        for index, (bucket, count) in enumerate(sorted(counts.items()))
    }
    return {"buckets": buckets, "mean_img_ar_error": error / max(1, len(checked.samples))}
