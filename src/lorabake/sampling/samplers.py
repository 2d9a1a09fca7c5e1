"""Every sampler by name, and which models each can draw with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lorabake.protocols.family import Model, Prediction
from lorabake.protocols.sampler import SamplerCard
from lorabake.recipe.prompts import sampler_card
from lorabake.sampling.ddim import Leg, Trajectory, ddim, euler, step
from lorabake.sampling.flow import FlowLeg, flow_euler, flow_step

if TYPE_CHECKING:
    from torch import Tensor

AnyLeg = TypeVar("AnyLeg")


@dataclass(frozen=True)
class Sampler(Generic[AnyLeg]):
    """A way of drawing. Legs of its trajectories have a ``timestep`` to ask the denoiser at."""

    trajectory: Callable[[Model, int, int], Trajectory[AnyLeg]]
    """Called with the model, the number of steps, and the picture's patches of 2 × 2 latent cells. Raises UserError for steps that cannot be."""
    step: Callable[[Tensor, Tensor, AnyLeg, Prediction], Tensor]
    """Called with the denoiser's output, the latents it was asked about, the leg and what the model predicts; answers the next latents."""


def _on_schedule(trajectory: Callable[[Tensor, Mapping[str, Any], int], Trajectory[Leg]]) -> Sampler[Leg]:
    """A sampler on the noise schedule that ε and v models were trained with."""

    def of(model: Model, steps: int, tokens: int) -> Trajectory[Leg]:
        assert model.betas_T is not None, "a model that predicts ε or v has a noise schedule"
        return trajectory(model.betas_T, model.sampler, steps)

    return Sampler(of, step)


def _flow_euler(model: Model, steps: int, tokens: int) -> Trajectory[FlowLeg]:
    return flow_euler(model.sampler, steps, tokens)


DDIM, EULER, FLOW_EULER = _on_schedule(ddim), _on_schedule(euler), Sampler(_flow_euler, flow_step)
_HERE = "lorabake.sampling.samplers"
CARDS = (
    SamplerCard(
        "sampler",
        "ddim",
        "Straight steps on the timesteps of training; the usual one for models that predict noise or v.",
        f"{_HERE}:DDIM",
        predictions=("epsilon", "v"),
        shown="DDIM",
        usual=True,
    ),
    SamplerCard(
        "sampler",
        "euler",
        "The same steps on timesteps of its own, as most clients' Euler has them.",
        f"{_HERE}:EULER",
        predictions=("epsilon", "v"),
        shown="Euler",
    ),
    SamplerCard(
        "sampler",
        "flow-euler",
        "Straight steps from noise to picture; the usual one for flow models.",
        f"{_HERE}:FLOW_EULER",
        predictions=("flow",),
        shown="Euler FlowMatch",
        usual=True,
    ),
)


def fitting(name: str | None, prediction: Prediction) -> Sampler[Any]:
    """The sampler of that name; None is the usual one for what the model predicts.

    Raises:
        UserError: there is no such sampler, or it is for other models; the message names those for this one.
    """
    return sampler_card(name, prediction).load()
