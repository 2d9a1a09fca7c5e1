"""Networks written as parts of a diffusers folder, with the ``config.json`` that says their sizes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.base.files import replacing, write_atomic, write_json
from lorabake.families.networks.clip_vocabulary import clip_tokenizer_files
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.protocols.family import ModelFacts

if TYPE_CHECKING:
    from lorabake.families.networks.components import Component


def write_part(folder: Path, stem: str, network: nn.Module, config: Mapping[str, Any]) -> None:
    """Write a network's weights as they are now, as ``STEM.safetensors`` beside ``config.json``."""
    write_tensors(folder, stem, network.state_dict(), config)


def write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors, which share no memory, as ``STEM.safetensors`` beside ``config.json``.

    Raises:
        UserError: the folder cannot be written to (full, read-only, gone).
    """
    numbers = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    # transformers believes the type that a config names, whatever the weights are.
    typed = {key: numbers.copy().pop() for key in ("dtype", "torch_dtype") if key in config and len(numbers) == 1}
    write_json(folder / "config.json", {**config, **typed})
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(folder / f"{stem}.safetensors") as path:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # the system's own refusals come as this, in words alone
            raise OSError(str(error)) from error


def write_rest(
    folder: Path,
    facts: ModelFacts,
    written: Sequence[str],
    *,
    scheduler: Mapping[str, Any],
    vae: tuple[nn.Module, Component[VaeConfig]],
    pads: Mapping[str, str],
    index: Mapping[str, Any],
) -> None:
    """What every diffusers folder has beside networks that are trained; in the model's own folder as it came there, but for the scheduler.

    Args:
        folder: where the parts in ``written`` are already.
        facts: of the model: where it came from.
        written: names of parts that are in ``folder``, or that shall not be copied to it.
        scheduler: its settings.
        vae: the network, and what was found of it.
        pads: what CLIP tokenizers pad with, by the tokenizer's name.
        index: ``model_index.json``.

    Raises:
        UserError: a file cannot be read or written.
    """
    write_json(folder / "scheduler" / "scheduler_config.json", dict(scheduler))
    written = [*written, "scheduler"]
    if facts.path.is_file() or facts.vae:
        network, found = vae
        write_part(folder / "vae", "diffusion_pytorch_model", network, found.json or vae_json(found.config))
        written.append("vae")
    if facts.path.is_dir():
        _copy_others(facts.path, folder, written)
        return
    for tokenizer, pad in pads.items():
        for name, text in clip_tokenizer_files(pad).items():
            write_atomic(folder / tokenizer / name, text.encode())
    write_json(folder / "model_index.json", index)


def _copy_others(source: Path, folder: Path, written: Sequence[str]) -> None:
    """Copy a diffusers folder's other parts, those not in ``written``, and the JSON files beside them.

    Raises:
        UserError: one cannot be read or written.
    """
    for item in _items(source):
        if (item.is_dir() and item.name not in written) or (item.is_file() and item.suffix == ".json"):
            _copy(item, folder / item.name)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        for item in _items(source):
            _copy(item, target / item.name)
    else:
        with replacing(target) as part:
            shutil.copyfile(source, part)


def _items(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.") from error


def unet_json(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """``unet/config.json``; ``sample_size`` is the side of the latents it was trained on."""
    told: dict[str, Any] = {}
    if config.micro_channels is not None:
        told = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_channels,
            "projection_class_embeddings_input_dim": config.micro_channels,
        }
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": [_attending("Down", attends) for attends in config.attends_down],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        # One number where one will do: diffusers' reader of SDXL LoRA files counts with it.
        "layers_per_block": config.layers_per_block[0]
        if len(set(config.layers_per_block)) == 1
        else list(config.layers_per_block),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "transformer_layers_per_block": list(config.transformer_depth),
        "up_block_types": [_attending("Up", attends) for attends in reversed(config.attends_up)],
        "upcast_attention": config.exact_attention,
        "use_linear_projection": config.use_linear_projection,
        **told,
    }


def clip_json(config: ClipConfig, *, projection: bool = False) -> dict[str, Any]:
    """``text_encoder/config.json``; with ``projection`` for a network that has one."""
    end = config.end_id if config.end_id is not None else config.vocab_size - 1
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.vocab_size - 2,
        "dtype": "float32",
        "eos_token_id": end,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "hidden_size": config.hidden_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": end,
        "projection_dim": config.projection_dim,
        "vocab_size": config.vocab_size,
    }


def vae_json(config: VaeConfig) -> dict[str, Any]:
    """``vae/config.json``."""
    levels = len(config.block_out_channels)
    optional: dict[str, Any] = {"shift_factor": config.shift_factor} if config.shift_factor else {}
    for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        if not getattr(config, name):
            optional[name] = False
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": config.force_upcast,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **optional,
    }


def _attending(way: str, attends: bool) -> str:
    return f"CrossAttn{way}Block2D" if attends else f"{way}Block2D"
