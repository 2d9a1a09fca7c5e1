"""Training the pocket model's decoder while its encoder stays as it is.

Pictures of the world come with pictures that the world cannot draw (other colours, shapes pasted on, abstract ones), because the
decoder must also serve characters and styles that are invented later. Latents get a little noise, because a denoiser's are never exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.families.networks.vae import AutoencoderKL
from lorabake.pocket.precision import autocast

BATCH = 12
REPORT_EVERY = 100
_WARM_UP = 40
_EMA_DECAY = 0.995
_SHARE_ABSTRACT, _SHARE_RECOLOURED, _SHARE_PASTED = 0.08, 0.12, 0.15
_MOST_LATENT_NOISE = 0.2
"""In standard deviations of a latent; each picture gets a random share of it."""
_SUPERSAMPLE = 4


@dataclass(frozen=True, slots=True)
class DecoderTraining:
    """Settings of `train_decoder`."""

    steps: int = 3000
    """Batches of 12 pictures; 3000 take about ten minutes on one core."""
    learning_rate: float = 1.2e-3
    """At its peak. Half of it for a decoder that is trained already."""
    seed: int = 0


def train_decoder(
    vae: AutoencoderKL,
    pictures_NHWC: npt.NDArray[np.uint8],
    training: DecoderTraining | None = None,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train the decoder of ``vae`` in place; afterwards it holds the averaged weights. The encoder is not touched.

    Runs on one thread; the same steps and seed give the same decoder on the same machine.

    Args:
        vae: its encoder makes the latents.
        pictures_NHWC: uint8 pictures of the world with 64 x 64 pixels.
        training: length, learning rate and seed.
        report: called as ``report(step, mean absolute error)`` every 100 steps; errors are of the range [-1, 1].

    Raises:
        UserError: there are no pictures.
    """
    training = training or DecoderTraining()
    if not len(pictures_NHWC):
        raise UserError("A decoder cannot be trained without pictures; give some hundreds at least.")
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    rng, generator = random.Random(training.seed), torch.Generator().manual_seed(training.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    errors: list[float] = []
    try:
        vae.train()
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(training.steps):
            optimizer.param_groups[0]["lr"] = training.learning_rate * _schedule(step, training.steps)
            loss, error = _reconstruction(vae, _batch(pictures_NHWC, rng), generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            keep = min(_EMA_DECAY, (step + 1) / (step + 20))
            for average, parameter in zip(averages, parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - keep)
            errors.append(error)
            if report and (step + 1) % REPORT_EVERY == 0:
                report(step + 1, sum(errors[-REPORT_EVERY:]) / REPORT_EVERY)
        with torch.no_grad():
            for parameter, average in zip(parameters, averages, strict=True):
                parameter.copy_(average)
    finally:
        vae.requires_grad_(False).eval()
        torch.set_num_threads(threads)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures_NHWC: npt.NDArray[np.uint8], batch_size: int = 32) -> npt.NDArray[np.uint8]:
    """Pictures after encoding (mean, no noise) and decoding, uint8 NHWC."""
    decoded = [
        vae.decode(vae.encode(_to_tensor(pictures_NHWC[start : start + batch_size])).mean)
        for start in range(0, len(pictures_NHWC), batch_size)
    ]
    bytes_BCHW = ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bytes_BCHW.permute(0, 2, 3, 1).numpy()


def psnr(pictures_NHWC: npt.NDArray[np.uint8], others_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Peak signal-to-noise ratio of each pair of pictures in dB, float64 [N]; infinite where they are equal."""
    squares = (pictures_NHWC.astype(np.float64) - others_NHWC.astype(np.float64)) ** 2
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / squares.mean((1, 2, 3)))


def strange_picture(rng: random.Random, side: int = 64) -> Image.Image:
    """A picture of nothing: random shapes on a plain or shaded ground."""
    large = side * _SUPERSAMPLE
    if rng.random() < 0.4:
        start, end = (np.array(_colour(rng), np.float32) for _ in range(2))
        share_HW1 = np.linspace(0, 1, large, dtype=np.float32)[:, None, None].repeat(large, 1)
        if rng.random() < 0.5:
            share_HW1 = share_HW1.transpose(1, 0, 2)
        ground = Image.fromarray((start + (end - start) * share_HW1).astype(np.uint8))
    else:
        ground = Image.new("RGB", (large, large), _colour(rng))
    _scatter(ground, rng, rng.randint(3, 30))
    return ground.reduce(_SUPERSAMPLE)


def _batch(pictures_NHWC: npt.NDArray[np.uint8], rng: random.Random) -> Tensor:
    chosen = [_varied(pictures_NHWC[rng.randrange(len(pictures_NHWC))], rng) for _ in range(BATCH)]
    return _to_tensor(np.stack(chosen))


def _varied(picture_HWC: npt.NDArray[np.uint8], rng: random.Random) -> npt.NDArray[np.uint8]:
    """The picture as it is, or something that the world cannot draw."""
    choice = rng.random()
    if choice < _SHARE_ABSTRACT:
        return np.asarray(strange_picture(rng, len(picture_HWC)))
    choice -= _SHARE_ABSTRACT
    if choice < _SHARE_RECOLOURED:
        return _recoloured(picture_HWC, rng)
    choice -= _SHARE_RECOLOURED
    if choice < _SHARE_PASTED:
        side = len(picture_HWC) * _SUPERSAMPLE
        large = Image.fromarray(picture_HWC).resize((side, side), Image.Resampling.NEAREST)
        _scatter(large, rng, rng.randint(1, 8))
        return np.asarray(large.reduce(_SUPERSAMPLE))
    return picture_HWC


def _recoloured(picture_HWC: npt.NDArray[np.uint8], rng: random.Random) -> npt.NDArray[np.uint8]:
    """The picture with its colours swapped, or drawn towards a random gradient."""
    if rng.random() < 0.5:
        return picture_HWC[..., rng.sample(range(3), 3)]
    stops = np.array(sorted((_colour(rng) for _ in range(3)), key=sum), np.float32)
    ramp = np.stack([np.interp(np.arange(256), (0, 128, 255), stops[:, channel]) for channel in range(3)], -1)
    brightness_HW = picture_HWC.astype(np.float32).mean(-1).astype(np.uint8)
    share = rng.random()
    return (picture_HWC * (1 - share) + ramp[brightness_HW] * share).astype(np.uint8)


def _scatter(image: Image.Image, rng: random.Random, count: int) -> None:
    """Draw ``count`` random shapes: blots, polygons, lines, stripes, rows of dots."""
    pen, side = ImageDraw.Draw(image), image.width
    for _ in range(count):
        colour, x, y = _colour(rng), rng.uniform(0, side), rng.uniform(0, side)
        size = side / 32 * rng.choice((1, 2, 4, 8))
        shape = rng.choice(("ellipse", "polygon", "line", "stripes", "dots"))
        if shape == "ellipse":
            pen.ellipse((x, y, x + size * rng.uniform(0.5, 2), y + size * rng.uniform(0.5, 2)), fill=colour)
        elif shape == "polygon":
            corners = [(x + rng.uniform(-size, size), y + rng.uniform(-size, size)) for _ in range(rng.randint(3, 8))]
            pen.polygon(corners, fill=colour)
        elif shape == "line":
            end = (x + rng.uniform(-4, 4) * size, y + rng.uniform(-4, 4) * size)
            pen.line([(x, y), end], fill=colour, width=rng.randint(2, 14))
        else:
            gap = side / 256 * rng.randint(6, 16)
            for index in range(rng.randint(2, 6)):
                box = (x, y + 2 * index * gap, x + (2 * size if shape == "stripes" else gap), y + (2 * index + 1) * gap)
                (pen.rectangle if shape == "stripes" else pen.ellipse)(box, fill=colour)


def _reconstruction(vae: AutoencoderKL, images_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """The loss, and the mean absolute error alone."""
    with torch.no_grad():
        latents_BCHW = vae.encode(images_BCHW).mean
    amount_B111 = (
        torch.rand((len(images_BCHW), 1, 1, 1), generator=generator) * _MOST_LATENT_NOISE / vae.config.scaling_factor
    )
    latents_BCHW = latents_BCHW + amount_B111 * torch.randn(latents_BCHW.shape, generator=generator)
    with autocast():
        decoded_BCHW = vae.decode(latents_BCHW)
    decoded_BCHW = decoded_BCHW.float()
    error = F.l1_loss(decoded_BCHW, images_BCHW)
    edges = sum(
        (F.l1_loss(decoded_BCHW.diff(dim=axis), images_BCHW.diff(dim=axis)) for axis in (-1, -2)), start=torch.zeros(())
    )
    return error + 0.5 * F.mse_loss(decoded_BCHW, images_BCHW) + 0.3 * edges, error.item()


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _to_tensor(pictures_NHWC: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
