"""Bake a first LoRA: draws 20 pictures of a character the base model never saw, trains on them, and shows what was learned.

Everything stays in one folder: the dataset, the recipe, the run and the grid. Needs no download and no GPU. Stopped half-way, the
same command goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from lorabake.pocket.trial import Trial
    from lorabake.sampling.tasting import Tasting

HELP = "train a small LoRA on the embedded model and look at it (two to three minutes)"

_RECIPE = """\
# The demo's recipe. Change something and run: lorabake train recipe.toml --into another-run
[model]
base = "pocket"

[data]
folder = "dataset"

[data.captions]
shuffle = true
keep_tokens = 1        # the trigger stays in front; what a caption says besides is not learned as part of the character

[adapter]
name = "lora"
rank = 32
conv_rank = 32         # convolutions too: shapes and patterns live there

[objective]
min_timestep = 250     # where colours and shapes are decided; finer detail is left to the base
max_timestep = 960
timesteps = "stratified"    # spread evenly over each batch: steadier steps, so that fewer are needed

[optimizer]
lr = 2.5e-3            # the pocket model is narrow; full-size models want about 1e-4
text_encoder_lr = 1e-3
betas = [0.9, 0.99]

[schedule]
name = "rex"            # stays high for long, then falls quickly
warmup = 0.05

[train]
length = "44 epochs"
batch_size = 6         # a step on six small pictures takes hardly longer than one on three

[save]
every = "22 epochs"

