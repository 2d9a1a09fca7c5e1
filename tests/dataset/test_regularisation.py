"""Which regularisation pictures an epoch takes."""

from __future__ import annotations

from collections import Counter

import pytest

from lorabake.dataset.regularisation import Turns

SQUARE, WIDE = (64, 64), (96, 48)


def turns(entries: int, ratio: float = 1.0, squares: int = 0, wides: int = 0, times: int = 1, seed: int = 42) -> Turns:
    buckets = [SQUARE] * squares + [WIDE] * wides
    return Turns.for_entries(entries, ratio, buckets, [times] * len(buckets), seed)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (turns(10, squares=50), {SQUARE: 10}),
        (turns(10, 0.5, squares=50), {SQUARE: 5}),
        (turns(10, squares=2), {SQUARE: 10}),
        (turns(10, squares=30, wides=10), {SQUARE: 8, WIDE: 2}),
        (turns(10, squares=26, wides=14), {SQUARE: 7, WIDE: 3}),
        (turns(4, squares=99, wides=1), {SQUARE: 4, WIDE: 1}),
        (turns(1, 0.01, squares=3), {SQUARE: 1}),
    ],
)
def test_an_epoch_takes_as_many_as_there_are_training_pictures_from_every_bucket(
    given: Turns, expected: dict[tuple[int, int], int]
) -> None:
    assert given.per_epoch == expected and given.entries == sum(expected.values())
    for epoch in range(5):
        taken: Counter[tuple[int, int]] = Counter()
        for bucket, times in zip(given.buckets, given.of_epoch(epoch), strict=True):
            taken[bucket] += times
        assert taken == expected, "all epochs have equally many batches"


def test_all_are_taken_in_turn_before_any_comes_again() -> None:
    given = turns(6, squares=15, wides=4)
    seen: Counter[int] = Counter()
    for epoch in range(40):
        for index, times in enumerate(given.of_epoch(epoch)):
            seen[index] += times
        for pool in (range(15), range(15, 19)):
            counts = [seen[index] for index in pool]
            assert max(counts) - min(counts) <= 1
    assert sum(seen.values()) == 40 * 6


def test_repeats_count_within_a_round() -> None:
    given = Turns.for_entries(4, 1.0, [SQUARE] * 3, [2, 1, 1], 42)
    assert all(given.of_epoch(epoch) == [2, 1, 1] for epoch in range(4))


def test_the_order_is_the_seeds_and_every_rounds_own() -> None:
    given = turns(5, squares=10)
    assert given.of_epoch(3) == turns(5, squares=10).of_epoch(3) != turns(5, squares=10, seed=7).of_epoch(3)
    halves = [tuple(given.of_epoch(epoch)) for epoch in range(0, 12, 2)]
    assert len(set(halves)) > 3


@pytest.mark.parametrize(("epochs", "unseen"), [(1, 15), (3, 5), (4, 0), (9, 0)])
def test_how_many_are_never_seen(epochs: int, unseen: int) -> None:
    given = turns(5, squares=20)
    seen = {index for epoch in range(epochs) for index, times in enumerate(given.of_epoch(epoch)) if times}
    assert given.unseen(epochs) == unseen == 20 - len(seen)
