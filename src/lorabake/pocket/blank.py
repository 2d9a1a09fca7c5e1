"""A pocket model that has learned everything but pictures: what the training loop then pretrains with the adapter ``full``.

The autoencoder is final, the text encoder can read the world's captions, and the denoiser is random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import nn

from lorabake.base.errors import UserError
from lorabake.base.files import replacing, write_json
from lorabake.families.networks.blocks import ResnetBlock2D
from lorabake.families.networks.transformer import Transformer2DModel
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.pocket.architecture import MODEL_INDEX, SCHEDULER, TEXT_ENCODER, UNET, VAE, unet_config
from lorabake.pocket.autoencoder import analytic_autoencoder
from lorabake.pocket.dataset import World
from lorabake.pocket.decoder import DecoderTraining, psnr, round_trip, train_decoder
from lorabake.pocket.textmodel import Reading, TextWarmUp, new_text_encoder, warm_up
from lorabake.pocket.tokenizer import build_tokenizer

_MEASURED = 100


@dataclass(frozen=True, slots=True)
class Preparation:
    """How much is learned before the denoiser. The defaults take ten to fifteen minutes on one core."""

    pictures: int = 6000
    """Drawings for the autoencoder."""
    decoder: DecoderTraining = field(default_factory=DecoderTraining)
    text: TextWarmUp = field(default_factory=TextWarmUp)


@dataclass(frozen=True, slots=True)
class BlankModel:
    """What was written, and how good its finished parts are."""

    folder: Path
    reading: Reading
    """What the text encoder can read."""
    round_trip_db: float
    """Mean peak signal-to-noise ratio of held-out pictures after encoding and decoding."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "round_trip_db": self.round_trip_db,
            "reading": self.reading.mean,
            "unsaid": self.reading.unsaid,
            "axes": self.reading.per_axis,
        }


def blank_model(
    folder: Path,
    seed: int = 0,
    preparation: Preparation | None = None,
    report: Callable[[str, int, float], None] | None = None,
) -> BlankModel:
    """Write a whole diffusers folder (float32) whose denoiser has learned nothing yet.

    Args:
        folder: new or empty.
        seed: of the pictures and of all random weights; the trainings have seeds of their own.
        preparation: lengths of the trainings.
        report: called as ``report(part, step, loss)`` now and then; part is "text_encoder" or "decoder".

    Raises:
        UserError: the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Give a new folder for the blank model.")
    preparation = preparation or Preparation()
    tell = report or (lambda part, step, loss: None)

    tokenizer = build_tokenizer(folder / "tokenizer")
    text_encoder = new_text_encoder(seed)
    reading = warm_up(text_encoder, tokenizer, preparation.text, lambda step, loss: tell("text_encoder", step, loss))
    _write_part(folder / "text_encoder", "model", text_encoder, TEXT_ENCODER)

    pictures_NHWC = _pictures(World(seed), 0, preparation.pictures)
    vae = analytic_autoencoder(pictures_NHWC, seed)
    train_decoder(vae, pictures_NHWC, preparation.decoder, lambda step, loss: tell("decoder", step, loss))
    fresh_NHWC = _pictures(World(seed), preparation.pictures, _MEASURED)
    _write_part(folder / "vae", "diffusion_pytorch_model", vae, VAE)

    _write_part(folder / "unet", "diffusion_pytorch_model", new_denoiser(seed), UNET)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    # Last: a folder without it is no model, so one that was interrupted is not taken for one.
    write_json(folder / "model_index.json", MODEL_INDEX)
    return BlankModel(folder, reading, float(psnr(fresh_NHWC, round_trip(vae, fresh_NHWC)).mean()))


def new_denoiser(seed: int = 0) -> UNet2DConditionModel:
    """A denoiser with random weights that predicts zero: residual branches and the last convolution start as zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(unet_config())
    ends: list[nn.Module] = [unet.conv_out]
    ends += [module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    ends += [module.proj_out for module in unet.modules() if isinstance(module, Transformer2DModel)]
    for end in ends:
        for parameter in end.parameters():
            nn.init.zeros_(parameter)
    return unet.requires_grad_(False).eval()


def _pictures(world: World, start: int, count: int) -> npt.NDArray[np.uint8]:
    return np.stack([np.asarray(world.picture(index)[0].image) for index in range(start, start + count)])


def _write_part(folder: Path, stem: str, network: nn.Module, config: dict[str, Any]) -> None:
    write_json(folder / "config.json", config)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    with replacing(folder / f"{stem}.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
