"""List parts: families, adapters, objectives and their rules (losses, weightings, timesteps …), optimizers, schedules."""

from __future__ import annotations

import argparse

HELP = "list the parts a recipe can name"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``list``."""
    from lorabake.cli.arguments import add_json

    parser.add_argument("kind", nargs="?", help="one kind only, such as adapters")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print names and summaries."""
    from lorabake.base.cards import ROOMS, cards
    from lorabake.base.errors import UserError, nearest
    from lorabake.cli.terminal import show_json

    plurals = {_plural(kind): kind for kind in ROOMS}
    wanted = list(ROOMS)
    if arguments.kind:
        kind = plurals.get(arguments.kind, arguments.kind)
        if kind not in ROOMS:
            raise UserError(f"'{arguments.kind}' is not a kind of part. {nearest(arguments.kind, plurals)}")
        wanted = [kind]
    if arguments.json:
        show_json({_plural(kind): {name: card.summary for name, card in cards(kind).items()} for kind in wanted})
        return 0
    for kind in wanted:
        print(_plural(kind))
        for name, card in cards(kind).items():
            print(f"  {name:<16} {card.summary}" + (f"  (pip install 'lorabake[{card.extra}]')" if card.extra else ""))
    return 0


def _plural(kind: str) -> str:
    if kind.endswith("s"):
        return kind + "es" if kind.endswith("ss") else kind
    return kind[:-1] + "ies" if kind.endswith("y") else kind + "s"
