"""Train a LoRA from a recipe or straight from a folder of pictures.

  lorabake train mira/recipe.toml --set adapter.rank=32
  lorabake train mira --base ~/models/sd15

  lorabake train mira/recipe.toml --set 'train.length=20 epochs' --continue-changed
  lorabake train mira/recipe.toml --from-state runs/mira/checkpoints/mira-000004.safetensors --into runs/mira-2

The same line continues a run that was stopped or killed, to the same bytes. The first Ctrl-C ends after the step with a
save, the second at once. A run whose settings were changed since says which, and goes on with them if you agree.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorabake.cli.terminal import TrainingProgress
    from lorabake.train.continuing import Agree, Change
    from lorabake.train.run import Outcome

HELP = "train a LoRA from a recipe or a folder"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``train``."""
    from lorabake.cli.arguments import add_json, add_recipe, add_run

    add_recipe(parser)
    add_run(parser)
    parser.add_argument(
        "--from-state",
        type=Path,
        metavar="CHECKPOINT",
        help="begin a new run from where another one was: a checkpoint of a run with save.keep_state, or a run folder for its newest state",
    )
    add_json(parser, "print every event as a line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when finished, 130 when stopped by Ctrl-C."""
    from lorabake.api import train
    from lorabake.cli.arguments import checked_recipe
    from lorabake.cli.terminal import TrainingProgress, interruptible, json_lines

    checked = checked_recipe(arguments)
    begin = functools.partial(
        train, checked, arguments.into, continue_changed=_agree(arguments), from_state=arguments.from_state
    )
    if arguments.json:
        with interruptible() as stop:
            outcome = begin(json_lines, stop=stop)
        return 0 if outcome.finished else 130

    with TrainingProgress() as progress:
        with interruptible(
            lambda: progress.say("Stopping after this step, with a save. Ctrl-C again stops at once.")
        ) as stop:
            outcome = begin(progress, stop=stop)
        _tell(outcome, progress)
    return 0 if outcome.finished else 130


def _agree(arguments: argparse.Namespace) -> Agree:
    """Yes if it was said before; else people are asked, and programs refused."""

    def ask(changes: Sequence[Change]) -> bool:
        if arguments.continue_changed:
            return True
        if arguments.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return False
        lines = "\n".join(f"  {change}" for change in changes)
        print(
            f"The run was started with other settings:\n{lines}\nGo on with the new ones? (y or n, and Enter)",
            file=sys.stderr,
        )
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return ask


def _tell(outcome: Outcome, progress: TrainingProgress) -> None:
    if not outcome.finished:
        progress.say(f"Stopped at step {outcome.steps} of {outcome.total_steps}. The same command continues.")
        return
    final = outcome.run.last_checkpoint()
    if final is None or not final.exists():
        progress.say(
            f"{final or 'The LoRA'} is not there any more: it was moved or deleted. Put it back, or make it again with the same line and "
            "--into another folder."
        )
        return
    progress.say(f"Done: {outcome.steps} steps in {outcome.seconds:.0f} s. The LoRA is {final}")
    progress.say(f'Look at it: lorabake grid {outcome.run.folder} --prompt "..."')
