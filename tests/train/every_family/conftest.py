"""A tiny model of every family, with a recipe that trains it. A new family is one row of :data:`FAMILIES` and a function that writes it.

The models are written as folders that diffusers would open. Each tensor is drawn from a generator seeded by its own name on disk,
so that neither the order of layers in our networks nor what packages initialise with changes a number.
"""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn

from lorabake.families.flux.model import diffusers_tensors as flux_tensors
from lorabake.families.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from lorabake.families.networks.clip_vocabulary import OPEN_CLIP_PAD, SD1_PAD, clip_tokenizer_files
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.dit_config import FluxConfig, SD3Config, T5Config
from lorabake.families.networks.export import clip_json, unet_json, vae_json, write_tensors
from lorabake.families.networks.flux import FluxTransformer
from lorabake.families.networks.flux_layout import flux_json, t5_json
from lorabake.families.networks.t5 import T5Encoder
from lorabake.families.networks.t5_tokenizer import T5Tokenizer
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.networks.vae import AutoencoderKL
from lorabake.families.sd3.card import sd3_json
from lorabake.families.sd3.model import SD3Transformer
from lorabake.families.sd3.model import diffusers_tensors as sd3_tensors
from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import save_png

STEPS = 20
PROMPT = "1girl, red hair --s 2 --d 3 --w 64 --h 96"
UNET: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": (1, 1), "norm_num_groups": 16}
VAE: dict[str, Any] = {"block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 8}
CLIP: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 1}
SPREAD = 1.7
"""Of the layer that latents come from: with it they are about as wide as the noise that is mixed with them."""
BETAS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip


def drawn(network: nn.Module, salt: str) -> dict[str, Tensor]:
    """Weights for a network, under its own names."""
    return filled(network.state_dict(), salt)


def filled(shapes: Mapping[str, Tensor], salt: str) -> dict[str, Tensor]:
    """Weights under the given names: unit gain on the way forward, norms near 1. Each depends on its own name alone."""
    tensors: dict[str, Tensor] = {}
    for name, like in shapes.items():
        values = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{salt} {name}".encode())))
        if like.dim() > 1:
            tensors[name] = values / like[0].numel() ** 0.5
        else:
            tensors[name] = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
    return tensors


def write_vae(folder: Path, **changes: Any) -> None:
    """An autoencoder whose latents are those of its pictures, with as little chance and as much spread as real ones have."""
    config = VaeConfig(**{**VAE, **changes})
    weights = drawn(AutoencoderKL(config), "vae")
    last = "quant_conv" if config.use_quant_conv else "encoder.conv_out"
    for kind in ("weight", "bias"):
        mean, log_variance = weights[f"{last}.{kind}"].chunk(2)
        mean.mul_(SPREAD / config.scaling_factor)
        log_variance.mul_(0.1).sub_(8.0 if kind == "bias" else 0.0)
    write_tensors(folder / "vae", "diffusion_pytorch_model", weights, vae_json(config))


def write_unet(folder: Path, **changes: Any) -> None:
    config = UNetConfig(**{**UNET, **changes})
    weights = drawn(UNet2DConditionModel(config), "unet")
    write_tensors(folder / "unet", "diffusion_pytorch_model", weights, unet_json(config, 16))


