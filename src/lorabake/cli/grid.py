"""Compare checkpoints, weights, prompts and seeds in one labelled picture, with the base model's row on top.

lorabake grid runs/mira --prompt "mira, forest" --prompt "mira, beach" --weights 0.5,0.8,1 --seeds 1,2
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare checkpoints × weights × prompts × seeds in one picture"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``grid``."""
    from lorabake.cli.arguments import add_base, add_json, add_machine, add_text_options

    parser.add_argument("run", nargs="+", type=Path, metavar="RUN|LORA", help="a run folder, or LoRA files")
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt, with options as for `generate`; may be repeated"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a file of prompts, or a picture to draw again (.png)"
    )
    parser.add_argument("--weights", default="1", help="LoRA weights, such as 0.4,0.7,1 (default 1)")
    parser.add_argument("--seeds", default="", help="seeds, such as 1,2,3 or 1-4 (default: the prompts' own)")
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="only the checkpoints of the run's last N steps that have any, running averages (train.ema) beside each",
    )
    add_base(parser, "the run's own")
    parser.add_argument("--out", type=Path, help=".png or .webp (default: grid.png in the run folder)")
    add_text_options(parser)
    add_machine(parser)
    add_json(parser, "print the file as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Draw the grid and say where it is."""
    from lorabake import api
    from lorabake.base.errors import UserError
    from lorabake.cli.arguments import drawing_options
    from lorabake.cli.terminal import bar, show_json
    from lorabake.recipe.prompts import line_to_prompt
    from lorabake.sampling.axes import seeds, weights
    from lorabake.sampling.grid import save_grid
    from lorabake.sampling.infotext import prompts_in

    prompts = [line_to_prompt(line) for line in arguments.prompt]
    if arguments.prompts:
        prompts += prompts_in(arguments.prompts)
    if not prompts:
        raise UserError('No prompts: give some with --prompt "…", or a file with --prompts.')
    rows = weights(arguments.weights)
    columns = seeds(arguments.seeds) if arguments.seeds else ()
    with bar("drawing") as progress:
        picture = api.grid(
            arguments.run,
            prompts,
            weights=rows,
            seeds=columns,
            last=arguments.last,
            progress=progress,
            **drawing_options(arguments),
        )
    folder = arguments.run[0] if arguments.run[0].is_dir() else Path()
    out = arguments.out or folder / "grid.png"
    save_grid(picture, out)
    show_json({"file": str(out)}) if arguments.json else print(out)
    return 0
