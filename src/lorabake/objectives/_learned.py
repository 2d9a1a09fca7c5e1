"""How much each noise level counts, learned on the way: the "uncertainty-based multi-task weighting" of Karras et al. 2023, arXiv 2312.02696.

Training at different noise levels is training for different tasks, and the best weight of each is one over its own error (after Kendall et
al. 2017, arXiv 1705.07115). With a loss of L/exp(u) + u for a level, u goes to ln L, and every level's error to the same share of the whole.

Theirs is a perceptron on random waves of ln σ, wider than it needs to be here; ours is a cosine series over the share of noise, which has two
ends. It starts as nothing, and finds a model's errors, which differ several hundredfold, in about 300 steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorabake.base.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

_WAVES = 16
"""Terms of the series; the first is the mean."""


class LearnedWeights:
    """u as a function of ``noise_share_B`` = σ / (1 + σ), 0 to 1: Σ_k a_k cos(π k share), a = 0 at birth.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.a_K = torch.nn.Parameter(torch.zeros(_WAVES, device=device))
        self._waves_K = math.pi * torch.arange(_WAVES, dtype=torch.float32, device=device)

    def u(self, noise_share_B: Tensor) -> Tensor:
        """``u_B``: the logarithm of the loss that is expected at these levels."""
        return ((noise_share_B[:, None] * self._waves_K).cos() * self.a_K).sum(1)

    def __call__(self, loss_B: Tensor, noise_share_B: Tensor) -> Tensor:
        """L / exp(u) + u of each sample: at birth the plain loss. It can be below zero."""
        u_B = self.u(noise_share_B)
        return loss_B * (-u_B).exp() + u_B