def clip_files(pad: str) -> dict[str, str]:
    """A tokenizer folder with the letters and the commonest pairs of CLIP's vocabulary: the whole takes half a second to read."""
    files = clip_tokenizer_files(pad)
    tokens = [*list(json.loads(files["vocab.json"]))[: CLIP["vocab_size"] - 2], "<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)})
    merges = files["merges.txt"].splitlines()[: 1 + len(tokens) - 2 - 2 * 256]
    return {**files, "vocab.json": vocabulary, "merges.txt": "\n".join(merges) + "\n"}


def write_clip(folder: Path, part: str = "", *, pad: str = SD1_PAD, projection: bool = False, **changes: Any) -> None:
    config = ClipConfig(**{**CLIP, **changes})
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    weights = drawn(kind(config), f"text_encoder{part}")
    write_tensors(folder / f"text_encoder{part}", "model", weights, clip_json(config, projection=projection))
    write_files(folder / f"tokenizer{part}", clip_files(pad))


def write_t5(folder: Path, part: str, tokens: int, channels: int) -> None:
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789,-"]
    blanks = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    words = [("▁red", -2.0), ("▁hair", -2.0), ("▁girl", -2.0), *letters, *blanks]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]
    tokenizer = T5Tokenizer(tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False)))
    config = T5Config(vocab_size=len(pieces), channels=channels, width=48, layers=2, heads=2, head_channels=16)
    weights = drawn(T5Encoder(config), f"text_encoder{part}")
    write_tensors(folder / f"text_encoder{part}", "model", weights, t5_json(config))
    write_files(folder / f"tokenizer{part}", tokenizer.files(tokens))


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_scheduler(folder: Path, kind: str, **values: Any) -> None:
    write_files(folder / "scheduler", {"scheduler_config.json": json.dumps({"_class_name": kind, **values})})


def sd1(folder: Path) -> None:
    write_unet(folder, heads=(2, 2), transformer_depth=(1, 1), attends_down=(True, False), attends_up=(True, False),
               cross_attention_dim=32)  # fmt: skip
    write_clip(folder)
    write_vae(folder)
    write_scheduler(folder, "PNDMScheduler", **BETAS, prediction_type="epsilon")


def sd2(folder: Path) -> None:
    write_unet(folder, heads=(1, 1), transformer_depth=(1, 1), attends_down=(True, False), attends_up=(True, False),
               cross_attention_dim=48, use_linear_projection=True, exact_attention=True)  # fmt: skip
    write_clip(folder, pad=OPEN_CLIP_PAD, hidden_size=48, quick_gelu=False)
    write_vae(folder)
    write_scheduler(folder, "DDIMScheduler", **BETAS, prediction_type="v_prediction")


def sdxl(folder: Path) -> None:
    write_unet(folder, block_out_channels=(64, 64), heads=(1, 1), transformer_depth=(1, 2), attends_down=(False, True), attends_up=(False, True),
               cross_attention_dim=32 + 48, use_linear_projection=True, micro_channels=24 + 6 * 256)  # fmt: skip
    write_clip(folder, layers=3)
    write_clip(folder, "_2", pad=OPEN_CLIP_PAD, projection=True, hidden_size=48, projection_dim=24, quick_gelu=False)
    write_vae(folder, scaling_factor=0.13025)
    write_scheduler(folder, "EulerDiscreteScheduler", **BETAS, prediction_type="epsilon")


