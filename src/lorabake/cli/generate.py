"""Draw pictures with a base model and LoRA files.

lorabake generate "1girl, red hair, beach" --count 4 --out beach.png
lorabake generate "zorbi, forest" --lora runs/zorbi/checkpoints/zorbi.safetensors:0.8
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

HELP = "draw pictures with a base model and LoRA files"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``generate``."""
    from lorabake.cli.arguments import add_base, add_json, add_machine, add_text_options

    parser.add_argument(
        "prompt",
        nargs="*",
        help="what to draw; options may follow in it: --n negative --d seed --s steps --w --h, "
        "--l cfg and --g guidance (default: what suits the base model; 5 for SD and SDXL, 1 with guidance 3.5 for Flux dev)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a file of prompts (.txt one a line, .toml, .json), or a picture to draw again (.png)",
    )
    add_base(parser, "pocket")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="LoRA file; may be repeated"
    )
    parser.add_argument(
        "--count", type=int, default=1, help="pictures of each prompt, with seeds counting up (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed for prompts without one (default 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pictures"),
        help="folder, in which numbers go on after those that are there, or a .png for a single picture (default pictures/)",
    )
    add_text_options(parser)
    add_machine(parser)
    add_json(parser, "print the files as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Draw and save; each PNG holds its own generation parameters."""
    import dataclasses

    from lorabake import api
    from lorabake.base.errors import UserError
    from lorabake.cli.arguments import drawing_options
    from lorabake.cli.terminal import bar, show_json
    from lorabake.recipe.prompts import line_to_prompt
    from lorabake.sampling.infotext import prompts_in, save_png

    prompts = [line_to_prompt(line, arguments.seed) for line in arguments.prompt]
    if arguments.prompts:
        prompts += prompts_in(arguments.prompts, arguments.seed)
    if not prompts or arguments.count < 1:
        raise UserError("Nothing to draw: give a prompt, or a file with --prompts, and a count of at least 1.")
    prompts = [
        dataclasses.replace(prompt, seed=prompt.seed + index) for prompt in prompts for index in range(arguments.count)
    ]
    if arguments.out.suffix and len(prompts) > 1:
        raise UserError(f"{len(prompts)} pictures do not fit into '{arguments.out}'. Give a folder with --out.")
    loras = [_lora(text) for text in arguments.lora]
    with bar("drawing") as progress:
        images = api.generate(prompts, loras=loras, progress=progress, **drawing_options(arguments))
    first = _next_number(arguments.out)
    files = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True), first):
        path = arguments.out if arguments.out.suffix else arguments.out / f"{index:04d}_{prompt.seed}.png"
        save_png(image, path, image.info["parameters"])
        files.append(str(path))
    show_json(files) if arguments.json else print("\n".join(files))
    return 0


def _next_number(folder: Path) -> int:
    """After the highest number that a picture there begins with, so that none is written over."""
    found = (re.match(r"[0-9]{4,}(?=_)", path.name) for path in folder.glob("*_*.png"))
    return max((int(number[0]) for number in found if number), default=-1) + 1


def _lora(text: str) -> tuple[Path, float]:
    from lorabake.base.errors import UserError

    name, colon, weight = text.rpartition(":")
    try:
        path, strength = (Path(name), float(weight)) if colon and not Path(text).is_file() else (Path(text), 1.0)
    except ValueError:
        path, strength = Path(text), 1.0
    if not path.is_file():
        raise UserError(
            f"'{path}' is not a file. Give a LoRA file, with a weight after a colon if it is not 1: mira.safetensors:0.8"
        )
    return path, strength
