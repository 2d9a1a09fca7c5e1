"""Configs that the kohya_ss GUI saves: its own names and units for what it hands to sd-scripts. They are put into those, and read as those."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from lorabake.base.errors import Problem
from lorabake.recipe.imports import _values, kohya
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.imports._report import Line
from lorabake.recipe.imports._values import words

_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
    "caption_extention": "caption_extension",
}
"""What sd-scripts calls it."""
_ZERO_IS_OFF = words(
    """
adaptive_noise_scale clip_skip ip_noise_gamma max_timestep max_train_epochs max_train_steps min_snr_gamma min_timestep
multires_noise_iterations noise_offset sample_every_n_epochs sample_every_n_steps save_every_n_epochs
save_every_n_steps save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state seed
v_pred_like_loss vae_batch_size loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio
scale_weight_norms unet_lr text_encoder_lr t5xxl_lr block_lr_zero_threshold
"""
)
"""Keys that are not handed over where they are 0."""
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 0.0001,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "unet_lr": 0.0001,
    "text_encoder_lr": 0.0,
    "network_dim": 8,
    "network_alpha": 1,
    "optimizer": "AdamW8bit",
    "max_resolution": "512,512",
    "enable_bucket": True,
    "min_bucket_reso": 256,
    "max_bucket_reso": 2048,
    "bucket_reso_steps": 64,
    "bucket_no_upscale": True,
    "train_batch_size": 1,
    "save_precision": "fp16",
    "save_every_n_epochs": 1,
    "mixed_precision": "fp16",
    "epoch": 1,
}
"""What the GUI shows where a file does not say it."""
_LYCORIS = {
    "LoCon": "locon",
    "LyCORIS/LoCon": "locon",
    "LyCORIS/LoHa": "loha",
    "LyCORIS/LoKr": "lokr",
    "LyCORIS/iA3": "ia3",
    "LyCORIS/DyLoRA": "dylora",
    "LyCORIS/GLoRA": "glora",
    "LyCORIS/BOFT": "boft",
    "LyCORIS/Diag-OFT": "diag-oft",
    "LyCORIS/Native Fine-Tuning": "full",
}
_KOHYA = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
    "Flux1": "networks.lora_flux",
    "Flux1 OFT": "networks.oft_flux",
}
_OF_LYCORIS = words(
    """
conv_dim conv_alpha rank_dropout module_dropout use_tucker use_cp use_scalar rank_dropout_scale train_norm dora_wd
bypass_mode factor decompose_both constrain rescaled unit train_on_input
"""
)
_OF_KOHYA = words(
    """
down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold block_dims block_alphas conv_block_dims
conv_block_alphas rank_dropout module_dropout
"""
)
_OF_FLUX = words(
    """
img_attn_dim img_mlp_dim img_mod_dim single_dim txt_attn_dim txt_mlp_dim txt_mod_dim single_mod_dim in_dims
train_double_block_indices train_single_block_indices split_qkv train_t5xxl
"""
)
_WINDOW = words(
    """
