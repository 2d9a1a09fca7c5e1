"""Every sampler by name, and which models each can draw with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lorabake.base.errors import UserError
from lorabake.protocols.family import Model, Prediction
from lorabake.sampling.ddim import Leg, Trajectory, ddim, euler, step
from lorabake.sampling.flow import FlowLeg, flow_euler, flow_step

if TYPE_CHECKING:
    from torch import Tensor

AnyLeg = TypeVar("AnyLeg")


@dataclass(frozen=True)
class Sampler(Generic[AnyLeg]):
    """A way of drawing. Legs of its trajectories have a ``timestep`` to ask the denoiser at."""

    predictions: tuple[Prediction, ...]
    """What the models predict that it draws with."""
    shown: str
    """Its name in generation parameters, as other tools write it."""
    trajectory: Callable[[Model, int, int], Trajectory[AnyLeg]]
    """Called with the model, the number of steps, and the picture's patches of 2 × 2 latent cells. Raises UserError for steps that cannot be."""
    step: Callable[[Tensor, Tensor, AnyLeg, Prediction], Tensor]
    """Called with the denoiser's output, the latents it was asked about, the leg and what the model predicts; answers the next latents."""


def _on_schedule(shown: str, trajectory: Callable[[Tensor, Mapping[str, Any], int], Trajectory[Leg]]) -> Sampler[Leg]:
    """A sampler on the noise schedule that ε and v models were trained with."""

    def of(model: Model, steps: int, tokens: int) -> Trajectory[Leg]:
        assert model.betas_T is not None, "a model that predicts ε or v has a noise schedule"
        return trajectory(model.betas_T, model.sampler, steps)

    return Sampler(("epsilon", "v"), shown, of, step)


def _flow_euler(model: Model, steps: int, tokens: int) -> Trajectory[FlowLeg]:
    return flow_euler(model.sampler, steps, tokens)


SAMPLERS: Mapping[str, Sampler[Any]] = {
    "ddim": _on_schedule("DDIM", ddim),
    "euler": _on_schedule("Euler", euler),
    "flow-euler": Sampler(("flow",), "Euler FlowMatch", _flow_euler, flow_step),
}
"""By the names that prompts and recipes use. Of those that fit a model, the first is its default."""


def samplers_for(prediction: Prediction) -> list[str]:
    """Names of the samplers for models that predict this, the default first."""
    return [name for name, sampler in SAMPLERS.items() if prediction in sampler.predictions]


def fitting(name: str | None, prediction: Prediction) -> Sampler[Any]:
    """The sampler of that name; None is the usual one for what the model predicts.

    Raises:
        UserError: it is for other models; the message names those for this one.
    """
    allowed = samplers_for(prediction)
    if name is not None and name not in allowed:
        raise UserError(
            f"'{name}' draws with models that predict {' or '.join(SAMPLERS[name].predictions)}; this one predicts {prediction}. "
            f"Allowed: {', '.join(allowed)}. Without a sampler, {allowed[0]} is taken."
        )
    return SAMPLERS[name or allowed[0]]
