"""The embedded base model and its picture world.

lorabake pocket draw "1girl, red hair, long hair, beach"     the world's own drawing of a prompt
lorabake pocket sheet --count 100                            a sheet of random drawings
lorabake pocket tags                                         every tag the model knows
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "the embedded base model and its picture world"


def configure(parser: argparse.ArgumentParser) -> None:
    """Sub-commands of ``pocket``."""
    from lorabake.cli.arguments import add_json

    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    draw = actions.add_parser("draw", help="draw what a prompt says, by the world's own rules")
    draw.add_argument("prompt", help='tags, such as "1girl, red hair, beach"')
    draw.add_argument("--character", help="one of the invented characters")
    draw.add_argument("--size", type=int, choices=(64, 128), default=128)
    draw.add_argument("--seed", type=int, default=0, help="decides what no tag names (default 0)")
    draw.add_argument("--out", type=Path, default=Path("drawing.png"))
    add_json(draw)
    draw.set_defaults(action=_draw)
    sheet = actions.add_parser("sheet", help="a sheet of random drawings")
    sheet.add_argument("--count", type=int, default=100)
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--out", type=Path, default=Path("sheet.png"))
    sheet.set_defaults(action=_sheet)
    tags = actions.add_parser("tags", help="every tag the model knows, by axis")
    add_json(tags)
    tags.set_defaults(action=_tags)
    score = actions.add_parser("score", help="how well a model obeys prompts, beside the judge's own ceiling")
    score.add_argument("--base", default="pocket", help="a model folder (default: the embedded one)")
    score.add_argument("--count", type=int, default=256, help="pictures (default 256)")
    score.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    score.add_argument("--cfg", type=float, default=4.0, help="guidance (default 4)")
    score.add_argument("--seed", type=int, default=0)
    score.add_argument("--out", type=Path, help="also write a picture: drawn by the model above, by the world below")
    add_json(score)
    score.set_defaults(action=_score)
    pretrain = actions.add_parser(
        "pretrain", help="make the embedded model again, from nothing; continues where it was stopped"
    )
    pretrain.add_argument("--into", type=Path, required=True, help="folder for everything")
    pretrain.add_argument("--pictures", type=int, default=40_000, help="pictures drawn to train on (default 40000)")
    pretrain.add_argument("--steps", type=int, default=20_000, help="optimizer steps of 24 pictures (default 20000)")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.set_defaults(action=_pretrain)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    return arguments.action(arguments)


def _draw(arguments: argparse.Namespace) -> int:
    import random

    from lorabake.base.errors import UserError, nearest
    from lorabake.cli.terminal import show_json
    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.world import draw, parse, read_tags
    from lorabake.sampling.infotext import save_png

    if arguments.character:
        if arguments.character not in CHARACTERS:
            raise UserError(
                f"'{arguments.character}' is not one of the invented characters. {nearest(arguments.character, CHARACTERS)}"
            )
        said: dict[str, Any] = dict(read_tags(arguments.prompt))
        spec = CHARACTERS[arguments.character].spec(random.Random(arguments.seed), **said)
    else:
        spec = parse(arguments.prompt, arguments.seed)
    drawing = draw(spec, arguments.seed, arguments.size)
    save_png(drawing.image, arguments.out)
    caption = ", ".join(drawing.tags)
    show_json({"file": str(arguments.out), "caption": caption}) if arguments.json else print(
        f"{arguments.out}: {caption}"
    )
    return 0


def _sheet(arguments: argparse.Namespace) -> int:
    import random

    from lorabake.pocket.world import draw, sample, sheet
    from lorabake.sampling.grid import save_grid

    rng = random.Random(arguments.seed)
    pictures = [draw(sample(rng), arguments.seed * 10_000 + index) for index in range(max(1, arguments.count))]
    save_grid(sheet(pictures, 10, 2), arguments.out)
    print(arguments.out)
    return 0


def _tags(arguments: argparse.Namespace) -> int:
    from lorabake.cli.terminal import show_json
    from lorabake.pocket.world import axes

    if arguments.json:
        show_json({axis: list(values) for axis, values in axes.items()})
        return 0
    for axis, values in axes.items():
        print(f"{axis:<16} {', '.join(values)}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from lorabake.cli.terminal import bar, show_json
    from lorabake.families import load_model
    from lorabake.pocket.fidelity import score, sheet
    from lorabake.pocket.judge import Judge
    from lorabake.sampling.grid import save_grid

    with bar("drawing") as progress:
        found = score(
            load_model(arguments.base),
            Judge.load(),
            arguments.count,
            arguments.seed,
            steps=arguments.steps,
            cfg=arguments.cfg,
            progress=progress,
        )
    if arguments.out:
        save_grid(sheet(found.pairs[:40]), arguments.out)
    if arguments.json:
        show_json(found.to_dict())
        return 0
    print(f"{'axis':<16}{'model':>8}{'judge':>8}{'share':>8}{'pictures':>10}")
    for axis, accuracy in sorted(found.per_axis.items(), key=lambda row: row[1] / found.ceiling[row[0]]):
        ceiling = found.ceiling[axis]
        print(f"{axis:<16}{accuracy:>8.3f}{ceiling:>8.3f}{accuracy / ceiling:>8.3f}{found.counts[axis]:>10}")
    print(f"{'mean':<16}{found.mean:>8.3f}{found.ceiling_mean:>8.3f}{found.ratio:>8.3f}")
    return 0


_PRETRAIN_RECIPE = """\
[model]
base = "blank"