[output]
name = "{name}"
trigger = "{name}"
"""
_PROMPTS = (
    "{name}, smile, sitting, full body, forest, flat color --d 11",
    "{name}, smile, arms up, full body, night, outline --d 12",
    "{name}, open mouth, holding ball, upper body, beach, outline --d 13",
    "{name}, smile, portrait, sky, flat color --d 14",
    "1girl, red hair, short hair, blue eyes, smile, green shirt, blue skirt, standing, full body, beach, outline --d 15",
)
_WEIGHTS = (0.6, 1.0)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``demo``."""
    from lorabake.cli.arguments import add_json

    parser.add_argument(
        "--into", type=Path, default=Path("lorabake-demo"), help="folder for everything (default lorabake-demo)"
    )
    parser.add_argument("--character", default="zorbi", help="which of the invented characters (default zorbi)")
    parser.add_argument("--pictures", type=int, default=24, help="pictures drawn for each score (default 24)")
    add_json(parser, "print the scores as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Dataset, training, scores, grid; 130 when stopped by Ctrl-C."""
    from rich.console import Console

    from lorabake.base.errors import UserError, nearest
    from lorabake.cli.terminal import show_json
    from lorabake.pocket.characters import CHARACTERS

    if arguments.character not in CHARACTERS:
        raise UserError(
            f"'{arguments.character}' is not one of the invented characters. {nearest(arguments.character, CHARACTERS)}"
        )
    if arguments.pictures < 1:
        raise UserError(f"--pictures {arguments.pictures} is too few. Give at least 1.")
    started, folder, name = time.monotonic(), arguments.into, arguments.character
    console = Console(quiet=arguments.json, highlight=False, soft_wrap=True)
    _write_dataset(folder, name, console)
    # The pocket model keeps one core busy. What does not need the LoRA, or not the scores, is drawn on another one meanwhile.
    with multiprocessing.get_context("spawn").Pool(1, initializer=_leave_ctrl_c_to_the_parent) as meanwhile:
        of_base = meanwhile.apply_async(_score, (name, arguments.pictures))
        if not _train(folder, name, console):
            return 130
        tasted = meanwhile.apply_async(_tasting, (folder, name))
        after = _scored_with_lora(folder, name, arguments.pictures, console)
        before, tasting = of_base.get(), tasted.get()
    picture = _grid(folder, name, tasting, before, after)
    seconds = time.monotonic() - started
    if arguments.json:
        show_json(
            {"before": before.to_dict(), "after": after.to_dict(), "grid": str(picture), "seconds": round(seconds, 1)}
        )
    else:
        _tell(console, folder, name, before, after, seconds)
    return 0


def _write_dataset(folder: Path, name: str, console: Console) -> None:
    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.trial import write_training_set
    from lorabake.pocket.world import sheet
    from lorabake.sampling.grid import save_grid

    pictures = write_training_set(folder / "dataset", CHARACTERS[name], name)
    save_grid(sheet(pictures, 10, 2), folder / "dataset.png")
    written = _write_recipe(folder, name)
    console.print(
        f"1 of 3  drew {len(pictures)} pictures of '{name}', whom the base model never saw: {folder / 'dataset.png'}"
    )
    if not written:
        console.print(
            f"note: {folder / 'recipe.toml'} is not as the demo wrote it, and is left so; the demo trains with its own. "
            f"Train with yours: lorabake train {folder / 'recipe.toml'} --into {folder / 'another-run'}"
        )


def _write_recipe(folder: Path, name: str) -> bool:
    """Write the demo's recipe where there is none, or only what the demo itself wrote; False where somebody changed it."""
    from lorabake.base.files import write_atomic

    path, kept = folder / "recipe.toml", folder / ".lorabake" / "recipe.toml"
    recipe = _RECIPE.format(name=name).encode()
    there, known = (file.read_bytes() if file.is_file() else None for file in (path, kept))
    if there not in (None, known, recipe):
        return False
    write_atomic(kept, recipe)
    write_atomic(path, recipe)
    return True


def _train(folder: Path, name: str, console: Console) -> bool:
    from lorabake.base.events import Events
    from lorabake.cli.terminal import TrainingProgress, interruptible
    from lorabake.recipe import check_values
    from lorabake.recipe.load import anchored, parse_toml
    from lorabake.train.run import train

    told = "The demo's recipe"
    checked = check_values(anchored(parse_toml(_RECIPE.format(name=name), told), folder), told)
    with TrainingProgress() as progress, interruptible() as stop:
        outcome = train(checked, folder / "run", Events() if console.quiet else Events(progress), stop)
    if not outcome.finished:
        console.print(f"Stopped at step {outcome.steps} of {outcome.total_steps}. The same command continues.")
        return False
    console.print(
        f"2 of 3  trained {outcome.total_steps} steps in {outcome.seconds:.0f} s: {folder / 'run' / 'checkpoints' / name}.safetensors"
    )
    return True


def _scored_with_lora(folder: Path, name: str, count: int, console: Console) -> Trial:
    """The prompts the base is scored with, with the LoRA at weight 1."""
    from lorabake.cli.terminal import bar

    with bar("scoring") as progress:
        after = _score(name, count, folder / "run" / "checkpoints" / f"{name}.safetensors", progress)
    console.print(f"3 of 3  scored {count} pictures with the trigger and {count} without, before and after")
    return after


def _score(
    name: str, count: int, lora: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Trial:
    from lorabake.families import load_model
    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.judge import Detectors, Judge
    from lorabake.pocket.trial import try_out
    from lorabake.sampling.apply import apply_lora

    model = load_model("pocket")
    if lora:
        apply_lora(model, lora)
    return try_out(model, CHARACTERS[name], name, Judge.load(), Detectors.load(), count=count, progress=progress)


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tasting(folder: Path, name: str) -> Tasting:
    from lorabake.base.runs import Run
    from lorabake.families import load_model
    from lorabake.recipe.prompts import line_to_prompt
    from lorabake.sampling.tasting import taste

    prompts = [line_to_prompt(line.format(name=name)) for line in _PROMPTS]
    return taste(load_model("pocket"), Run(folder / "run").checkpoint_paths(), _WEIGHTS, prompts)


def _grid(folder: Path, name: str, tasting: Tasting, before: Trial, after: Trial) -> Path:
    from lorabake.sampling.grid import save_grid

    footer = f"The character's own features, found by detectors: base {before.identity:.0%}, LoRA at weight 1 {after.identity:.0%}"
    path = folder / "grid.png"
    save_grid(tasting.picture(title=f"What the LoRA learned of '{name}'", footer=footer), path)
    return path


def _tell(console: Console, folder: Path, name: str, before: Trial, after: Trial, seconds: float) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "base", "LoRA"):
        table.add_column(heading, justify="left" if not heading else "right")
    for feature, share in after.features.items():
        table.add_row(feature, f"{before.features[feature]:.0%}", f"{share:.0%}")
    table.add_row(
        "[bold]the character's features[/]", f"[bold]{before.identity:.0%}[/]", f"[bold]{after.identity:.0%}[/]"
    )
    for axis, share in after.control.items():
        table.add_row(f"prompted {axis} obeyed", f"{before.control[axis]:.0%}", f"{share:.0%}")
    leak = sum(after.leak.values()) / len(after.leak), sum(before.leak.values()) / len(before.leak)
    table.add_row("features without the trigger", f"{leak[1]:.0%}", f"{leak[0]:.0%}")
    console.print(table)
    console.print(f"Done in {seconds:.0f} s. Look at {folder / 'grid.png'}")
    console.print(
        f'Next: lorabake generate "{name}, smile, portrait, night, outline" --lora {folder / "run" / "checkpoints" / name}.safetensors'
    )
