"""Arguments several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from lorabake.protocols.family import ModelFacts, TextOption
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
        help="go on with a run that is there though settings were changed since, a longer train.length say; without it you are asked, "
        "where there is somebody to ask",
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


def base_facts(arguments: argparse.Namespace, own: Mapping[str, Any]) -> ModelFacts:
    """Facts of the model that :func:`add_base`'s arguments ask for, or else of a run's ``own``."""
    from lorabake.api import source_of
    from lorabake.families import inspect_model

    return inspect_model(**source_of(own, arguments.base, arguments.vae, arguments.text_encoder, arguments.prediction))


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


def text_options(arguments: argparse.Namespace, facts: ModelFacts, files: Sequence[Path]) -> dict[TextOption, int]:
    """Options to load the model with that :func:`add_text_options`'s arguments ask for, or else the LoRA files."""
    from lorabake.protocols.family import TextOption
    from lorabake.sampling.reading import text_options as options

    names: tuple[TextOption, ...] = get_args(TextOption)
    return options(facts, files, {name: getattr(arguments, name) for name in names})


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
