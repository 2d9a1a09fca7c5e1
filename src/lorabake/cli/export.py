"""Write a recipe as configs of kohya's sd-scripts.

  lorabake export mira.toml --into kohya               kohya/config.toml, and kohya/dataset.toml where one is needed
  lorabake export mira.toml --into mira-kohya.toml     the same, beside each other

The config names the dataset config itself: sd-scripts takes it with --config_file. What sd-scripts cannot say is reported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a recipe as a config of kohya's sd-scripts"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``export``."""
    from lorabake.cli.arguments import add_json

    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe (.toml)")
    parser.add_argument(
        "--into", type=Path, required=True, metavar="FOLDER|FILE", help="a folder, or the config's own path (.toml)"
    )
    add_json(parser, "print the report and the configs as JSON")


def run(arguments: argparse.Namespace) -> int:
    """0 when the configs were written, whatever sd-scripts cannot say."""
    from lorabake.base.files import write_new
    from lorabake.cli.terminal import show_json
    from lorabake.recipe.exports import export_recipe

    found = export_recipe(arguments.recipe)
    texts = found.texts(arguments.into)
    write_new(texts, make=None if arguments.into.suffix.lower() == ".toml" else arguments.into)
    if arguments.json:
        show_json({**found.to_dict(), "written": [str(path) for path in texts]})
        return 0
    print(found.report())
    print(f"\nWritten: {', '.join(map(str, texts))}")
    return 0
