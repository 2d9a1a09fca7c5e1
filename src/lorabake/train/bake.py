"""What one run works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from lorabake.dataset.caption import CaptionConfig, without_additions
from lorabake.dataset.folder import Sample
from lorabake.dataset.regularisation import Turns
from lorabake.optimizers._averages import Averages
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Framing, Model, Resident
from lorabake.protocols.objective import Objective
from lorabake.protocols.optimizer import Optimizer
from lorabake.recipe import Recipe
from lorabake.train.ahead import PicturesAhead
from lorabake.train.asked import Asked
from lorabake.train.beside import Beside
from lorabake.train.capture import Captured, Inputs
from lorabake.train.scaling import LossScale
from lorabake.train.text import TextSource
from lorabake.train.validation import HeldOut


@dataclass(frozen=True, slots=True)
class Bake:
    """Everything one run works with, ready to step."""

    recipe: Recipe
    model: Model
    graft: Graft
    objective: Objective
    text: TextSource
    groups: Sequence[FlatGroup]
    base_rates: Sequence[float]
    optimizer: Optimizer
    samples: Sequence[Sample]
    latents: Sequence[Sequence[Tensor]]
    """Latents of each sample, one per view: each of its looks as it is and, with flip, mirrored."""
    framings: Sequence[Sequence[Framing]]
    """How each of those views came to its size."""
    buckets: Sequence[tuple[int, int]]
    steps_per_epoch: int
    total_steps: int
    averages: Averages | None = None
    """Running averages of the weights, written beside them."""
    rate_of: Callable[[Mapping[str, Any]], float] = itemgetter("lr")
    """The learning rate that one of the optimizer's groups really has."""
    settle: Sequence[Callable[[int], Mapping[str, float]]] = ()
    """What is done to the weights after each of the optimizer's steps (told which, from 0); returns what is to be told of the step."""
    token_warmup_steps: int = 0
    """Optimizer steps until captions are shown with all their tags."""
    captured: Captured | None = None
    """Computes a batch's gradient from a recording, where there is something to gain from it (on a GPU)."""
    turns: Turns | None = None
    """How regularisation pictures take turns; they are the last of the samples."""
    noted_2B: Tensor | None = None
    """Where :func:`loss_of` notes each row's loss and timestep, for as many rows as a batch has at most; None notes nothing."""
    held_out: HeldOut | None = None
    """Asks about pictures that are not trained on."""
    more_inputs: Sequence[Callable[[Asked], Inputs]] = ()
    """What else the loss of this run is computed from (see :func:`loss_of`), by what makes it."""
    beside: Beside | None = None
    """What the objective learns for itself."""
    started_from: str | None = None
    """Name and hash of the LoRA file whose change training began with."""
    idle: frozenset[Resident] = frozenset()
    """What of the model no step needs: it rests."""
    scale: LossScale | None = None
    """What losses are multiplied by where gradients would be too small for the model's numbers."""
    hashes: Callable[[], Mapping[str, str]] = dict
    """Of the base model's own files, as the run's files name them; waits until they are known."""
    pictures: PicturesAhead | None = None
    """Reads the pictures of the next step, where every step sees new views of them; None where latents are kept."""

    @property
    def trained(self) -> int:
        """How many of the samples, the first ones, are training pictures."""
        return len(self.samples) - (len(self.turns.buckets) if self.turns else 0)

    def captions_of(self, index: int) -> CaptionConfig:
        """What is done to a sample's caption."""
        config = self.recipe.data.captions
        return config if index < self.trained else without_additions(config)
