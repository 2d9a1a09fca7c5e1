"""Which noise pictures are trained with.

A rule takes plain noise (``noise_BCHW``, normal numbers), the clean latents, the objective's settings and ``stream``, which gives each
sample generators of its own; it returns the noise to train with. All of it happens on the CPU.

What a rule adds to a picture depends on nothing else in the batch: neither on its place there nor on its neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorabake.base.lazy import lazy_module
from lorabake.protocols.objective import RuleCard, Stream

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor
else:
    torch = lazy_module("torch")


def gaussian(noise_BCHW: Tensor, latents_BCHW: Tensor, settings: Any, stream: Stream) -> Tensor:
    """As it is."""
    return noise_BCHW


def offset(noise_BCHW: Tensor, latents_BCHW: Tensor, settings: Any, stream: Stream) -> Tensor:
    """ε + s·η, η one normal number for each sample and channel: brightness and colour of the whole picture become part of the noise.

    Guttenberg 2023, "Diffusion with Offset Noise". s is ``noise_offset``, or with ``noise_offset_random`` evenly between 0 and that for each
    sample; ``noise_offset_adaptive`` times the absolute mean of the sample's channel is added to it, and s never falls below 0.
    """
    means_BC11 = latents_BCHW.mean((2, 3), keepdim=True)
    shifts_BC11 = _drawn(means_BC11, "noise_offset", stream)
    strength_B111 = _strengths(noise_BCHW, settings.noise_offset, settings.noise_offset_random, "noise_offset", stream)
    return noise_BCHW + (strength_B111 + settings.noise_offset_adaptive * means_BC11.abs()).clamp(min=0) * shifts_BC11


def pyramid(noise_BCHW: Tensor, latents_BCHW: Tensor, settings: Any, stream: Stream) -> Tensor:
    """ε plus noise of ever larger grain, each a factor ``pyramid_discount`` weaker, at most ``pyramid_iterations`` of them.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training". The i-th, counted from 0, is as large as the latents divided by r^i,
    r anew each time evenly between 2 and 4, and is enlarged bilinearly; there are no more after one that is a single cell high or wide.

    Each sample is then brought back to a standard deviation of 1. (The original does so for the batch as a whole; then a picture's noise
    would hang on its neighbours, and with a batch of one it is the same.)
    """
    return torch.stack(
        [_pyramid(noise_CHW, settings, stream("noise_pyramid", slot)) for slot, noise_CHW in enumerate(noise_BCHW)]
    )


def perturbed(noise_BCHW: Tensor, settings: Any, stream: Stream) -> Tensor:
    """ε + γ·ξ, which is mixed into the latents while ε itself stays what is asked for. Ning et al. 2023, arXiv 2301.11706.

    A denoiser that draws a picture sees its own small errors at every step; this gets it used to them. γ is ``input_perturbation``, or with
    ``input_perturbation_random`` evenly between 0 and that for each sample.
    """
    name = "input_perturbation"
    strength_B111 = _strengths(
        noise_BCHW, settings.input_perturbation, settings.input_perturbation_random, name, stream
    )
    return noise_BCHW + strength_B111 * _drawn(noise_BCHW, name, stream)


def _pyramid(noise_CHW: Tensor, settings: Any, generator: Generator) -> Tensor:
    channels, height, width = noise_CHW.shape
    total_CHW = noise_CHW
    for level in range(settings.pyramid_iterations):
        ratio = float(2 + 2 * torch.rand((), generator=generator, dtype=torch.float64)) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        grain_1CHW = torch.randn(1, channels, *size, generator=generator)
        enlarged_1CHW = torch.nn.functional.interpolate(grain_1CHW, size=(height, width), mode="bilinear")
        total_CHW = total_CHW + settings.pyramid_discount**level * enlarged_1CHW[0]
        if 1 in size:
            break
    return total_CHW / total_CHW.std()


def _drawn(like: Tensor, name: str, stream: Stream) -> Tensor:
    """Normal numbers in a shape with the batch first, each sample's from its own stream."""
    return torch.stack([torch.randn(like.shape[1:], generator=stream(name, slot)) for slot in range(len(like))])


def _strengths(noise_BCHW: Tensor, strength: float, at_random: bool, name: str, stream: Stream) -> Tensor:
    """``strength`` for each sample, or a share of it, B111."""
    strength_B111 = torch.full((len(noise_BCHW), 1, 1, 1), strength)
    if not at_random:
        return strength_B111
    shares = [torch.rand((), generator=stream(f"{name}_strength", slot)) for slot in range(len(noise_BCHW))]
    return strength_B111 * torch.stack(shares).view(-1, 1, 1, 1)


_HERE = "lorabake.objectives.noise"
_OF_FLOW = (
    "it mends what flow models do not have, a last timestep that still shows some of the picture, and pictures are drawn from plain noise: "
    "their brightness may come out wrong."
)
_OF_ZERO_SNR = "zero_terminal_snr mends the same, and draws from plain noise. One of them is enough."
CARDS = (
    RuleCard("noise", "gaussian", "Plain noise, every cell by itself.", f"{_HERE}:gaussian"),
    RuleCard(
        "noise",
        "offset",
        "Also shifts brightness and colour of the whole picture, for very dark and very bright ones.",
        f"{_HERE}:offset",
        reads=("noise_offset", "noise_offset_adaptive", "noise_offset_random"),
        cautions={"flow": _OF_FLOW, "zero_terminal_snr": _OF_ZERO_SNR},
    ),
    RuleCard(
        "noise",
        "pyramid",
        "Also has coarse grain of many sizes: as offset, for large shapes as well.",
        f"{_HERE}:pyramid",
        reads=("pyramid_iterations", "pyramid_discount"),
        cautions={"flow": _OF_FLOW, "zero_terminal_snr": _OF_ZERO_SNR},
    ),
)
