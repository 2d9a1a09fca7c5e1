"""Check a recipe or folder without starting anything: every problem at once, and what would be trained.

lorabake validate mira
lorabake validate mira/recipe.toml --captions 5      what the text encoder sees of the five longest captions, and what is cut off
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabake.families.networks.footprint import Footprint
    from lorabake.recipe import Checked, SeenCaption

HELP = "check a recipe without running it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``validate``."""
    from lorabake.cli.arguments import add_json, add_recipe

    add_recipe(parser)
    parser.add_argument(
        "--captions",
        nargs="?",
        type=_count,
        const=None,
        default=0,
        metavar="N",
        help="show what the text encoder sees of each caption, the longest first; only of N if given",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 when all is well; problems raise."""
    from lorabake.cli.arguments import checked_recipe
    from lorabake.cli.terminal import show_json

    checked = checked_recipe(arguments)
    recipe, dataset, length = checked.recipe, checked.dataset, checked.length
    captions = sorted(checked.captions, key=lambda caption: -caption.tokens)
    shown = captions[: arguments.captions]
    memory = _memory(checked)
    if arguments.json:
        told = {"recipe": recipe.to_dict(), "reasons": recipe.reasons, "dataset": dataset.summary(), "steps_per_epoch": length.steps_per_epoch,
                "steps": length.steps, "epochs": length.epochs, "images_seen": length.images, "base_memory": _memory_plain(checked, memory),
                "warnings": list(checked.warnings)}  # fmt: skip
        show_json(told if arguments.captions == 0 else told | {"captions": _plain(captions, shown)})
        return 0
    print(f"{arguments.recipe} is fine.")
    print(
        f"  base      {checked.facts.name} ({checked.facts.family}, {checked.facts.prediction}, {checked.facts.resolution} px)"
    )
    print(f"  memory    {_memory_text(checked, memory)}")
    print(f"  pictures  {dataset.account()}; {length.images_per_epoch} images per epoch with repeats")
    print(f"  run       {length.told(recipe.train.batch_size, recipe.train.gradient_accumulation)}")
    print(f"  captions  {_summary(captions)}")
    for name, why in recipe.reasons.items():
        print(f"  {name} because {why}")
    for warning in checked.warnings:
        print(f"  note: {warning}")
    for caption in shown:
        print(_text(caption))
    return 0


def _memory(checked: Checked) -> Footprint:
    """Bytes of the base's weights, from its files' headers."""
    from lorabake.families import family_card, footprint

    recipe = checked.recipe
    reading = recipe.model.reading(family_card(checked.facts).text_options)
    return footprint(checked.facts, recipe.train.precision or "fp32", **reading)


def _memory_text(checked: Checked, memory: Footprint) -> str:
    """What the base takes, and what it does with fewer bits: of the kind that is chosen, else of all."""
    from lorabake.base.units import size

    whole, chosen = sum(memory.networks.values()), checked.recipe.model.quantize
    named = ", ".join(f"{name} {size(count)}" for name, count in memory.networks.items())
    base = f"the base's weights take {size(whole)} in {checked.recipe.train.precision} ({named})"
    fewer = {kind: sum(sizes.values()) for kind, sizes in memory.quantised.items()}
    if chosen:
        return (
            f"{base}; {size(fewer[chosen])} with model.quantize = {chosen}, which saves {size(whole - fewer[chosen])}"
        )
    return f"{base}; with model.quantize " + ", ".join(f"{kind} {size(count)}" for kind, count in fewer.items())


def _memory_plain(checked: Checked, memory: Footprint) -> dict[str, Any]:
    """The same for programs, in bytes."""
    return {
        "precision": checked.recipe.train.precision,
        "quantize": checked.recipe.model.quantize,
        "bytes": sum(memory.networks.values()),
        "networks": dict(memory.networks),
        "quantized": {
            kind: {"bytes": sum(sizes.values()), "networks": dict(sizes)} for kind, sizes in memory.quantised.items()
        },
    }


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} captions cannot be shown; give 1 or more, or no number for all")
    return number


def _summary(captions: Sequence[SeenCaption]) -> str:
    """One line about all of them; ``captions`` from the longest to the shortest."""
    if not captions:
        return "not looked at: this family of models does not say how it reads them"
    room = min(reading.room for reading in captions[0].readings.values())
    cut = sum(caption.is_cut for caption in captions)
    told = f"{cut} are cut off at {room}" if cut else f"all fit into {room}"
    return f"{len(captions)}, of {captions[-1].tokens} to {captions[0].tokens} tokens; {told}"


def _text(caption: SeenCaption) -> str:
    """What is seen of one caption, for people."""
    longest = f" (the longest of {caption.variants} captions)" if caption.variants > 1 else ""
    lines = [f"\n{caption.picture}{longest}"]
    alike = len({(reading.tokens, reading.lost) for reading in caption.readings.values()}) == 1
    for part, reading in list(caption.readings.items())[: 1 if alike else None]:
        windows = f" in {reading.windows} windows" if reading.windows > 1 else ""
        read = f"{reading.room} of {reading.tokens}" if reading.lost else f"all {reading.tokens}"
        lines.append(f"  {'' if alike else part + ': '}{read} tokens read{windows}: {_printable(reading.kept)}")
        lines += [f"  cut off: {_printable(reading.lost)}"] if reading.lost else []
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Captions may hold anything, also what terminals obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _plain(captions: Sequence[SeenCaption], shown: Sequence[SeenCaption]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "count": len(captions),
        "cut": sum(caption.is_cut for caption in captions),
        "longest": max((caption.tokens for caption in captions), default=0),
        "shown": [
            {"picture": caption.picture, "text": caption.text, "cut": caption.is_cut, **({"variants": caption.variants} if caption.variants > 1 else {}),
             "text_encoders": {part: dataclasses.asdict(reading) for part, reading in caption.readings.items()}}
            for caption in shown
        ],
    }  # fmt: skip
