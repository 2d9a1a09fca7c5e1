"""Randomness without state: each draw depends on its name and place alone."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from lorabake.base.streams import random_stream, stream_seed, torch_stream

SEEDS = st.integers(0, 2**63 - 1)
NAMES = st.sampled_from(["noise", "data", "captions", "flip", "timesteps", "adapter", "dropout"])
PLACES = st.lists(st.integers(0, 10**9), max_size=4).map(tuple)


@given(SEEDS, NAMES, PLACES)
def test_seeds_fit_everywhere(seed: int, name: str, place: tuple[int, ...]) -> None:
    assert 0 <= stream_seed(seed, name, *place) < 2**63
    assert stream_seed(seed, name, *place) == stream_seed(seed, name, *place)


@given(st.lists(st.tuples(SEEDS, NAMES, PLACES), min_size=2, max_size=20, unique=True))
def test_every_name_and_place_has_a_seed_of_its_own(keys: list[tuple[int, str, tuple[int, ...]]]) -> None:
    assert len({stream_seed(seed, name, *place) for seed, name, place in keys}) == len(keys)


def test_known_values() -> None:
    """Changing these changes every run of everybody: bytes of old recipes would no longer come out again."""
    assert stream_seed(42, "noise", 0, 0) == 4543111638386518429
    assert random_stream(42, "data", 3).random() == 0.948425974584382


def test_the_same_in_another_process() -> None:
    code = "from lorabake.base.streams import stream_seed; print(stream_seed(42, 'captions', 1, 2))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == stream_seed(42, "captions", 1, 2)


def test_drawing_from_one_stream_moves_no_other() -> None:
    import torch

    alone = torch.randn(5, generator=torch_stream(1, "noise", 7))
    others = [torch_stream(1, name, 7) for name in ("timesteps", "adapter")]
    for generator in others:
        torch.randn(100, generator=generator)
    random_stream(1, "noise", 7).random()
    assert torch.equal(alone, torch.randn(5, generator=torch_stream(1, "noise", 7)))
    assert not torch.equal(alone, torch.randn(5, generator=torch_stream(1, "noise", 8)))
    assert not torch.equal(alone, torch.randn(5, generator=torch_stream(2, "noise", 7)))
