"""A small dataset and recipes about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import save_png


@pytest.fixture(scope="session")
def pictures() -> list[tuple[object, str]]:
    """Four drawings with their captions."""
    rng = random.Random(1)
    return [(drawing.image, ", ".join(drawing.tags)) for drawing in (draw(sample(rng), i, 64) for i in range(4))]


@pytest.fixture
def dataset(tmp_path: Path, pictures: list) -> Path:
    """A folder with them."""
    folder = tmp_path / "mira"
    for index, (image, caption) in enumerate(pictures):
        path = folder / "2_mira" / f"{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture
def recipe_file(dataset: Path) -> Callable[[str], Path]:
    """Writes a recipe beside the dataset's pictures."""

    def write(text: str) -> Path:
        path = dataset / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
