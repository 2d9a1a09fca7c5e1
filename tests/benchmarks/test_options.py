"""The table of what options do: its rows are recipes, none is forgotten, and its words say what its figures do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from lorabake.base.cards import cards
from lorabake.protocols.objective import RuleCard
from lorabake.recipe import check

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def options() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("options")
    finally:
        sys.path.remove(str(FOLDER))


def test_every_row_is_a_recipe_that_can_be_started(options: Any, tmp_path: Path) -> None:
    rows = [*options.SEEDS, *(row for group in options.ROWS.values() for row in group)]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        path, settings = options.recipe_of(row, tmp_path)
        checked = check(path, settings)
        idle = [warning for warning in checked.warnings if "does nothing" in warning]
        assert not idle, row.name
        assert checked.length.steps * checked.recipe.train.gradient_accumulation == 300, row.name


@pytest.mark.parametrize("kind", ["loss", "weighting", "noise", "timesteps", "optimizer", "schedule"])
def test_no_part_that_the_pocket_model_can_use_is_forgotten(options: Any, kind: str) -> None:
    said = " ".join(
        [
            options.PLAIN,
            options.NOT_HERE,
            *(s for group in options.ROWS.values() for row in group for s in row.settings),
        ]
    )
    usual = {"l2", "min-snr", "gaussian", "uniform", "adamw", "linear"}
    for card in cards(kind).values():
        usable = not isinstance(card, RuleCard) or "epsilon" in card.predictions
        assert card.name in usual or not usable or card.name in said, f"{kind} {card.name}"


def test_only_what_is_beyond_chance_is_told(options: Any) -> None:
    mean, chance = {"identity": 0.7, "obeys": 0.95, "leaks": 0.05}, {"identity": 0.06, "obeys": 0.03, "leaks": 0.04}
    same = {"identity": 0.74, "obeys": 0.93, "leaks": 0.02}
    assert options.effect(same, mean, chance) == "Nothing beyond chance here."
    changed = {"identity": 0.8, "obeys": 0.9, "leaks": 0.0}
    said = "Learns more of the character (+10), prompts are obeyed less (-5), leaks less (-5)."
    assert options.effect(changed, mean, chance) == said


def test_a_row_is_measured_anew_when_what_it_depends_on_changes(options: Any) -> None:
    row = cast(Any, options.ROWS["Adapter"][0])
    other = type(row)(row.name, (*row.settings, "train.seed=1"))
    assert options.fingerprint(row) == options.fingerprint(type(row)(row.name, row.settings))
    assert options.fingerprint(row) != options.fingerprint(other)
