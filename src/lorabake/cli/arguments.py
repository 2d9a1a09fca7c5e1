"""Arguments several verbs share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabake.recipe import Checked


BASES = "a .safetensors file, a diffusers folder, or 'pocket'"
"""What ``--base`` takes."""


def add_json(parser: argparse.ArgumentParser, help: str = "print JSON for programs") -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help=help)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe or folder, and what may be set beside it."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE|FOLDER", help="a recipe (.toml), or a folder of pictures")
    parser.add_argument("--base", help=f"base model: {BASES} (same as --set model.base=…)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=VALUE", help="change one setting; may be repeated"
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run folder, and what is to happen with a run that is there."""
    parser.add_argument("--into", type=Path, help="run folder (default: runs/NAME here)")
    parser.add_argument(
        "--continue-changed",
        action="store_true",
        help="go on with a run that is there though settings were changed since, a longer train.length say; without it "
        "`train` asks, where there is somebody to ask, and a job of the queue fails",
    )


def add_base(parser: argparse.ArgumentParser, default: str) -> None:
    """The base model to draw with, and parts of it that lie elsewhere."""
    parser.add_argument("--base", help=f"base model: {BASES} (default: {default})")
    parser.add_argument("--vae", metavar="FILE", help="VAE to use in place of the base model's own")
    parser.add_argument(
        "--text-encoder",
        action="append",
        default=[],
        metavar="FILE",
        help="text encoder to use in place of the base model's own; may be repeated",
    )
    parser.add_argument(
        "--prediction", choices=("epsilon", "v"), help="what the base model predicts, where its files do not say it"
    )


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """How prompts are read."""
    usual = "default: as the LoRA files were trained"
    parser.add_argument(
        "--clip-skip", type=int, metavar="N", help=f"use the text encoder's N-th last layer, 1 is the last ({usual})"
    )
    parser.add_argument(
        "--max-tokens", type=int, choices=(75, 150, 225), help=f"tokens of a prompt that are read ({usual}, else 75)"
    )
    parser.add_argument(
        "--t5-tokens",
        type=int,
        metavar="N",
        help=f"tokens of a prompt that T5 reads, 1 to 512, for models that have it ({usual}, else as the model was)",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """What to draw on."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to draw (default: the GPU if there is one)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="type of the model's weights (default: bf16 on a GPU that has it, fp32 on a CPU)",
    )
    parser.add_argument(
        "--blocks-to-swap",
        type=int,
        metavar="N",
        help="for models larger than the GPU's memory: N of the denoiser's blocks wait in main memory and come one ahead of their "
        "turn, so that the GPU holds so much less, but for twice the largest block; 3 or more, all of them if there are fewer. "
        "The pictures are the same, and slower (default: none)",
    )


def drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of :func:`add_base`, :func:`add_text_options` and :func:`add_machine` say to ``api.generate`` and ``api.grid``."""
    names = (
        "base",
        "vae",
        "prediction",
        "clip_skip",
        "max_tokens",
        "t5_tokens",
        "device",
        "precision",
        "blocks_to_swap",
    )
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return {**given, "text_encoders": arguments.text_encoder, "on_note": _note}


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def checked_recipe(arguments: argparse.Namespace) -> Checked:
    """The recipe that :func:`add_recipe`'s arguments ask for."""
    from lorabake.recipe import check_values

    return check_values(raw_recipe(arguments), subject=str(arguments.recipe))


def raw_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Its plain values by section, not checked yet; paths are absolute."""
    import json

    from lorabake.recipe.load import anchored, read_raw

    overrides = list(arguments.set)
    if arguments.base:
        overrides.append(f"model.base={json.dumps(arguments.base)}")
    return anchored(read_raw(arguments.recipe, overrides), Path())