def flux(folder: Path) -> None:
    config = FluxConfig(
        token_channels=16, double_blocks=1, single_blocks=2, heads=2, head_channels=16, text_channels=32, pooled_channels=32,
        guidance=True, axes=(4, 6, 6),
    )  # fmt: skip
    weights = filled(flux_tensors(FluxTransformer(config).state_dict(), config), "transformer")
    write_tensors(folder / "transformer", "diffusion_pytorch_model", weights, flux_json(config))
    write_clip(folder, pad=SD1_PAD)
    write_t5(folder, "_2", 512, channels=32)
    write_vae(folder, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    write_scheduler(folder, "FlowMatchEulerDiscreteScheduler", shift=3.0, use_dynamic_shifting=True, num_train_timesteps=1000,
                    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)  # fmt: skip


def sd3(folder: Path) -> None:
    config = SD3Config(
        latent_channels=4, blocks=2, heads=2, head_channels=16, text_channels=88, pooled_channels=32 + 24, places=12,
        qk_norm=True, dual=(0,),
    )  # fmt: skip
    weights = filled(sd3_tensors(SD3Transformer(config).state_dict(), config), "transformer")
    write_tensors(folder / "transformer", "diffusion_pytorch_model", weights, sd3_json(config))
    write_clip(folder, projection=True, projection_dim=32)
    write_clip(folder, "_2", pad=OPEN_CLIP_PAD, projection=True, hidden_size=48, projection_dim=24, quick_gelu=False)
    write_t5(folder, "_3", 256, channels=88)
    write_vae(folder, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    write_scheduler(folder, "FlowMatchEulerDiscreteScheduler", shift=3.0, num_train_timesteps=1000)


@dataclass(frozen=True)
class Family:
    """A kind of model, and what a file trained on it says."""

    write: Callable[[Path], None]
    """Writes a tiny one to a folder."""
    base_version: str
    architecture: str
    prediction: str | None
    layers: frozenset[str]
    """What the names of trained layers begin with, as kohya's tools name them, by default."""
    idle: str | None = None
    """Beginning of the names of layers that lie behind what the denoiser is told: in files they are as in kohya's, and never learn."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Lines of the recipe beside the usual ones, by section."""


FAMILIES = {
    "sd1": Family(sd1, "sd_v1", "stable-diffusion-v1", "epsilon", frozenset({"lora_unet", "lora_te"}), settings={"data": "captions.shuffle = true"}),
    "sd2-v": Family(sd2, "sd_v2_v", "stable-diffusion-v2-768-v", "v", frozenset({"lora_unet", "lora_te"})),
    "sdxl": Family(sdxl, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "epsilon", frozenset({"lora_unet", "lora_te1", "lora_te2"}),
                   idle="lora_te1_text_model_encoder_layers_2_", settings={"data": "flip = true"}),
    "flux": Family(flux, "flux1", "flux-1-dev", None, frozenset({"lora_unet"})),
    "sd3": Family(sd3, "sd3", "stable-diffusion-v3.5-medium", None, frozenset({"lora_unet"})),
}  # fmt: skip
"""By name. Tests run on each of them."""


def write_pictures(folder: Path) -> None:
    """Six drawings with captions: three squares, three upright ones."""
    rng = random.Random(1)
    for index in range(6):
        drawing = draw(sample(rng), index, 128 if index % 2 else 64)
        image = drawing.image.crop((32, 0, 96, 96)) if index % 2 else drawing.image
        path = folder / f"1_mira/{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(", ".join(drawing.tags), encoding="utf-8")


RECIPE = """
[model]
base = "model"
[data]
folder = "pictures"
buckets.resolution = 80
{data}
[adapter]
rank = 4
[optimizer]
lr = 0.005
[train]
length = "{steps} steps"
batch_size = 2
device = "cpu"
precision = "fp32"
threads = 1
{train}
[save]
every = "3 epochs"
dtype = "fp32"
state_every = 0.001
[sample]
prompts = ["{prompt}"]
[output]
name = "mira"
"""


@dataclass(frozen=True)
class Kitchen:
    """A folder with ``model``, ``pictures`` and ``recipe.toml`` for one family."""

    name: str
    family: Family
    folder: Path
    prompt: str = PROMPT
    """What runs draw samples of."""

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"


@pytest.fixture(scope="session")
def kitchens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kitchen]:
    """Makes the folder of a family, once."""

    @functools.cache
    def kitchen(name: str) -> Kitchen:
        family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
        family.write(folder / "model")
        write_pictures(folder / "pictures")
        lines = {"data": "", "train": "", **family.settings}
        (folder / "recipe.toml").write_text(RECIPE.format(steps=STEPS, prompt=PROMPT, **lines), encoding="utf-8")
        return Kitchen(name, family, folder)

    return kitchen


@pytest.fixture(scope="session", params=FAMILIES)
def kitchen(request: pytest.FixtureRequest, kitchens: Callable[[str], Kitchen]) -> Kitchen:
    """The folder of every family, one after the other."""
    return kitchens(request.param)


@pytest.fixture(scope="session")
def whole(oven: Any, kitchen: Kitchen) -> Path:
    """The folder of a run that nothing interrupted."""
    done = oven.run("train", "recipe.toml", "--into", "whole", cwd=kitchen.folder)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    return kitchen.folder / "whole"


def losses_of(run: Path) -> list[float]:
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [event["loss"] for event in events if event["kind"] == "step"]


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """The loss of every step of a run."""
    return losses_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="pin the losses of every family anew")
