"""What a LoRA file says about how it was made: ``ss_*``, ``modelspec.*`` and ``sshs_*``, the keys other tools read.

All values are text, a missing value is ``None`` spelled out, and tables are JSON, as kohya's sd-scripts write them. Two
things are left out on purpose. There is no time, session or commit, because training the same recipe twice must give
the same bytes. And there are no folders, because a published file should not tell how its maker's disk is laid out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Number = int | float
Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """A run in plain values. Every field becomes ``ss_<field>``, except those that say otherwise."""

    # What it is
    output_name: str
    training_comment: str | None = None
    """The trigger words are added to it."""
    trigger_words: Sequence[str] = ()
    """``modelspec.trigger_phrase``, and part of ``ss_training_comment``."""
    lorabake_version: str
    """Written under its own name."""
    start_from: str | None = None
    """LoRA file that was trained on: its name and the hash of its weights. ``lorabake_start_from``; left out without one."""
    implementation: str = "diffusers"
    """``modelspec.implementation``: whose layer names the file follows; other families than SD1/SD2 name another project here."""

    # Base model
    base_model_version: str
    """``sd_v1``, ``sd_v2_v``, ``sdxl_base_v1-0`` …"""
    architecture: str
    """``modelspec.architecture`` without its ``/lora``, e.g. ``stable-diffusion-v1``."""
    prediction_type: Literal["epsilon", "v"] | None = "epsilon"
    """``modelspec.prediction_type``; None for flow models, for which it has no word."""
    v2: bool = False
    sd_model_name: str
    sd_model_hash: str | None = None
    """AutoV1 of the base file; left out where the base is a folder, and so is the next."""
    new_sd_model_hash: str | None = None
    """sha256 of the base file."""
    vae_name: str | None = None
    """A VAE other than the base's own; left out without one, and so are its hashes."""
    vae_hash: str | None = None
    new_vae_hash: str | None = None

    # Network
    network_module: str
    network_dim: int | None = None
    network_alpha: Number | None = None
    network_dropout: Number | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    """Left out when empty."""
    scale_weight_norms: Number | None = None

    # Pictures
    num_train_images: int
    """Times repeats."""
    num_reg_images: int = 0
    num_validation_images: int = 0
    num_batches_per_epoch: int
    dataset_dirs: Mapping[str, Mapping[str, int]]
    """``{folder: {"n_repeats": 10, "img_count": 20}}``."""
    reg_dataset_dirs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]]
    """``{folder: {tag: pictures with it}}``, not multiplied by repeats."""
    resolution: Size
    enable_bucket: bool
    bucket_no_upscale: bool = False
    min_bucket_reso: int | None = None
    max_bucket_reso: int | None = None
    bucket_info: Mapping[str, Any] | None = None
    """``{"buckets": {"0": {"resolution": [512, 512], "count": 200}}, "mean_img_ar_error": 0.0}``."""
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: str | None = None
    cache_latents: bool = False

    # Captions
    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_dropout_rate: Number = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: Number = 0.0
    max_token_length: int | None = None
    clip_skip: int | None = None
    """Also ``modelspec.encoder_layer``."""

    # Optimisation
    num_epochs: int
    epoch: int
    """The epoch in which this file was written."""
    steps: int
    """Optimizer steps up to this file."""
    max_train_steps: int
    batch_size_per_device: int
    total_batch_size: int
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: Number
    unet_lr: Number | None = None
    text_encoder_lr: Number | Sequence[Number] | None = None
    """One for all text encoders, or a list."""
    optimizer: str
    """Class and arguments, e.g. ``torch.optim.adamw.AdamW(weight_decay=0.01)``."""
    lr_scheduler: str
    lr_scheduler_args: Mapping[str, Any] = field(default_factory=dict)
    """What is not as usual; left out when empty. kohya's scripts take it and do not write it."""
    lr_warmup_steps: int = 0
    max_grad_norm: Number | None = None
    ema_decay: Number | None = None
    """Of the running average of the weights that the file holds; left out without one. kohya's scripts have none."""
    mixed_precision: str = "no"
    fp8_base: bool = False
    seed: int

    # Loss and noise
    timestep_range: str | None = None
    """``modelspec.timestep_range``: ``"250,960"`` where only timesteps from the first to below the last were trained."""
    prior_loss_weight: Number = 1.0
    min_snr_gamma: Number | None = None
    debiased_estimation: bool = False
    zero_terminal_snr: bool = False
    noise_offset: Number | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: Number | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: Number | None = None
    ip_noise_gamma: Number | None = None
    ip_noise_gamma_random_strength: bool = False
    loss_type: str = "l2"
    huber_schedule: str | None = None
    huber_scale: Number | None = None
    huber_c: Number | None = None
    weighting_scheme: str | None = None
    """How much timesteps count, in ways that have no field of their own; left out without one, and so are the numbers of ``p2``."""
    p2_gamma: Number | None = None
    p2_k: Number | None = None

    # Flow models alone
    timestep_sampling: str | None = None
    sigmoid_scale: Number | None = None
    discrete_flow_shift: Number | None = None
    logit_mean: Number | None = None
    logit_std: Number | None = None
    model_prediction_type: str | None = None
    t5xxl_max_token_length: int | None = None
    """Tokens of a caption that T5 read; kohya's scripts have the setting and do not write it."""

    # Validation
    validation_seed: int | None = None
    validation_split: Number = 0.0
    validate_every_n_epochs: int | None = None
    validate_every_n_steps: int | None = None


