"""The pocket model's autoencoder: an encoder that is computed, not trained, and a decoder that starts as bilinear enlargement.

Latents are the eight strongest principal components of the 4 x 4 pixel patches of pictures, each with unit variance. An
``AutoencoderKL`` can hold that exactly (up to rounding), although it is full of norms and bends:

* residual branches end in zeros, so that blocks pass on what they get;
* the two strided convolutions move each 2 x 2 neighbourhood into channels, and the second one multiplies by the components;
* the norm and SiLU before the last convolution are undone by giving each latent a pair of channels +u and -u, because
  silu(u) - silu(-u) = u, and by filling up the norm's group with large constants, which fix its mean and variance.

Latents can thus be made before anything is trained, and decoder and denoiser are trained apart from each other.

Shapes: N pictures, H and W pixels, P numbers of a patch (row, column, colour), C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.families.networks.blocks import ResnetBlock2D
from lorabake.families.networks.vae import AutoencoderKL, VaeAttention
from lorabake.pocket.architecture import LATENT_CHANNELS, vae_config

_PATCH = 4
_COLOURS = 3
_POSTERIOR_DEVIATION = 0.03
"""Noise of the encoder's samples, in standard deviations of a latent."""
_ANCHOR = 1.0
"""Size of the constants that fix the statistics of a norm's group."""
_WHISPER_ENCODER, _WHISPER_DECODER = 0.05, 0.25
"""What a signal is multiplied by before such a norm: small beside the anchors, so that their statistics hold."""
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class PatchBasis:
    """Principal components of the patches of pictures in [-1, 1]."""

    mean_P: npt.NDArray[np.float32]
    components_PC: npt.NDArray[np.float32]
    """Orthonormal columns, the strongest first; the largest number in each is positive."""
    deviations_C: npt.NDArray[np.float32]
    """Standard deviation of patches along each component."""

    def encode(self, pictures_NHWC: npt.NDArray[np.uint8]) -> Tensor:
        """Latents NCHW of unit variance, as the denoiser sees them."""
        whitened = (to_patches(pictures_NHWC) - self.mean_P) @ self.components_PC / self.deviations_C
        return torch.from_numpy(np.ascontiguousarray(whitened.transpose(0, 3, 1, 2)))


