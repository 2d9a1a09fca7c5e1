"""Tiny Stable Diffusion 3 models of random weights, as diffusers writes them: one like SD3 medium, one like 3.5 medium.

As a pipeline, as a folder, and as single files in the layout of Stability AI's, written out from diffusers' tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabake.families.networks.clip_vocabulary import OPEN_CLIP_PAD, SD1_PAD, clip_tokenizer_files

WORDS = ["▁a", "▁girl", "▁red", "▁hair", "▁beach", "s", "g", "i", "r", "l", "e", "d", ",", "h", "▁"]
SIZES: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "joint_attention_dim": 88,
    "pooled_projection_dim": 80,
    "pos_embed_max_size": 12,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {"attention_head_dim": 64, "caption_projection_dim": 128},  # without norms, no file says how wide a head is
    "sd35": {
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0, 1),
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def noisy(network: Any) -> Any:
    """The network with no weight at a value that hides a mistake, such as a norm's 1."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.requires_grad_(False).eval()


def pipeline(folder: Path, kind: str) -> Any:
    """A pipeline of diffusers'; ``folder`` is for the files of its tokenizers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(1)
    for name, pad in (("clip_l", SD1_PAD), ("clip_g", OPEN_CLIP_PAD)):
        (folder / name).mkdir(parents=True)
        for file, text in clip_tokenizer_files(pad).items():
            (folder / name / file).write_text(text, encoding="utf-8")
    clip: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    large: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 1, "projection_dim": 32}
    big: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 1, "projection_dim": 48}
    t5: dict[str, Any] = {"vocab_size": 128, "d_model": 88, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0 - i) for i, word in enumerate(WORDS))]
    blanks = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    first = CLIPTextModelWithProjection(CLIPTextConfig(**clip, **large, num_hidden_layers=2, hidden_act="quick_gelu"))
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=noisy(AutoencoderKL(**VAE)),
        text_encoder=noisy(first),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "clip_l"),
        text_encoder_2=noisy(
            CLIPTextModelWithProjection(CLIPTextConfig(**clip, **big, num_hidden_layers=3, hidden_act="gelu"))
        ),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "clip_g"),
        text_encoder_3=noisy(T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu"))),
        tokenizer_3=T5Tokenizer(vocab=pieces + blanks),
        transformer=noisy(SD3Transformer2DModel(**SIZES, **KINDS[kind])),
    )


@pytest.fixture(scope="session", params=KINDS)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both kinds. Whoever changes one puts it back."""
    return pipeline(tmp_path_factory.mktemp("tokenizers"), request.param)


@pytest.fixture(scope="session")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``theirs``, saved."""
    path = tmp_path_factory.mktemp("models") / "tiny-3"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one like 3.5 medium, saved."""
    path = tmp_path_factory.mktemp("medium") / "tiny-3"
    pipeline(tmp_path_factory.mktemp("tokenizers"), "sd35").save_pretrained(path)
    return path


def stability(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Stability AI's layout of the denoiser, written out: queries, keys and values in one, two shifts before their scales."""
    found = {"pos_embed": state["pos_embed.pos_embed"]}

    def put(theirs: str, *ours: str, flipped: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                whole = torch.cat([state[f"{name}.{kind}"] for name in ours])
                found[f"{theirs}.{kind}"] = torch.cat(whole.chunk(2)[::-1]) if flipped else whole

    embedders = "time_text_embed"
    put("x_embedder.proj", "pos_embed.proj")
    put("context_embedder", "context_embedder")
    put("t_embedder.mlp.0", f"{embedders}.timestep_embedder.linear_1")
    put("t_embedder.mlp.2", f"{embedders}.timestep_embedder.linear_2")
    put("y_embedder.mlp.0", f"{embedders}.text_embedder.linear_1")
    put("y_embedder.mlp.2", f"{embedders}.text_embedder.linear_2")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", flipped=True)
    for index in range(blocks):
        ours = f"transformer_blocks.{index}"
        x, text = f"joint_blocks.{index}.x_block", f"joint_blocks.{index}.context_block"
        for name in ("attn", "attn2"):
            put(f"{x}.{name}.qkv", *(f"{ours}.{name}.to_{part}" for part in "qkv"))
            put(f"{x}.{name}.proj", f"{ours}.{name}.to_out.0")
            put(f"{x}.{name}.ln_q", f"{ours}.{name}.norm_q")
            put(f"{x}.{name}.ln_k", f"{ours}.{name}.norm_k")
        put(f"{text}.attn.qkv", *(f"{ours}.attn.add_{part}_proj" for part in "qkv"))
        put(f"{text}.attn.proj", f"{ours}.attn.to_add_out")
        put(f"{text}.attn.ln_q", f"{ours}.attn.norm_added_q")
        put(f"{text}.attn.ln_k", f"{ours}.attn.norm_added_k")
        put(f"{x}.adaLN_modulation.1", f"{ours}.norm1.linear")
        put(f"{text}.adaLN_modulation.1", f"{ours}.norm1_context.linear", flipped=index == blocks - 1)
        for stream, name in ((x, "ff"), (text, "ff_context")):
            put(f"{stream}.mlp.fc1", f"{ours}.{name}.net.0.proj")
            put(f"{stream}.mlp.fc2", f"{ours}.{name}.net.2")
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


class Files(NamedTuple):
    """A model as single files, in the layouts they are published in."""

    base: Path
    """With the denoiser alone, under ``model.diffusion_model.``."""
    bare: Path
    """The same, without anything in front."""
    whole: Path
    """With everything but T5's tokenizer."""
    without_t5: Path
    vae: Path
    clip_l: Path
    clip_g: Path
    t5: Path
    tokenizer: Path


def write_files(theirs: Any, folder: Path, home: Path) -> Files:
    """``theirs`` as single files in ``home``; ``folder`` is where it was saved."""
    from lorabake.families.networks.config import VaeConfig
    from lorabake.families.networks.layouts import ldm_vae

    own = stability(theirs.transformer.state_dict(), theirs.transformer.config.num_layers)
    names = ldm_vae(VaeConfig.from_json(dict(theirs.vae.config)))
    vae = {f"{names.theirs(name)}": tensor.contiguous() for name, tensor in theirs.vae.state_dict().items()}
    first, second, t5 = (
        {name: tensor.clone() for name, tensor in part.state_dict().items()}
        for part in (theirs.text_encoder, theirs.text_encoder_2, theirs.text_encoder_3)
    )
    t5.pop("encoder.embed_tokens.weight", None)

    def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in tensors.items()}

    clips = under("text_encoders.clip_l.transformer.", first) | under("text_encoders.clip_g.transformer.", second)
    scales = {f"text_encoders.{name}.logit_scale": torch.tensor(4.6) for name in ("clip_l", "clip_g")}
    most = under("model.diffusion_model.", own) | under("first_stage_model.", vae) | clips | scales
    contents = {
        "base": under("model.diffusion_model.", own),
        "bare": own,
        "whole": most | under("text_encoders.t5xxl.transformer.", t5),
        "without_t5": most,
        "vae": vae,
        "clip_l": first,
        "clip_g": second,
        "t5": t5,
    }
    for name, tensors in contents.items():
        save_file(tensors, home / f"{name}.safetensors")
    return Files(*(home / f"{name}.safetensors" for name in contents), tokenizer=folder / "tokenizer_3")


@pytest.fixture(scope="session")
def files(theirs: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """``theirs`` as single files."""
    return write_files(theirs, folder, tmp_path_factory.mktemp("files"))