_WRITTEN_APART = {
    "trigger_words",
    "training_comment",
    "lorabake_version",
    "start_from",
    "implementation",
    "timestep_range",
    "architecture",
    "prediction_type",
}
_OF_FLOW = [
    "timestep_sampling",
    "sigmoid_scale",
    "discrete_flow_shift",
    "logit_mean",
    "logit_std",
    "model_prediction_type",
    "t5xxl_max_token_length",
]
_LEFT_OUT_WHEN_EMPTY = {
    "sd_model_hash",
    "new_sd_model_hash",
    "vae_name",
    "vae_hash",
    "new_vae_hash",
    "network_args",
    "lr_scheduler_args",
    "ema_decay",
    "weighting_scheme",
    "p2_gamma",
    "p2_k",
}
_FILES = {"output_name", "sd_model_name", "vae_name"}
_BY_FOLDER = {"dataset_dirs", "reg_dataset_dirs", "tag_frequency"}


def training_metadata(facts: TrainingFacts) -> dict[str, str]:
    """Everything a LoRA file says of itself but for the hashes of its weights (:func:`lorabake.formats.hashes.with_hashes`)."""
    metadata = {"lorabake_version": facts.lorabake_version, "ss_training_comment": _comment(facts)}
    if facts.start_from:
        metadata["lorabake_start_from"] = _written(facts.start_from)
    for item in dataclasses.fields(facts):
        value = getattr(facts, item.name)
        if item.name in _WRITTEN_APART or (item.name in _LEFT_OUT_WHEN_EMPTY and not value):
            continue
        if item.name in _OF_FLOW and value is None:
            continue
        if item.name in _BY_FOLDER:
            value = _by_base_name(value)
        elif item.name in _FILES:
            value = base_name(value)
        metadata[f"ss_{item.name}"] = _written(value, table=item.name == "bucket_info")
    return metadata | _model_spec(facts)


def _model_spec(facts: TrainingFacts) -> dict[str, str]:
    """Source: https://github.com/Stability-AI/ModelSpec, version 1.0.1."""
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{facts.architecture}/lora",
        "implementation": facts.implementation,
        "title": base_name(facts.output_name),
        "resolution": "{}x{}".format(*facts.resolution),
        "prediction_type": facts.prediction_type,
        "encoder_layer": facts.clip_skip,
        "trigger_phrase": ", ".join(facts.trigger_words) or None,
        "timestep_range": facts.timestep_range,
    }
    return {f"modelspec.{key}": _written(value) for key, value in values.items() if value is not None}


def _comment(facts: TrainingFacts) -> str:
    trigger = f"trigger words: {', '.join(facts.trigger_words)}" if facts.trigger_words else None
    return _written("; ".join(filter(None, (facts.training_comment, trigger))) or None)


def _written(value: Any, table: bool = False) -> str:
    """A value as text: JSON for tables, ``str`` for the rest; folders and what is not Unicode are taken out."""
    if table or isinstance(value, Mapping):
        return json.dumps(_without_folders(value), sort_keys=True)
    return _without_folders(str(value))


# Folders are taken out of every text, whatever field it came in by: people put paths into comments and arguments.
_BEGINNINGS = "|".join(
    (
        r"file:/+",
        r"(?<![A-Za-z0-9])[A-Za-z]:[\\/]+(?=\w)",  # C:\
        r"\\\\(?=[\w?.]+\\)",  # \\server\
        r"(?<![\w/])~\w*[\\/]",
        r"(?<![\w/])/(?:home|Users|root|mnt|media|tmp|var|opt|srv|data|private|Volumes|workspace|content|kaggle)/",
        r"(?<![^\s\"'=(\[,;:])/[\w.@+-]+/[\w.@+-]+/",
    )
)
_FOLDERS = re.compile(rf"(?:{_BEGINNINGS})(?:[^\\/\n\",;]*[\\/])*")
_ABSOLUTE = re.compile(r"(?:/+[^/]+/.|[A-Za-z]:[\\/]|\\\\|~[^\\/]*[\\/]|file:/).*", re.IGNORECASE)


def base_name(path: str) -> str:
    """The last part of a path, whatever system it comes from."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_without_folders(str(key)): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "replace").decode()  # file names may hold bytes that are no Unicode
    if text.startswith("data:image/"):  # base64 may look like anything
        return text
    return base_name(text) if _ABSOLUTE.fullmatch(text) and base_name(text) else _FOLDERS.sub("", text)


def _by_base_name(table: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with folders named by their last part; a second folder of the same name gets a number."""
    named: dict[str, Any] = {}
    for folder, value in table.items():
        name, count = base_name(folder), 1
        while (unique := name if count == 1 else f"{name} ({count})") in named:
            count += 1
        named[unique] = value
    return named
