"""What people read when something is wrong."""

from __future__ import annotations

import pytest

from lorabake.base.errors import MissingExtra, NotFinite, Problem, Problems, RunStopped, UserError, nearest


def test_all_problems_in_one_message() -> None:
    found = [
        Problem("adapter.rnak", "not a setting of 'lokr'. Did you mean 'rank'?"),
        Problem("optimizer.name", "'adamw-8bti' is not known. Did you mean 'adamw-8bit'?"),
    ]
    error = Problems("mira/recipe.toml", found, "`lorabake explain adapter` lists what 'lokr' accepts.")
    assert str(error) == (
        "mira/recipe.toml has 2 problems.\n"
        "  adapter.rnak    not a setting of 'lokr'. Did you mean 'rank'?\n"
        "  optimizer.name  'adamw-8bti' is not known. Did you mean 'adamw-8bit'?\n"
        "Nothing was started. `lorabake explain adapter` lists what 'lokr' accepts."
    )
    assert error.problems == tuple(found)


def test_one_problem_without_advice() -> None:
    assert str(Problems("x.toml", [Problem("a", "b.")])) == "x.toml has 1 problem.\n  a  b.\nNothing was started."


def test_a_long_place_does_not_push_the_others_away() -> None:
    lines = str(Problems("x", [Problem("p" * 50, "long."), Problem("a", "short.")])).splitlines()
    assert lines[1] == "  " + "p" * 50 + "  long."
    assert lines[2] == "  a" + " " * 33 + "short."


def test_nearest() -> None:
    assert nearest("rnak", ["rank", "alpha"]) == "Did you mean 'rank'?"
    assert nearest("zzz", ["rank", "alpha"]) == "Allowed: alpha, rank."
    assert nearest("zzz", []) == ""


def test_a_missing_package_names_the_command() -> None:
    assert str(MissingExtra("The optimizer 'x'", "8bit")).endswith("pip install 'lorabake[8bit]'")


@pytest.mark.parametrize(
    ("error", "code"), [(UserError, 2), (Problems, 2), (MissingExtra, 2), (RunStopped, 3), (NotFinite, 3)]
)
def test_exit_codes(error: type, code: int) -> None:
    assert error.exit_code == code
