"""What every family with an autoencoder of its own does alike: where it is, and pictures to latents and back."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lorabake.base.units import size
from lorabake.families.networks.components import Component
from lorabake.families.networks.config import VaeConfig
from lorabake.families.networks.load import digest, fill
from lorabake.families.networks.residence import Residence, give_back, residence_of, resting
from lorabake.families.networks.swapping import BlockSwap, evenly
from lorabake.families.networks.vae import AutoencoderKL
from lorabake.protocols.family import Layer, LayerGroup, ModelFacts, Part, Resident

_C = TypeVar("_C")
_M = TypeVar("_M", bound=nn.Module)


def trainable_norm(module: nn.Module) -> bool:
    """Whether it is a layer norm or group norm with a weight of its own."""
    return isinstance(module, nn.LayerNorm | nn.GroupNorm) and isinstance(module.weight, Tensor)


def with_norms(group: LayerGroup, module: nn.Module) -> LayerGroup:
    """A layer's group, given that of its place: norms have one of their own, but for those that are left alone."""
    return "norm" if group != "other" and trainable_norm(module) else group


class LatentModel:
    """Part of a :class:`lorabake.protocols.family.Model`.

    Args:
        facts: what is known of the model.
        vae: its autoencoder on disk.
        dtype: of the frozen weights and activations.
        device: where they are loaded, straight from the file.
        vae_dtype: of the autoencoder, if another.
    """

    parts: Mapping[Part, nn.Module]
    _layers: Sequence[Layer]

    def __init__(
        self,
        facts: ModelFacts,
        vae: Component[VaeConfig],
        dtype: torch.dtype,
        device: str,
        vae_dtype: torch.dtype | None = None,
    ) -> None:
        self.facts, self._stored_vae = facts, vae
        self._device, self._dtype = torch.device(device), dtype
        self.vae = loaded(AutoencoderKL, vae, vae_dtype or dtype, device)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the denoiser's weights."""
        return self._dtype

    @functools.cached_property
    def latent_space(self) -> str:
        """sha256 of the VAE's weights as stored, and of its scale: the same in whatever file the same VAE lies."""
        vae = self._stored_vae
        return digest(vae.weights, vae.rename, f"{vae.config.scaling_factor} {vae.config.shift_factor}")

    @functools.cached_property
    def text_space(self) -> str:
        """sha256 of the fingerprints of every text encoder's weights and sizes: the same in whatever files the same ones lie."""
        told = [
            f"{name} {residence.identity()}"
            for name in self.parts
            if name != "denoiser"
            for residence in self._residences([name])
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def layers(self) -> Sequence[Layer]:
        """Every layer an adapter may change, denoiser first, in module order."""
        return self._layers

    def resting(self) -> frozenset[Resident]:
        """The networks whose weights are not in memory."""
        return cast("frozenset[Resident]", resting(self._networks()))

    def rest(self, names: Iterable[Resident]) -> None:
        """Let the weights of some networks leave memory; trained ones stay. Whatever uses them has them read again."""
        rested = [residence.rest() for residence in self._residences(names)]
        if any(rested):
            give_back(self._device)

    def wake(self, names: Iterable[Resident]) -> None:
        """Have the weights of some networks in memory.

        Raises:
            UserError: a file has changed since it was opened.
        """
        for residence in self._residences(names):
            residence.wake()

    def swap_blocks(self, count: int) -> Callable[[], str]:
        """Have so many of the denoiser's blocks wait in main memory, spread among the others; to train, they must all be recomputed.

        Returns:
            What tells, once the weights have been read, how many there are and what they take.
        """
        network: Any = self.parts["denoiser"]
        blocks: Sequence[Sequence[nn.Module]] = network.blocks()
        chosen = evenly(len(blocks), count)
        swap = BlockSwap(network, [blocks[index] for index in chosen], self._device)

        def told() -> str:
            text = f"{len(chosen)} of {len(blocks)} blocks wait in main memory, {size(swap.nbytes)}; the two in turn take {size(swap.on_card)}."
            slow = f" The system does not let the card read {size(swap.unread)} of it by itself: steps wait for it to be copied."
            return text + slow * bool(swap.unread)

        return told

    def _networks(self) -> Mapping[str, nn.Module]:
        return {**self.parts, "vae": self.vae}

    def _residences(self, names: Iterable[Resident]) -> Iterator[Residence]:
        networks = self._networks()
        for name in names:
            if (residence := residence_of(networks[name])) is not None:
                yield residence

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents, shifted and scaled."""
        posterior = self.vae.encode(images_BCHW.to(self.device, self.vae.encoder.conv_in.weight.dtype))
        latents = posterior.mean if generator is None else posterior.sample(generator)
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        latents = latents_BCHW.to(self.device, self.vae.encoder.conv_in.weight.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents + self.vae.config.shift_factor)


def loaded(network: Callable[[_C], _M], part: Component[_C], dtype: torch.dtype, device: str) -> _M:
    """A network built without storage and filled from its files."""
    return fill(lambda: network(part.config), part.weights, part.rename, dtype, device)
