"""Look at the world: `python -m lorabake.pocket.world sheet.png --count 40 --fix style=outline`."""

from __future__ import annotations

import argparse
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lorabake.base.errors import UserError
from lorabake.pocket.world.picture import Drawing, draw
from lorabake.pocket.world.spec import sample

_COLUMNS, _SCALE, _TEXT_HEIGHT = 8, 3, 84


def labelled_sheet(drawings: Sequence[Drawing]) -> Image.Image:
    """Pictures three times as large, with their tags below."""
    cell = drawings[0].image.width * _SCALE
    rows = -(-len(drawings) // _COLUMNS)
    page = Image.new("RGB", (_COLUMNS * (cell + 4), rows * (cell + _TEXT_HEIGHT)), "white")
    pen = ImageDraw.Draw(page)
    for index, drawing in enumerate(drawings):
        left, top = (index % _COLUMNS) * (cell + 4), (index // _COLUMNS) * (cell + _TEXT_HEIGHT)
        page.paste(drawing.image.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
        pen.multiline_text(
            (left + 2, top + cell + 2), textwrap.fill(", ".join(drawing.tags), 34), fill="black", font_size=10
        )
    return page


def main() -> None:
    """Read the command line, draw, save."""
    parser = argparse.ArgumentParser(prog="python -m lorabake.pocket.world", description=__doc__)
    parser.add_argument("into", type=Path, help="where to save the sheet")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fix", action="append", default=[], metavar="AXIS=VALUE", help="hold an axis at a value")
    options = parser.parse_args()
    if options.count < 1:
        parser.error("--count must be at least 1")
    rng = random.Random(options.seed)
    try:
        fixed = dict(pair.split("=", 1) for pair in options.fix)
        drawings = [draw(sample(rng, **fixed), rng.getrandbits(32)) for _ in range(options.count)]
    except UserError as error:
        parser.error(str(error))
    except ValueError:
        parser.error("--fix takes AXIS=VALUE, such as --fix 'hair_color=red'")
    labelled_sheet(drawings).save(options.into)


if __name__ == "__main__":
    main()
