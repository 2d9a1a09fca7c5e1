"""Tiny Flux.1 models of random weights, as diffusers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.families.networks.clip_vocabulary import clip_tokenizer_files

WORDS = ["▁a", "▁girl", "▁red", "▁hair", "▁beach", "s", "g", "i", "r", "l", "e", "d", ",", "h", "▁"]
SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}
BLOCKS: dict[str, Any] = {"num_layers": 2, "num_single_layers": 3, "in_channels": 16}


def noisy(network: Any) -> Any:
    """The network with no weight at a value that hides a mistake, such as a norm's 1."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def reference_transformer(guidance: bool) -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.manual_seed(0)
    return noisy(
        FluxTransformer2DModel(
            **SIZES, **BLOCKS, joint_attention_dim=24, pooled_projection_dim=32, guidance_embeds=guidance
        )
    )


def pipeline(folder: Path, guidance: bool) -> Any:
    """A pipeline of diffusers'; ``folder`` is for the files of its tokenizers."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(1)
    folder.mkdir()
    for name, text in clip_tokenizer_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    clip: dict[str, Any] = {"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 1}
    special: dict[str, Any] = {"bos_token_id": 49406, "eos_token_id": 2, "pad_token_id": 49407, "projection_dim": 32}
    t5: dict[str, Any] = {"vocab_size": 128, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0 - i) for i, word in enumerate(WORDS))]
    blanks = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    vae: dict[str, Any] = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=noisy(AutoencoderKL(**vae)),
        text_encoder=noisy(CLIPTextModel(CLIPTextConfig(**clip, **special, num_hidden_layers=2))),
        tokenizer=CLIPTokenizer.from_pretrained(folder),
        text_encoder_2=noisy(T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu"))),
        tokenizer_2=T5Tokenizer(vocab=pieces + blanks),
        transformer=reference_transformer(guidance),
    )


@pytest.fixture(scope="session", params=["dev", "schnell"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both kinds: told a guidance scale, or not."""
    return pipeline(tmp_path_factory.mktemp("tokenizer") / "files", request.param == "dev")


@pytest.fixture(scope="session")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``theirs``, saved."""
    path = tmp_path_factory.mktemp("flux")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kind that is told a guidance scale, saved."""
    path = tmp_path_factory.mktemp("dev")
    pipeline(tmp_path_factory.mktemp("tokenizer") / "files", True).save_pretrained(path / "model")
    return path / "model"
