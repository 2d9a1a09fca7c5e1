"""Settings that every objective has."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from lorabake.base.cards import Settings


class ObjectiveSettings(Settings):
    """Rules by name, and the range of timesteps that is trained."""

    loss: str = "l2"
    """How far a prediction is from its target. See `lorabake list losses`."""
    weighting: str = "none"
    """How much each timestep counts. See `lorabake list weightings`."""
    timesteps: str = "uniform"
    """How timesteps are drawn. See `lorabake list timesteps`."""
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Lowest timestep trained (0 is clean)."""
    max_timestep: int = Field(default=1000, ge=1, le=1000)
    """Timesteps trained are below this (999 is pure noise)."""

    @model_validator(mode="after")
    def _some_timestep_is_trained(self) -> ObjectiveSettings:
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"min_timestep {self.min_timestep} must be below max_timestep {self.max_timestep}: nothing lies between."
            )
        return self

    def metadata(self) -> dict[str, Any]:
        """The loss."""
        return {"loss_type": self.loss}