LyCORIS_preset model_list sdxl v2 flux1_checkbox sd3_checkbox flux1_cache_text_encoder_outputs
flux1_cache_text_encoder_outputs_to_disk sd3_cache_text_encoder_outputs sd3_cache_text_encoder_outputs_to_disk
sdxl_cache_text_encoder_outputs sdxl_no_half_vae save_as_bool log_config no_token_padding dynamo_backend gpu_ids
num_machines num_processes train_lora_ggpo ggpo_beta ggpo_sigma sd3_clip_l sd3_t5xxl sd3_text_encoder_batch_size
sd3_enable_scaled_pos_embed sd3_fused_backward_pass sd3_disable_mmap_load_safetensors sd3_clip_l_dropout_rate
sd3_t5_dropout_rate enable_all_linear use_wandb manual_captions_extension weights_only xformers
"""
)
"""Keys of its windows, and of parts that are not chosen."""


def read(reading: Reading, dataset: Mapping[str, Any] | None) -> None:
    """Set everything that a config of the GUI says."""
    theirs = dict(reading.given)
    stated = {
        key: value
        for key, value in _DEFAULTS.items()
        if key not in theirs and not (key == "lr_warmup" and "lr_warmup_steps" in theirs)
    }
    try:
        config, extra = _config({**stated, **theirs})
    except ValueError as error:
        reading.problems.append(
            Problem("additional_parameters", f"{_values.shown(theirs.get('additional_parameters'))}: {error}.")
        )
        return
    inner = reading.part(config, "")
    inner.aliases = {ours: their for their, ours in _NAMES.items() if their in theirs} | _called(theirs, extra)
    inner.original = {**theirs, **extra}
    first = len(reading.lines)
    kohya.read(inner, dataset)
    _as_defaults(reading, first, stated, theirs)
    reading.asides[:] = [*reading.asides, *_windows(theirs, config)]
    _notes(inner, theirs, extra)


def _called(theirs: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, str]:
    kind = {"network_module": "LoRA_type"} if "LoRA_type" in theirs else {}
    if "lr_warmup_steps" in extra or _number(theirs, "lr_warmup_steps"):
        return kind
    return (
        kind
        | {"lr_warmup_steps": "lr_warmup"}
        | (
            {}
            if _number(theirs, "max_train_steps") or _number(theirs, "max_train_epochs")
            else {"max_train_epochs": "epoch"}
        )
    )


def _config(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as sd-scripts would be given it, and what is from the line of additional parameters.

    Raises:
        ValueError: a value is not of its kind.
    """
    extra = parameters(str(theirs.get("additional_parameters") or ""))
    config = {
        _NAMES.get(key, key): value
        for key, value in theirs.items()
        if key not in _WINDOW
        and key not in ("additional_parameters", "LoRA_type", "lr_warmup", "stop_text_encoder_training_pct")
    }
    for key in _ZERO_IS_OFF:
        if key in config and _number(config, key) == 0:
            del config[key]
    _lengths(config, theirs)
    _rates(config, theirs)
    _network(config, theirs)
    _models(config, theirs)
    noise = str(theirs.get("noise_offset_type") or "Original")
    for key in (
        ("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")
        if noise == "Multires"
        else ("multires_noise_iterations", "multires_noise_discount")
    ):
        config.pop(key, None)
    return {**config, **extra}, extra


def _number(table: Mapping[str, Any], key: str) -> float | None:
    value = table.get(key)
    try:
        return None if _values.is_nothing(value) else _values.number(value)
    except ValueError:
        return None


