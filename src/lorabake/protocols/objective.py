"""What an objective offers: how clean latents become noisy ones, what the denoiser is asked for, and how wrong it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Objective(Protocol):
    """Made by the function its card names, ``code(settings, model)``. Legend: B batch, C channels, H and W latent height and width."""

    def draw_timesteps(self, count: int, generator: Generator) -> Tensor:
        """``timesteps_B`` on the CPU."""
        ...

    def corrupt(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Noisy latents."""
        ...

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the denoiser should answer."""
        ...

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """Weighted loss of each sample, ``loss_B``, in float32."""
        ...
