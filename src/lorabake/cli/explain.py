"""Explain a setting, a section or a part.

lorabake explain adapter.rank
lorabake explain optimizer
lorabake explain lora
"""

from __future__ import annotations

import argparse
from typing import Any

HELP = "explain a setting, a section or a part"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``explain``."""
    from lorabake.cli.arguments import add_json

    parser.add_argument("name", help="a setting (adapter.rank), a section (train) or a part (lora)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what a setting means, its default and what is allowed."""
    from lorabake.cli.terminal import show_json
    from lorabake.recipe.explain import explain

    found = explain(arguments.name)
    if arguments.json:
        show_json(found)
        return 0
    for entry in found:
        print(_text(entry))
    return 0


def _text(entry: dict[str, Any]) -> str:
    head = (
        f"{entry['name']}  ({entry['type']}"
        + (f", default {entry['default']}" if entry["default"] is not None else "")
        + ")"
    )
    owner = f"  of {entry['part']}" if entry["part"] else ""
    return f"{head}{owner}\n    {entry['text']}" + (f"\n    allowed: {entry['allowed']}" if entry["allowed"] else "")