def to_patches(pictures_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pictures uint8 NHWC to float32 N(H/4)(W/4)P in [-1, 1].

    Raises:
        UserError: other types or shapes, or sides that are no multiple of 4.
    """
    if pictures_NHWC.dtype != np.uint8 or pictures_NHWC.ndim != 4 or pictures_NHWC.shape[-1] != _COLOURS:
        raise UserError(
            f"uint8 [N, H, W, 3] pictures are needed, not {pictures_NHWC.dtype} {list(pictures_NHWC.shape)}."
        )
    count, height, width, _ = pictures_NHWC.shape
    if height % _PATCH or width % _PATCH:
        raise UserError(
            f"Pictures of {width} x {height} pixels cannot be cut into patches; sides must be multiples of {_PATCH}."
        )
    rows, columns = height // _PATCH, width // _PATCH
    cut = pictures_NHWC.reshape(count, rows, _PATCH, columns, _PATCH, _COLOURS).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(count, rows, columns, -1).astype(np.float32) / 127.5 - 1


def patch_basis(pictures_NHWC: npt.NDArray[np.uint8], components: int = LATENT_CHANNELS) -> PatchBasis:
    """The ``components`` strongest principal components of the patches of some pictures (2000 are plenty).

    Raises:
        UserError: the pictures are of the wrong kind, or too plain to have so many components.
    """
    patches_MP = to_patches(pictures_NHWC).reshape(-1, _PATCH * _PATCH * _COLOURS).astype(np.float64)
    mean_P = patches_MP.mean(0)
    centred_MP = patches_MP - mean_P
    variances, vectors = np.linalg.eigh(centred_MP.T @ centred_MP / len(patches_MP))
    strongest = np.argsort(-variances)[:components]
    if variances[strongest[-1]] < 1e-6:
        raise UserError(
            f"The patches of these {len(pictures_NHWC)} pictures vary in fewer than {components} ways; give more pictures."
        )
    chosen_PC = vectors[:, strongest]
    peaks = chosen_PC[np.abs(chosen_PC).argmax(0), np.arange(components)]
    return PatchBasis(
        mean_P.astype(np.float32),
        (chosen_PC * np.sign(peaks)).astype(np.float32),
        np.sqrt(variances[strongest]).astype(np.float32),
    )


def analytic_autoencoder(pictures_NHWC: npt.NDArray[np.uint8], seed: int = 0) -> AutoencoderKL:
    """An autoencoder fitted to pictures without training: final encoder, and a decoder ready for `train_decoder`.

    Args:
        pictures_NHWC: uint8 pictures of the world, a few hundred at least.
        seed: of the decoder's weights that do nothing yet.
    """
    basis = patch_basis(pictures_NHWC)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(vae_config())
    with torch.no_grad():
        _quieten(vae)
        _set_encoder(vae.encoder, basis, vae.config.scaling_factor)
        _pass_on(_cleared(vae, "quant_conv"))
        _set_decoder(vae.decoder, basis)
        _pass_on(_cleared(vae, "post_quant_conv"), vae.config.scaling_factor)
    return vae.requires_grad_(False).eval()


def _quieten(network: nn.Module) -> None:
    """Every residual branch starts as zero, so that the network starts shallow and learns many times faster."""
    for path, module in network.named_modules():
        if isinstance(module, ResnetBlock2D):
            _cleared(network, f"{path}.conv2")
        elif isinstance(module, VaeAttention):
            _cleared(network, f"{path}.to_out.0")


def _set_encoder(encoder: nn.Module, basis: PatchBasis, scaling_factor: float) -> None:
    """Identity, 2 x 2 pixels into channels, components of 2 x 2 of those, and out through norm and SiLU."""
    into = _cleared(encoder, "conv_in")
    gather = _cleared(encoder, "down_blocks.0.downsamplers.0.conv")
    for colour in range(_COLOURS):
        into.weight[colour, colour, 1, 1] = 1
        for row in range(2):
            for column in range(2):
                gather.weight[(row * 2 + column) * _COLOURS + colour, colour, row, column] = 1
    _pass_on(_cleared(encoder, "down_blocks.1.resnets.0.conv_shortcut"), channels=4 * _COLOURS)

    project = _cleared(encoder, "down_blocks.1.downsamplers.0.conv")
    whiten_CP = torch.from_numpy((basis.components_PC / basis.deviations_C).T.copy())
    latents = len(whiten_CP)
    # A patch's rows are (outer row, inner row): the outer pair is the kernel here, the inner pair lies in the channels.
    whiten_CYyXxc = whiten_CP.reshape(latents, 2, 2, 2, 2, _COLOURS)
    for row in range(2):
        for column in range(2):
            inner_CK = whiten_CYyXxc[:, row, :, column].reshape(latents, -1)
            project.weight[:latents, : 4 * _COLOURS, row, column] = inner_CK
    project.bias[:latents] = -whiten_CP @ torch.from_numpy(basis.mean_P)

    pairs = _split(_layer(encoder, "down_blocks.2.resnets.0.conv_shortcut"), latents, _WHISPER_ENCODER)
    _anchor(_layer(encoder, "mid_block.resnets.1.conv2"), pairs)
    out = _cleared(encoder, "conv_out")
    _join(out, pairs, _WHISPER_ENCODER, signal_variance=1.0, gain=1 / scaling_factor)
    out.bias[latents:] = 2 * math.log(_POSTERIOR_DEVIATION / scaling_factor)


def _set_decoder(decoder: nn.Module, basis: PatchBasis) -> None:
    """The mean colour of each patch in three channels, enlarged twice by a triangle filter; other channels stay random."""
    into = _layer(decoder, "conv_in")
    colours_KcC = torch.from_numpy(basis.components_PC * basis.deviations_C).reshape(_PATCH**2, _COLOURS, -1)
    into.weight[:_COLOURS] = 0
    into.weight[:_COLOURS, :, 1, 1] = colours_KcC.mean(0)
    into.bias[:_COLOURS] = torch.from_numpy(basis.mean_P).reshape(-1, _COLOURS).mean(0)

    tent = torch.tensor([0.25, 0.5, 0.25])
    for level in range(2):
        enlarge = _layer(decoder, f"up_blocks.{level}.upsamplers.0.conv")
        enlarge.weight[:_COLOURS] = 0
        enlarge.bias[:_COLOURS] = 0
        for colour in range(_COLOURS):
            enlarge.weight[colour, colour] = tent[:, None] * tent
    narrow = _layer(decoder, "up_blocks.1.resnets.0.conv_shortcut")
    narrow.weight[:_COLOURS] = 0
    narrow.bias[:_COLOURS] = 0
    _pass_on(narrow, channels=_COLOURS)

    pairs = _split(_layer(decoder, "up_blocks.2.resnets.0.conv_shortcut"), _COLOURS, _WHISPER_DECODER)
    _anchor(_layer(decoder, "up_blocks.2.resnets.1.conv2"), pairs)
    _join(_cleared(decoder, "conv_out"), pairs, _WHISPER_DECODER, signal_variance=0.5, gain=1.0)


class _Layer(NamedTuple):
    """Weights of a convolution, out x in x height x width (or out x in of a linear layer), and its bias."""

    weight: Tensor
    bias: Tensor


class _Pairs(NamedTuple):
    """Signal k lies in channels ``starts[k]`` (positive) and the next (negative); ``group`` channels are normed together.

    Every group that holds a pair holds ``crowd`` of them, so that the norm divides all signals by the same number.
    """

    starts: tuple[int, ...]
    group: int
    crowd: int


def _layer(network: nn.Module, path: str) -> _Layer:
    module = network.get_submodule(path)
    assert isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None, path
    return _Layer(module.weight, module.bias)


def _cleared(network: nn.Module, path: str) -> _Layer:
    layer = _layer(network, path)
    layer.weight.zero_()
    layer.bias.zero_()
    return layer


def _pass_on(layer: _Layer, factor: float = 1.0, channels: int | None = None) -> None:
    """Make a 1 x 1 convolution give its first ``channels`` (all, if not given) times ``factor``."""
    for channel in range(channels or layer.weight.shape[1]):
        layer.weight[channel, channel, 0, 0] = factor


def _split(shortcut: _Layer, signals: int, whisper: float) -> _Pairs:
    """Make a 1 x 1 convolution spread its first channels into pairs, which lie at the starts of a later norm's groups."""
    groups = vae_config().norm_num_groups
    group, crowd = len(shortcut.bias) // groups, math.ceil(signals / groups)
    starts = tuple(signal // crowd * group + signal % crowd * 2 for signal in range(signals))
    for start in {start // group * group for start in starts}:
        shortcut.weight[start : start + group] = 0
        shortcut.bias[start : start + group] = 0
    for signal, start in enumerate(starts):
        shortcut.weight[start, signal, 0, 0] = whisper
        shortcut.weight[start + 1, signal, 0, 0] = -whisper
    return _Pairs(starts, group, crowd)


def _anchor(last: _Layer, pairs: _Pairs) -> None:
    """Add constants of both signs to the channels beside the pairs. The layer's weights are zero already."""
    for first in {start // pairs.group * pairs.group for start in pairs.starts}:
        for channel in range(first + 2 * pairs.crowd, first + pairs.group):
            last.bias[channel] = _ANCHOR if channel % 2 else -_ANCHOR


def _join(out: _Layer, pairs: _Pairs, whisper: float, signal_variance: float, gain: float) -> None:
    """Take the difference of each pair, and give back the size that norm and whisper took: silu(u) - silu(-u) = u."""
    anchors, group = pairs.group - 2 * pairs.crowd, pairs.group
    variance = (anchors * _ANCHOR**2 + 2 * pairs.crowd * whisper**2 * signal_variance) / group
    size = gain * math.sqrt(variance + _NORM_EPS) / whisper
    for signal, start in enumerate(pairs.starts):
        out.weight[signal, start, 1, 1] = size
        out.weight[signal, start + 1, 1, 1] = -size
