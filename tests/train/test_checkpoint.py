"""What a run's files say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorabake.formats.header import read_header

Options = Callable[..., list[str]]


def said(oven: Any, dataset: Path, into: Path, words: list[str]) -> dict[str, str]:
    """Metadata of the last file of a run."""
    done = oven.run("train", dataset, "--into", into, *words, cwd=dataset.parent)
    assert done.code == 0, done.err
    return read_header(into / "checkpoints" / "mira.safetensors").metadata


def test_an_epoch_has_the_batches_it_has(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    """Six pictures one by one are six batches, though the second step of an epoch then has two instead of four."""
    words = options(train__length="1 epochs", train__batch_size=1, train__gradient_accumulation=4)
    metadata = said(oven, dataset, tmp_path / "run", words)
    assert metadata["ss_num_batches_per_epoch"] == "6" and metadata["ss_steps"] == "2"
