"""Make a recipe of another trainer's config: kohya's sd-scripts (training or dataset), the kohya_ss GUI, LoRA_Easy_Training_Scripts, ai-toolkit or OneTrainer.

  lorabake import lora.toml --dataset dataset.toml --into mira.toml
  lorabake import job.yaml --into mira.toml
  lorabake import preset.json                    writes recipe.toml

Which trainer wrote the file is told by its content. The report has every key: taken over as it is or in other units, stated because
it was a default there, or not taken over, with what to do instead. Relative paths in the config count from the current folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "make a recipe of another trainer's config"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``import``."""
    from lorabake.cli.arguments import add_json

    parser.add_argument("config", type=Path, metavar="CONFIG", help="a config of another trainer: TOML, JSON or YAML")
    parser.add_argument(
        "--dataset", type=Path, metavar="FILE", help="the dataset config of sd-scripts that goes with it"
    )
    parser.add_argument(
        "--into",
        type=Path,
        default=Path("recipe.toml"),
        metavar="RECIPE",
        help="file for the recipe (default: recipe.toml)",
    )
    add_json(parser, "print the report and the recipe as JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 when the config was understood, whatever of it could be taken over."""
    from lorabake.base.files import write_new
    from lorabake.cli.terminal import show_json
    from lorabake.recipe.imports import import_config

    found = import_config(arguments.config, arguments.dataset)
    write_new({arguments.into: found.toml()})
    if arguments.json:
        show_json({**found.to_dict(), "written": str(arguments.into)})
        return 0
    print(found.report())
    print(f"\nWritten: {arguments.into}. Look at it, then: lorabake validate {arguments.into}")
    return 0
