"""The embedded base model and its picture world.

lorabake pocket draw "1girl, red hair, long hair, beach"     the world's own drawing of a prompt
lorabake pocket sheet --count 100                            a sheet of random drawings
lorabake pocket tags                                         every tag the model knows
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "the embedded base model and its picture world"


def configure(parser: argparse.ArgumentParser) -> None:
    """Sub-commands of ``pocket``."""
    from lorabake.cli.arguments import add_json

    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    draw = actions.add_parser("draw", help="draw what a prompt says, by the world's own rules")
    draw.add_argument("prompt", help='tags, such as "1girl, red hair, beach"')
    draw.add_argument("--character", help="one of the invented characters")
    draw.add_argument("--size", type=int, choices=(64, 128), default=128)
    draw.add_argument("--seed", type=int, default=0, help="decides what no tag names (default 0)")
    draw.add_argument("--out", type=Path, default=Path("drawing.png"))
    add_json(draw)
    draw.set_defaults(action=_draw)
    sheet = actions.add_parser("sheet", help="a sheet of random drawings")
    sheet.add_argument("--count", type=int, default=100)
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--out", type=Path, default=Path("sheet.png"))
    sheet.set_defaults(action=_sheet)
    tags = actions.add_parser("tags", help="every tag the model knows, by axis")
    add_json(tags)
    tags.set_defaults(action=_tags)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    return arguments.action(arguments)


def _draw(arguments: argparse.Namespace) -> int:
    import random

    from lorabake.base.errors import UserError, nearest
    from lorabake.cli.terminal import show_json
    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.world import draw, parse, read_tags
    from lorabake.sampling.infotext import save_png

    if arguments.character:
        if arguments.character not in CHARACTERS:
            raise UserError(
                f"'{arguments.character}' is not one of the invented characters. {nearest(arguments.character, CHARACTERS)}"
            )
        said: dict[str, Any] = dict(read_tags(arguments.prompt))
        spec = CHARACTERS[arguments.character].spec(random.Random(arguments.seed), **said)
    else:
        spec = parse(arguments.prompt, arguments.seed)
    drawing = draw(spec, arguments.seed, arguments.size)
    save_png(drawing.image, arguments.out)
    caption = ", ".join(drawing.tags)
    show_json({"file": str(arguments.out), "caption": caption}) if arguments.json else print(
        f"{arguments.out}: {caption}"
    )
    return 0


def _sheet(arguments: argparse.Namespace) -> int:
    import random

    from lorabake.pocket.world import draw, sample, sheet
    from lorabake.sampling.grid import save_grid

    rng = random.Random(arguments.seed)
    pictures = [draw(sample(rng), arguments.seed * 10_000 + index) for index in range(max(1, arguments.count))]
    save_grid(sheet(pictures, 10, 2), arguments.out)
    print(arguments.out)
    return 0


def _tags(arguments: argparse.Namespace) -> int:
    from lorabake.cli.terminal import show_json
    from lorabake.pocket.world import axes

    if arguments.json:
        show_json({axis: list(values) for axis, values in axes.items()})
        return 0
    for axis, values in axes.items():
        print(f"{axis:<16} {', '.join(values)}")
    return 0
