"""Tiny SD1 and SD2 models with random weights, as diffusers builds them, and the same as single files.

The names of single files are written down here once more, in another form than the code's: closed formulas for block numbers and
substitutions inside blocks. ``test_single_file`` has diffusers read the files too, so that both cannot be wrong alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, LEVELS = 2, 4
WIDTHS = {1: (32, 32, 64, 64), 2: (64, 64, 128, 128)}
TEXT_WIDTH = {1: 64, 2: 128}
TEXT_LAYERS = 3


@dataclass
class Tiny:
    """diffusers' modules, in float32 and evaluation mode."""

    version: int
    unet: Any
    text_encoder: Any
    vae: Any

    @functools.cached_property
    def checkpoint(self) -> dict[str, Tensor]:
        """All tensors under the names of single files."""
        tensors = {f"model.diffusion_model.{unet_name(key)}": t for key, t in self.unet.state_dict().items()}
        for key, tensor in self.vae.state_dict().items():
            tensors[f"first_stage_model.{vae_name(key)}"] = (
                tensor[..., None, None] if is_vae_attention(key, tensor) else tensor
            )
        tensors |= openclip(self.text_encoder) if self.version == 2 else openai(self.text_encoder)
        tensors["alphas_cumprod"] = torch.linspace(0.99, 0.01, 1000)
        return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def unet_name(key: str) -> str:
    """A U-Net tensor's name in single files; blocks are numbered through, one resolution after the other."""
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", key):
        level, number = int(match[1]), int(match[3])
        if match[2] == "downsamplers":
            return f"input_blocks.{(level + 1) * (LAYERS + 1)}.0.op.{match[4].removeprefix('conv.')}"
        kind = int(match[2] == "attentions")
        return f"input_blocks.{1 + level * (LAYERS + 1) + number}.{kind}.{in_resnet(match[4])}"
    if match := re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", key):
        block, number = int(match[1]), int(match[3])
        if match[2] == "upsamplers":
            return f"output_blocks.{block * (LAYERS + 1) + LAYERS}.{1 if block == 0 else 2}.{match[4]}"
        return f"output_blocks.{block * (LAYERS + 1) + number}.{int(match[2] == 'attentions')}.{in_resnet(match[4])}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{in_resnet(match[3])}"
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs)
    raise AssertionError(key)


def in_resnet(rest: str) -> str:
    if "transformer_blocks" in rest:
        return rest
    for ours, theirs in (
        ("norm1.", "in_layers.0."),
        ("conv1.", "in_layers.2."),
        ("norm2.", "out_layers.0."),
        ("conv2.", "out_layers.3."),
        ("time_emb_proj.", "emb_layers.1."),
        ("conv_shortcut.", "skip_connection."),
    ):
        if rest.startswith(ours):
            return theirs + rest[len(ours) :]
    return rest


def vae_name(key: str) -> str:
    """An autoencoder tensor's name in single files."""
    levels = 3
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "attentions" in key:
        key = (
            key.replace("mid_block.attentions.0", "mid.attn_1")
            .replace("group_norm", "norm")
            .replace("to_out.0", "proj_out")
        )
        return re.sub(r"to_([qkv])\.", r"\1.", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)


def is_vae_attention(key: str, tensor: Tensor) -> bool:
    """Weights that single files hold as 1×1 convolutions."""
    return "attentions" in key and tensor.dim() == 2


def classic(text_encoder: Any) -> dict[str, Tensor]:
    return {f"text_model.{key.removeprefix('text_model.')}": t for key, t in text_encoder.state_dict().items()}


def openai(text_encoder: Any) -> dict[str, Tensor]:
    tensors = {f"cond_stage_model.transformer.{key}": tensor for key, tensor in classic(text_encoder).items()}
    return tensors | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


def openclip(text_encoder: Any) -> dict[str, Tensor]:
    """The text encoder in OpenCLIP's names, with a last layer of noise that SD2 does without."""
    ours = {key.removeprefix("text_model."): tensor for key, tensor in text_encoder.state_dict().items()}
    theirs = {
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "ln_final.weight": ours["final_layer_norm.weight"],
        "ln_final.bias": ours["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": torch.randn(TEXT_WIDTH[2], TEXT_WIDTH[2]),
    }
    for number in range(TEXT_LAYERS + 1):
        to, of = f"transformer.resblocks.{number}", f"encoder.layers.{min(number, TEXT_LAYERS - 1)}"
        for kind in ("weight", "bias"):
            parts = [ours[f"{of}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            layer = {
                f"{to}.attn.in_proj_{kind}": torch.cat(parts),
                f"{to}.attn.out_proj.{kind}": ours[f"{of}.self_attn.out_proj.{kind}"],
                f"{to}.ln_1.{kind}": ours[f"{of}.layer_norm1.{kind}"],
                f"{to}.ln_2.{kind}": ours[f"{of}.layer_norm2.{kind}"],
                f"{to}.mlp.c_fc.{kind}": ours[f"{of}.mlp.fc1.{kind}"],
                f"{to}.mlp.c_proj.{kind}": ours[f"{of}.mlp.fc2.{kind}"],
            }
            theirs |= {key: torch.randn_like(t) if number == TEXT_LAYERS else t for key, t in layer.items()}
    return {f"cond_stage_model.model.{key}": tensor for key, tensor in theirs.items()}


@functools.cache
def tiny(version: int) -> Tiny:
    """The model of one version; the same weights every time."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet_type: Any = UNet2DConditionModel  # whose annotations are narrower than what they take
    vae_type: Any = AutoencoderKL
    second = version == 2
    with torch.random.fork_rng():
        torch.manual_seed(version)
        unet = unet_type(
            block_out_channels=WIDTHS[version],
            layers_per_block=LAYERS,
            cross_attention_dim=TEXT_WIDTH[version],
            attention_head_dim=[width // 64 for width in WIDTHS[2]] if second else 8,
            use_linear_projection=second,
        )
        vae = vae_type(
            block_out_channels=(32, 32, 64),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=TEXT_WIDTH[version],
                intermediate_size=2 * TEXT_WIDTH[version],
                num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=TEXT_WIDTH[version] // 64,
                hidden_act="gelu" if second else "quick_gelu",
            )
        )
        for module in (unet, vae, text_encoder):
            for (
                parameter
            ) in module.parameters():  # norms and biases are born as ones and zeros, which could be swapped unseen
                parameter.data.add_(0.02 * torch.randn_like(parameter))
    return Tiny(version, unet.eval(), text_encoder.eval(), vae.eval())


@pytest.fixture(scope="session", params=[1, 2], ids=["sd1", "sd2"])
def either(request: pytest.FixtureRequest) -> Tiny:
    """SD1 and SD2, one after the other."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def sd1() -> Tiny:
    return tiny(1)


@pytest.fixture(scope="session")
def sd2() -> Tiny:
    return tiny(2)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors to a file, leaving out those with a prefix in ``without``, and returns its path."""

    def write(
        tensors: dict[str, Tensor], name: str = "model.safetensors", *, without: tuple[str, ...] = (), **metadata: str
    ) -> Path:
        kept = {key: t.contiguous() for key, t in tensors.items() if not (without and key.startswith(without))}
        save_file(
            kept, tmp_path / name, metadata={key.replace("__", "."): value for key, value in metadata.items()} or None
        )
        return tmp_path / name

    return write
