"""In which order pictures are trained on.

The order of an epoch depends on the seed and the epoch alone: nothing to save, nothing to restore, and captions, noise
or the number of workers never change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from lorabake.base.errors import UserError
from lorabake.base.streams import random_stream
from lorabake.base.units import Duration
from lorabake.dataset.buckets import Size

Batch = tuple[int, ...]
"""Indices of the samples trained on together; all are in one bucket. A sample with repeats may be in a batch more than
once."""


def epoch_batches(
    buckets: Sequence[Size], repeats: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[Batch]:
    """Every batch of one epoch, in order.

    Each sample appears ``repeats`` times. A bucket's last batch is smaller when its entries do not divide evenly;
    nothing is dropped and nothing is padded.

    Args:
        buckets: the bucket (width, height) of each sample.
        repeats: how often each sample is trained on per epoch.
        batch_size: most samples in a batch.
        seed: the run's seed.
        epoch: which epoch, counted from 0.

    Raises:
        UserError: ``batch_size`` is below 1.
    """
    rng = random_stream(seed, "data", epoch)
    batches = []
    for entries in _entries(buckets, repeats).values():
        rng.shuffle(entries)
        batches += [tuple(entries[start : start + batch_size]) for start in _starts(entries, batch_size)]
    rng.shuffle(batches)
    return batches


def batches_per_epoch(buckets: Sequence[Size], repeats: Sequence[int], batch_size: int) -> int:
    """How many batches `epoch_batches` deals: per bucket its images x repeats / batch size, rounded up.

    Raises:
        UserError: ``batch_size`` is below 1.
    """
    return sum(len(_starts(entries, batch_size)) for entries in _entries(buckets, repeats).values())


@dataclass(frozen=True, slots=True)
class RunLength:
    """How long a run is, in everything that people count."""

    images_per_epoch: int
    """Pictures that one epoch shows, repeats and sizes included."""
    batches_per_epoch: int
    steps_per_epoch: int
    """Optimizer steps of one epoch: its batches / gradient accumulation, rounded up."""
    steps: int
    """Optimizer steps of the run."""
    images: int
    """Pictures that the run shows."""

    @property
    def epochs(self) -> float:
        """Epochs of the run; not whole where it is given in steps."""
        return self.steps / self.steps_per_epoch

    def told(self, batch_size: int, accumulation: int) -> str:
        """All of it in one line."""
        epochs = f"{self.epochs:.2f}".rstrip("0").rstrip(".")
        each = f"{self.steps} optimizer steps of {batch_size} × {accumulation}"
        return f"{epochs} epoch{'s' * (epochs != '1')} = {each}, {self.images} images seen"


def run_length(
    buckets: Sequence[Size], repeats: Sequence[int], batch_size: int, accumulation: int, length: Duration, seed: int
) -> RunLength:
    """The length of a run, exactly: smaller last batches and a last epoch that is not whole are counted as they are dealt.

    Args:
        buckets, repeats, batch_size, seed: as for `epoch_batches`.
        accumulation: batches per optimizer step; an epoch's last step may have fewer.
        length: of the run.
    """
    batches = batches_per_epoch(buckets, repeats, batch_size)
    per_epoch = -(-batches // accumulation)
    steps = length.steps(per_epoch)
    whole, rest = divmod(steps, per_epoch)
    images = whole * sum(repeats)
    if rest:
        images += sum(map(len, epoch_batches(buckets, repeats, batch_size, seed, whole)[: rest * accumulation]))
    return RunLength(sum(repeats), batches, per_epoch, steps, images)


def _entries(buckets: Sequence[Size], repeats: Sequence[int]) -> dict[Size, list[int]]:
    """Sample indices by bucket, each as often as it repeats. Buckets are in ascending order, whatever sample came first."""
    entries: dict[Size, list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
    for index, (bucket, times) in enumerate(zip(buckets, repeats, strict=True)):
        entries[bucket] += repeat(index, times)
    return entries


def _starts(entries: Sequence[int], batch_size: int) -> range:
    """Where each batch of one bucket begins."""
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is not a size. Give 1 or more.")
    return range(0, len(entries), batch_size)
