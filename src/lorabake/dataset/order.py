"""In which order pictures are trained on.

The order of an epoch depends on the seed and the epoch alone: nothing to save, nothing to restore, and captions, noise
or the number of workers never change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from lorabake.base.errors import UserError
from lorabake.base.streams import random_stream
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