def _lengths(config: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """Warm-up in per cent; a run in epochs unless steps are given; as many cycles as epochs unless they are given."""
    percent, steps = _number(theirs, "lr_warmup"), _number(theirs, "lr_warmup_steps")
    if not steps and percent:
        config["lr_warmup_steps"] = percent / 100
    if not _number(config, "max_train_epochs") and not _number(config, "max_train_steps"):
        config["max_train_epochs"] = theirs.get("epoch")
        config.pop("max_train_steps", None)
    if _values.is_nothing(theirs.get("lr_scheduler_num_cycles")):
        config["lr_scheduler_num_cycles"] = theirs.get("epoch")
    config.pop("epoch", None)


def _rates(config: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """A rate of 0 is no rate: the part is left out if the other has one."""
    unet, text, t5 = (_number(theirs, key) or 0.0 for key in ("unet_lr", "text_encoder_lr", "t5xxl_lr"))
    if text and not unet:
        config["network_train_text_encoder_only"] = True
    if unet and not text:
        config["network_train_unet_only"] = True
    if text and t5:
        config["text_encoder_lr"] = [text, t5]
    config.pop("t5xxl_lr", None)


def _network(config: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    kind = str(theirs.get("LoRA_type") or "Standard")
    if kind in _LYCORIS:
        config["network_module"], keys = "lycoris.kohya", _OF_LYCORIS
        arguments = {"algo": _LYCORIS[kind], "preset": theirs.get("LyCORIS_preset") or "full"}
    else:
        config["network_module"], keys = _KOHYA.get(kind, kind), _OF_FLUX if kind == "Flux1" else _OF_KOHYA
        arguments = {}
        if kind == "Kohya LoCon":
            keys = [*keys, "conv_dim", "conv_alpha"]
    if theirs.get("sd3_checkbox") in (True, "true") and kind in ("Standard", "Kohya LoCon"):
        config["network_module"] = "networks.lora_sd3"
    for key in keys:
        if _is_handed_over(key, theirs.get(key)):
            arguments[key] = theirs[key]
    for key in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
        if key in config:
            arguments[key] = config.pop(key)
    for key in {*_OF_LYCORIS, *_OF_KOHYA, *_OF_FLUX, "train_blocks"}:
        config.pop(key, None)
    config["network_args"] = arguments


def _is_handed_over(key: str, value: Any) -> bool:
    """Whether a field of the network says something: 0 does in a list by block alone, and ``none`` in a choice of blocks."""
    if isinstance(value, str) and value.strip().lower() == "none" and key.endswith("_block_indices"):
        return True
    return not _values.is_nothing(value) and value not in (0, False) and (value != "0" or key.endswith("_lr_weight"))


def _models(config: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """Files of families that are not chosen stay in the window."""
    flux, sd3 = (theirs.get(key) in (True, "true") for key in ("flux1_checkbox", "sd3_checkbox"))
    flux = flux or theirs.get("LoRA_type") in ("Flux1", "Flux1 OFT")
    if sd3:
        config.update({"clip_l": theirs.get("sd3_clip_l"), "t5xxl": theirs.get("sd3_t5xxl")})
    if not flux:
        for key in (
            "ae",
            "timestep_sampling",
            "discrete_flow_shift",
            "model_prediction_type",
            "guidance_scale",
            "t5xxl_max_token_length",
            "apply_t5_attn_mask",
            "blocks_to_swap",
        ):
            config.pop(key, None)
    if flux:
        config.pop("max_token_length", None)
    if not (flux or sd3):
        for key in ("clip_l", "t5xxl"):
            config.pop(key, None)
    if not sd3:
        for key in (
            "clip_g",
            "weighting_scheme",
            "logit_mean",
            "logit_std",
            "mode_scale",
            "clip_g_dropout_rate",
            "clip_l_dropout_rate",
            "t5_dropout_rate",
        ):
            config.pop(key, None)
    if theirs.get("sdxl") in (True, "true"):
        config["sdxl"] = True


def parameters(line: str) -> dict[str, Any]:
    """A line of command-line options, such as ``--max_grad_norm=0 --optimizer_args "d0=1e-5" betas=0.9,0.99``, by name.

    Raises:
        ValueError: a quotation mark is not closed, or something stands before the first option.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in shlex.split(line.replace("\\", "\\\\")):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = value if equals else True
        elif not name:
            raise ValueError(f"'{_values.shown(word)}' belongs to no --option")
        else:
            before = found[name]
            found[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return found


def _as_defaults(reading: Reading, first: int, stated: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """What the file does not say is the GUI's own default; where it says 0, that was said and is no default."""
    names = {_NAMES.get(key, key): key for key in stated}
    found: list[Line] = []
    for line in reading.lines[first:]:
        if line.key in names and line.kind == "unused":
            continue
        if line.key in names and line.kind in ("same", "converted"):
            found.append(dataclasses.replace(line, kind="default", key=names[line.key], given=None))
        elif line.kind == "default" and line.key in theirs:
            found.append(dataclasses.replace(line, kind="converted", note=line.note or "0 is off"))
        else:
            found.append(line)
    reading.lines[first:] = found


def _windows(theirs: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Keys that were not handed over."""
    read = {"additional_parameters", "LoRA_type", "lr_warmup", "epoch"}
    return [key for key in theirs if key not in config and _NAMES.get(key, key) not in config and key not in read]


def _notes(inner: Reading, theirs: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    if _number(theirs, "stop_text_encoder_training_pct") or _number(theirs, "stop_text_encoder_training"):
        inner.warnings.append(
            "stop_text_encoder_training: the GUI itself does not hand it over, and text encoders are trained to the end, there as here."
        )
    if any(
        _number(theirs, key)
        for key in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    ):
        inner.warnings.append(
            "loraplus ratios: some versions of the GUI hand them over where sd-scripts does not look. Here they are in effect."
        )
    if inner.aliases.get("max_train_epochs") == "epoch" and "max_train_epochs" not in extra:
        inner.warnings.append(
            "epoch: the GUI counts images × repeats / batch size, and batches by bucket may be a few more: epochs here are whole epochs."
        )
    if extra:
        inner.warnings.append(
            f"additional_parameters: {', '.join(extra)} taken from it; they come before the GUI's own fields."
        )


__all__ = ["parameters", "read"]
