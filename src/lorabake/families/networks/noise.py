"""The noise schedule a diffusion model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.protocols.family import Model


def betas_of(sampler: Mapping[str, Any]) -> Tensor:
    """The noise schedule a model was trained with, from its scheduler's settings.

    Raises:
        UserError: a kind of schedule that is not known, or zero terminal SNR with ε prediction, where the last step has no target.
    """
    kind, count = sampler.get("beta_schedule", "scaled_linear"), int(sampler["num_train_timesteps"])
    if sampler.get("trained_betas"):
        betas_T = torch.tensor(sampler["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas_T = torch.linspace(sampler["beta_start"], sampler["beta_end"], count).double()
    elif kind == "scaled_linear":
        betas_T = torch.linspace(sampler["beta_start"] ** 0.5, sampler["beta_end"] ** 0.5, count).double() ** 2
    else:
        raise UserError(f"The model's noise schedule '{kind}' is not known. Known: linear, scaled_linear.")
    if not sampler.get("rescale_betas_zero_snr"):
        return betas_T
    if sampler.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "The model asks for zero terminal SNR but predicts noise (epsilon): its last timestep has nothing to predict."
        )
    return _zero_terminal_snr(betas_T)


def reschedule(model: Model, changes: Mapping[str, Any]) -> None:
    """Give a loaded model another noise schedule, for steps and pictures alike.

    Raises:
        UserError: as for :func:`betas_of`.
    """
    if changes:
        model.sampler = {**model.sampler, **changes}
        model.betas_T = betas_of(model.sampler)


def _zero_terminal_snr(betas_T: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last is 0 and the first stays. Lin et al. 2023, arXiv 2305.08891, algorithm 1."""
    roots_T = (1 - betas_T).cumprod(0).sqrt()
    first, last = roots_T[0].clone(), roots_T[-1].clone()
    cumprod_T = ((roots_T - last) * first / (first - last)) ** 2
    return 1 - torch.cat([cumprod_T[:1], cumprod_T[1:] / cumprod_T[:-1]])
