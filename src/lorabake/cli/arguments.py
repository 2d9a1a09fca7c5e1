"""Arguments several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorabake.recipe import Checked


def add_json(parser: argparse.ArgumentParser, help: str = "print JSON for programs") -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help=help)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe or folder, and what may be set beside it."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE|FOLDER", help="a recipe (.toml), or a folder of pictures")
    parser.add_argument("--base", help="base model: a diffusers folder, or 'pocket' (same as --set model.base=…)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; may be repeated"
    )


def checked_recipe(arguments: argparse.Namespace) -> Checked:
    """The recipe that :func:`add_recipe`'s arguments ask for."""
    import json

    from lorabake.recipe import check

    overrides = list(arguments.set)
    if arguments.base:
        overrides.append(f"model.base={json.dumps(arguments.base)}")
    return check(arguments.recipe, overrides)
