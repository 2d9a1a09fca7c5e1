"""What a check leaves: a recipe that can be run, and everything that it stands on."""

from __future__ import annotations

from dataclasses import dataclass

from lorabake.dataset.buckets import Placement
from lorabake.dataset.folder import Dataset, Sample
from lorabake.dataset.masks import Mask
from lorabake.dataset.order import RunLength
from lorabake.protocols.family import ModelFacts
from lorabake.recipe.pictures import Pictures, Regularisation
from lorabake.recipe.recipe import Recipe
from lorabake.recipe.seen import SeenCaption


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe with nothing left open, and what it stands on."""

    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    samples: tuple[Sample, ...]
    """What is trained on: the dataset's samples, each once for every size that it is seen at."""
    placements: tuple[Placement, ...]
    """Bucket and crop of each of them."""
    warnings: tuple[str, ...]
    """What is allowed and probably not meant."""
    captions: tuple[SeenCaption, ...]
    """What the text encoders see of each of the dataset's samples; empty where the family does not say."""
    length: RunLength
    """How long the run is, regularisation pictures included."""
    masks: tuple[Mask | None, ...] = ()
    """The mask of each of ``samples`` as it is in its bucket; None counts whole. Empty where masks are not asked for."""
    regularisation: Regularisation | None = None
    held_out: Pictures | None = None
    """Pictures that are asked about and never trained on; they are none of the dataset's samples any more."""

    @property
    def pictures(self) -> tuple[Pictures, ...]:
        """All that is trained on, by folder: the dataset, then the regularisation folders."""
        own = Pictures(self.dataset.path, self.samples, self.placements, self.masks)
        return (own, *(self.regularisation.folders if self.regularisation else ()))

    @property
    def entries(self) -> int:
        """Training pictures of an epoch, repeats and sizes included, without regularisation pictures."""
        return sum(sample.repeats for sample in self.samples)
