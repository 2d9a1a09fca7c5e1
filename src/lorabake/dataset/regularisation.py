"""Which regularisation pictures an epoch takes: a fixed number, in turn, so that none is left out.

Regularisation pictures show what the base model draws of the class without what is being learnt, and keep it as it is. An epoch
takes ``ratio`` of them for every training picture (repeats counted on both sides): 1 by default, which doubles the epoch, as in
kohya's scripts. There, though, the first ones are taken in every epoch and the rest never; here epochs go on where the last one
stopped, through one shuffled round of all pictures after the other.

Every epoch takes the same number from each bucket, so that all epochs have equally many batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from lorabake.base.streams import random_stream
from lorabake.dataset.buckets import Size


@dataclass(frozen=True, slots=True)
class Turns:
    """How some regularisation pictures take turns."""

    buckets: Sequence[Size]
    """Of each picture."""
    repeats: Sequence[int]
    """How often each is in one round."""
    per_epoch: Mapping[Size, int]
    """Pictures that an epoch takes from each bucket."""
    seed: int
    """The run's."""

    @classmethod
    def for_entries(
        cls, entries: int, ratio: float, buckets: Sequence[Size], repeats: Sequence[int], seed: int
    ) -> Turns:
        """For epochs of so many training pictures, repeats included.

        Buckets share what an epoch takes by the pictures in them (largest remainders first), at least 1 each.
        """
        pool: Counter[Size] = Counter()
        for bucket, times in zip(buckets, repeats, strict=True):
            pool[bucket] += times
        wanted, total = max(1, round(ratio * entries)), sum(pool.values())
        shares = {bucket: wanted * pool[bucket] / total for bucket in sorted(pool)}
        taken = {bucket: int(share) for bucket, share in shares.items()}
        by_remainder = sorted(shares, key=lambda bucket: taken[bucket] - shares[bucket])
        for bucket in by_remainder[: wanted - sum(taken.values())]:
            taken[bucket] += 1
        return cls(buckets, repeats, {bucket: max(1, count) for bucket, count in taken.items()}, seed)

    @property
    def entries(self) -> int:
        """Pictures that an epoch takes."""
        return sum(self.per_epoch.values())

    def of_epoch(self, epoch: int) -> list[int]:
        """How often each picture is in an epoch, counted from 0."""
        times = [0] * len(self.buckets)
        for bucket, count in self.per_epoch.items():
            rounds = self._rounds(bucket, epoch * count)
            for index in islice(rounds, count):
                times[index] += 1
        return times

    def unseen(self, epochs: int) -> int:
        """Pictures that so many epochs never take."""
        never = 0
        for bucket, count in self.per_epoch.items():
            seen = set(islice(self._rounds(bucket, 0), epochs * count))
            never += sum(own == bucket for own in self.buckets) - len(seen)
        return never

    def _rounds(self, bucket: Size, start: int) -> Iterator[int]:
        """One shuffled round of a bucket's pictures after the other, without end, from entry ``start`` on."""
        pool = [index for index, own in enumerate(self.buckets) if own == bucket for _ in range(self.repeats[index])]
        number, skip = divmod(start, len(pool))
        while True:
            order = list(pool)
            random_stream(self.seed, "regularisation", *bucket, number).shuffle(order)
            yield from order[skip:]
            number, skip = number + 1, 0
