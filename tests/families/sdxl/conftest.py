"""A tiny SDXL with random weights: real blocks, two text encoders, and tokenizers that pad differently.

As a diffusers pipeline, as a folder, and as a single file. Heads are 64 wide and norms have 32 groups, as in every real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabake.families.networks.clip_vocabulary import OPEN_CLIP_PAD, SD1_PAD, clip_tokenizer_files
from lorabake.families.networks.config import UNetConfig, VaeConfig
from lorabake.families.networks.layouts import Paths, ldm_unet, ldm_vae

UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (64, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 1, 2],
    "cross_attention_dim": 192,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 96 + 6 * 256,
    "upcast_attention": None,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as SDXL's files say, wrongly
    "pad_token_id": 1,
    "max_position_embeddings": 77,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.13025,
    "sample_size": 64,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
}


def build(tokenizers: Path) -> Any:
    """A new StableDiffusionXLPipeline; the same weights every time. ``tokenizers`` is a folder to write tokenizers to."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = AutoencoderKL(**VAE)
        large = CLIPTextConfig(
            **TEXT, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1,
            hidden_act="quick_gelu", projection_dim=64,
        )  # fmt: skip
        big = CLIPTextConfig(
            **TEXT, hidden_size=128, intermediate_size=160, num_hidden_layers=10, num_attention_heads=2,
            hidden_act="gelu", projection_dim=96,
        )  # fmt: skip
        parts = {
            "vae": vae,
            "unet": UNet2DConditionModel(**UNET),
            "text_encoder": CLIPTextModel(large),
            "text_encoder_2": CLIPTextModelWithProjection(big),
        }
        with torch.no_grad():
            for part in parts.values():
                for parameter in part.parameters():  # norms' ones and zeros would hide a mistake
                    parameter.add_(0.02 * torch.randn_like(parameter))
            parts["unet"].conv_out.weight.mul_(8)  # pictures with something in them
    for name, pad in (("tokenizer", SD1_PAD), ("tokenizer_2", OPEN_CLIP_PAD)):
        (tokenizers / name).mkdir(parents=True)
        for file, text in clip_tokenizer_files(pad).items():
            (tokenizers / name / file).write_text(text, encoding="utf-8")
    scheduler: Any = EulerDiscreteScheduler(**SCHEDULER)
    pipeline = StableDiffusionXLPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer_2"),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in parts.values():
        part.requires_grad_(False).eval()
    return pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pipeline, in float32. Whoever changes it puts it back."""
    return build(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a folder on disk."""
    path = tmp_path_factory.mktemp("models") / "tiny-xl"
    pipeline.save_pretrained(path)
    return path


def _renamed(state: dict[str, Tensor], names: Paths, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{names.theirs(name)}": tensor.clone() for name, tensor in state.items()}


def _open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's layout, written out: queries, keys and values in one, the projection transposed."""
    plain = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    found = {theirs: state[f"text_model.{ours}"] for theirs, ours in plain.items()}
    found["text_projection"] = state["text_projection.weight"].T
    found["logit_scale"] = torch.tensor(4.6)
    pieces = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for layer in range(10):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for there, here in pieces.items():
                found[f"{theirs}.{there}.{kind}"] = state[f"{ours}.{here}.{kind}"]
            fused = [state[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(fused)
    return {f"{prefix}{name}": tensor.clone().contiguous() for name, tensor in found.items()}


def single(pipeline: Any) -> dict[str, Tensor]:
    """All tensors of a single-file checkpoint."""
    unet = ldm_unet(UNetConfig.from_json(dict(pipeline.unet.config)))
    vae = ldm_vae(VaeConfig.from_json(dict(pipeline.vae.config)))
    text = {
        f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": tensor.clone()
        for name, tensor in pipeline.text_encoder.state_dict().items()
    }
    return {
        **_renamed(pipeline.unet.state_dict(), unet, "model.diffusion_model."),
        **_renamed(pipeline.vae.state_dict(), vae, "first_stage_model."),
        **text,
        **_open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model."),
    }


@pytest.fixture(scope="session")
def checkpoint(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a single file."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-xl.safetensors"
    save_file(single(pipeline), path)
    return path
