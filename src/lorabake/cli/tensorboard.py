"""Write what TensorBoard shows of finished or running trainings, from their logs: loss, rates, gradient norm, samples.

  lorabake tensorboard runs/mira && tensorboard --logdir runs

With save.tensorboard = true in its recipe a run writes the same while it trains, and pictures per second with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write a run's curves and samples for TensorBoard"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``tensorboard``."""
    from lorabake.cli.arguments import add_json

    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    add_json(parser, "print the folders as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Write ``tb/`` in each run folder, in place of what this command wrote there before."""
    from lorabake.base.runs import Run
    from lorabake.cli.terminal import show_json
    from lorabake.train.tensorboard import write_from_log

    def note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    folders = [str(write_from_log(Run(folder), note)) for folder in arguments.runs]
    show_json(folders) if arguments.json else print("\n".join(folders))
    return 0