[data]
folder = "world"

[data.captions]
caption_dropout = 0.1      # for classifier-free guidance
tag_dropout = 0.07

[adapter]
name = "full"

[optimizer]
lr = 1.2e-3
text_encoder_lr = 3e-4
betas = [0.9, 0.99]

[schedule]
name = "cosine"
warmup = 0.01

[train]
length = "{steps} steps"
batch_size = 24
seed = {seed}

[save]
every = "1000 steps"

[output]
name = "pocket"
"""


def _tell_preparation(part: str, step: int, loss: float) -> None:
    print(f"  {part.replace('_', ' ')}, step {step}: loss {loss:.3f}", flush=True)


def _pretrain(arguments: argparse.Namespace) -> int:
    import shutil

    from lorabake.base.events import Events
    from lorabake.base.files import write_atomic
    from lorabake.cli.terminal import TrainingProgress, bar, interruptible
    from lorabake.pocket.blank import blank_model
    from lorabake.pocket.dataset import render_dataset
    from lorabake.pocket.export import export_half
    from lorabake.recipe import check
    from lorabake.train.run import train

    folder: Path = arguments.into
    with bar("drawing the world") as progress:
        render_dataset(folder / "world", arguments.pictures, arguments.seed, progress=progress)
    if not (folder / "blank").exists():
        print("preparing tokenizer, text encoder and autoencoder (some ten minutes)", flush=True)
        unfinished = folder / "blank.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        blank_model(unfinished, arguments.seed, report=_tell_preparation)
        unfinished.rename(folder / "blank")
    write_atomic(folder / "recipe.toml", _PRETRAIN_RECIPE.format(steps=arguments.steps, seed=arguments.seed).encode())
    checked = check(folder / "recipe.toml")
    with TrainingProgress() as shown, interruptible() as stop:
        outcome = train(checked, folder / "run", Events(shown), stop)
    if not outcome.finished:
        print(f"Stopped at step {outcome.steps} of {outcome.total_steps}. The same command continues.")
        return 130
    size = export_half(outcome.run.checkpoints / "pocket", folder / "model")
    print(f"{folder / 'model'}: {size / 1e6:.1f} MB. Score it: lorabake pocket score --base {folder / 'model'}")
    return 0
