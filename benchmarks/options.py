"""What every training option really does: each is switched on by itself in one plain recipe, trained, drawn with and judged.

    python benchmarks/options.py

trains a character the base model never saw, once for every row of ``option_rows.py``, and writes ``docs/options.md``: how much of the
character is learned, how well prompts are still obeyed, how much leaks into pictures without its name, what a step costs beside one
without the option (both timed in turn, in one process), and a sheet with the same prompts drawn by all. What chance does is measured
too: the plain recipe with other seeds. Results are kept in ``options.json`` row by row: the same command goes on where it was stopped,
and measures anew only what has changed. About two minutes a row on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from option_rows import NOT_HERE, PLAIN, ROWS, SEEDS, Row

NAME = "zorbi"
PICTURES = 32
"""Drawn for each score, with the trigger and without."""
TIMED = 9
"""Steps each of the plain recipe and of the option, in turn, for the cost."""
PROMPTS = ("{name}, smile, sitting, full body, forest --d 11", "{name}, open mouth, upper body, night, outline --d 13")
_HERE = Path(__file__).parent
RESULTS, PAGE = _HERE / "options.json", _HERE.parent / "docs" / "options.md"
SHEET = PAGE.parent / "pictures" / "options.webp"

Results = dict[str, dict[str, Any]]


def main() -> None:
    """Measure the rows that are not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PIECE", help="only rows whose name has this in it")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lorabake-options", metavar="FOLDER")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = [*SEEDS, *(row for group in ROWS.values() for row in group)]
    missing = [row for row in rows if not _is_measured(row, results, arguments.work)]
    asked = [row for row in missing if not arguments.only or arguments.only in row.name]
    for number, row in enumerate(asked, 1):
        started = time.monotonic()
        results[row.name] = {"of": fingerprint(row), **measured(row, arguments.work)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{number} of {len(asked)}  {row.name}: {told(results[row.name])} ({time.monotonic() - started:.0f} s)")
    left = len(missing) - len(asked)
    if left:
        sys.exit(f"{left} rows are not measured yet; {PAGE.name} is written when all are.")
    PAGE.write_text(page(results))
    sheet(arguments.work)
    print(f"wrote {PAGE.name} and {SHEET.name}")


def _is_measured(row: Row, results: Results, work: Path) -> bool:
    """Whether its figures are there, and its pictures for the sheet."""
    drawn = all((_folder(row, work) / f"{number}.png").exists() for number in range(len(PROMPTS)))
    return drawn and results.get(row.name, {}).get("of") == fingerprint(row)


def fingerprint(row: Row) -> str:
    """Changes with whatever a row's figures depend on, the code apart."""
    return hashlib.sha256(repr((PLAIN, row, PICTURES)).encode()).hexdigest()[:12]


def told(result: Mapping[str, Any]) -> str:
    """A row's figures in short."""
    return ", ".join(f"{name} {result[name]:.2f}" for name in ("identity", "obeys", "leaks", "step"))


def recipe_of(row: Row, work: Path) -> tuple[Path, list[str]]:
    """The row's recipe file, beside the dataset it is for, and its settings."""
    folder = _folder(row, work)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    _write_dataset(folder, row)
    (folder / "recipe.toml").write_text(row.recipe.format(name=NAME))
    return folder / "recipe.toml", [setting.replace("FOLDER", folder.as_posix()) for setting in row.settings]


def _folder(row: Row, work: Path) -> Path:
    """Another one when the row changes: a training of what it was before must not be continued."""
    return work / ("".join(letter if letter.isalnum() else "-" for letter in row.name) + f"-{fingerprint(row)}")


def _write_dataset(folder: Path, row: Row) -> None:
    from PIL import Image, ImageDraw, ImageFilter

    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.trial import write_training_set

    write_training_set(folder / "dataset", CHARACTERS[NAME], NAME)
    if row.others == "apart":
        shutil.rmtree(folder / "regularisation", ignore_errors=True)
        (folder / "regularisation").mkdir()
        shutil.move(folder / "dataset" / "1_others", folder / "regularisation" / "1_1girl")
    elif row.others == "none":
        shutil.rmtree(folder / "dataset" / "1_others")
    if row.masks:
        for path in sorted((folder / "dataset" / f"2_{NAME}").glob("*.png")):
            width, height = Image.open(path).size
            mask = Image.new("L", (width, height))
            ImageDraw.Draw(mask).ellipse((width * 0.15, -height * 0.1, width * 0.85, height * 1.1), fill=255)
            mask.filter(ImageFilter.GaussianBlur(2)).save(path.with_name(f"{path.stem}-masklabel.png"))


def measured(row: Row, work: Path) -> dict[str, Any]:
    """Train, draw and judge one row."""
    import torch

    from lorabake.base.events import Events
    from lorabake.recipe import check
    from lorabake.train.run import train

    torch.set_num_threads(1)
    path, settings = recipe_of(row, work)
    checked = check(path, settings)
    events: list[Mapping[str, Any]] = []
    outcome = train(checked, path.parent / "run", Events(events.append))
    if not outcome.finished:
        sys.exit(f"{row.name}: stopped at step {outcome.steps} of {outcome.total_steps}.")
    file = path.parent / "run" / "checkpoints" / f"{NAME}{row.file}.safetensors"
    score = _score(file)
    _draw(file, path.parent)
    result = {
        "identity": score["identity"],
        "obeys": statistics.mean(score["control"].values()),
        "leaks": statistics.mean(score["leak"].values()),
        "pose": score["control"]["pose"],
        "step": cost(path, settings, work),
        "notes": list(checked.warnings),
    }
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}


def _score(file: Path) -> dict[str, Any]:
    from lorabake.families import load_model
    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.judge import Detectors, Judge
    from lorabake.pocket.trial import try_out
    from lorabake.sampling.apply import apply_lora

    model = load_model("pocket")
    apply_lora(model, file, 1.0)
    return try_out(model, CHARACTERS[NAME], NAME, Judge.load(), Detectors.load(), count=PICTURES).to_dict()


def _draw(file: Path, folder: Path) -> None:
    from lorabake.families import load_model
    from lorabake.recipe.prompts import line_to_prompt
    from lorabake.sampling.apply import apply_lora
    from lorabake.sampling.draw import draw
    from lorabake.sampling.infotext import save_png

    model = load_model("pocket")
    apply_lora(model, file, 1.0)
    for index, image in enumerate(draw(model, [line_to_prompt(text.format(name=NAME)) for text in PROMPTS])):
        save_png(image, folder / f"{index}.png")


def cost(path: Path, settings: Sequence[str], work: Path) -> float:
    """Seconds a picture with the settings over those of the plain recipe, both timed in turn: the median of the pairs' ratios."""
    plain, changed = _stepper(*recipe_of(Row("plain"), work)), _stepper(path, settings)
    ratios = [_seconds(changed) / _seconds(plain) for _ in range(TIMED)]
    return statistics.median(ratios[1:])


def _seconds(step: Callable[[], int]) -> float:
    started = time.perf_counter()
    pictures = step()
    return (time.perf_counter() - started) / pictures


def _stepper(path: Path, settings: Sequence[str]) -> Callable[[], int]:
    """Takes one optimizer step of a recipe at each call; returns how many pictures it was on."""
    from lorabake.base.events import Events
    from lorabake.dataset.order import epoch_batches
    from lorabake.recipe import check
    from lorabake.train.loop import optimizer_step
    from lorabake.train.prepare import prepare

    bake = prepare(check(path, settings), Events())
    train = bake.recipe.train

    def steps() -> Iterator[int]:
        step = 0
        while True:
            batches = epoch_batches(bake.buckets, [1] * len(bake.samples), train.batch_size, train.seed, step)
            full = [batch for batch in batches if len(batch) == train.batch_size][: train.gradient_accumulation]
            optimizer_step(bake, step, full)
            step += 1
            yield sum(map(len, full))

    return steps().__next__


def page(results: Results) -> str:
    """The table as Markdown."""
    plain = {name: [results[row.name][name] for row in SEEDS] for name in ("identity", "obeys", "leaks")}
    mean = {name: statistics.mean(values) for name, values in plain.items()}
    chance = {name: max(2 * statistics.stdev(values), 0.02) for name, values in plain.items()}
    lines = [
        "# What every option does",
        "",
        "Made by `python benchmarks/options.py`: the demo's character trained on the pocket model, plainly, with one option changed at a time,",
        f"{PICTURES} pictures drawn with its name and {PICTURES} without. *Identity*: how often the character's own features are there.",
        "*Obeys*: how often the prompted background, framing and pose are. *Leaks*: how often the features are there without the name.",
        "*Step*: seconds for each picture trained, over those of the plain recipe. `lorabake explain` says what each option is for; this",
        "page says what it did here, on a tiny model, twenty pictures and a short training: directions to expect, not sizes.",
        "",
        f"The plain recipe with {len(SEEDS)} different seeds: {_shares(mean)}. What differs from that by less than twice what the seeds",
        f"differ by ({_shares(chance)}) is chance, and not told as an effect.",
        "",
        "![the same two prompts drawn after every training](pictures/options.webp)",
    ]
    for group, rows in ROWS.items():
        lines += [
            "",
            f"## {group}",
            "",
            "| | what it did | identity | obeys | leaks | step |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for row in rows:
            result = results[row.name]
            shares = " | ".join(f"{result[name]:.0%}" for name in ("identity", "obeys", "leaks"))
            lines.append(f"| {row.title} | {effect(result, mean, chance)} | {shares} | {result['step']:.2f} × |")
    return "\n".join([*lines, "", NOT_HERE]) + "\n"


def _shares(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0%}" for name, value in values.items())


_WORDS = {
    "identity": ("learns more of the character", "learns less of the character"),
    "obeys": ("prompts are obeyed better", "prompts are obeyed less"),
    "leaks": ("leaks more", "leaks less"),
}


def effect(result: Mapping[str, Any], mean: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """A sentence: what is beyond chance."""
    found = []
    for name, (more, less) in _WORDS.items():
        by = result[name] - mean[name]
        if abs(by) > chance[name]:
            found.append(f"{more if by > 0 else less} ({100 * by:+.0f})")
    if not found:
        return "Nothing beyond chance here."
    sentence = ", ".join(found)
    return f"{sentence[0].upper()}{sentence[1:]}."


def sheet(work: Path) -> None:
    """The same prompts as every training draws them."""
    from PIL import Image

    from lorabake.sampling.axes import Axis
    from lorabake.sampling.grid import compose

    rows = [SEEDS[0], *(row for group in ROWS.values() for row in group)]
    across = 8
    cells: dict[tuple[int, int], Image.Image] = {}
    for index, row in enumerate(rows):
        pictures = [Image.open(_folder(row, work) / f"{number}.png") for number in range(len(PROMPTS))]
        pair = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height + 12), "white")
        for number, picture in enumerate(pictures):
            pair.paste(picture, (number * picture.width, 12))
        _label(pair, row.name)
        cells[divmod(index, across)] = pair
    down = -(-len(rows) // across)
    image = compose(cells, Axis("", ("",) * down), Axis("", ("",) * across), scale=1)
    image.save(SHEET, quality=85, method=6)


def _label(picture: Any, text: str) -> None:
    from PIL import ImageDraw, ImageFont

    ImageDraw.Draw(picture).text((2, 0), text, fill="black", font=ImageFont.load_default(9))


if __name__ == "__main__":
    main()
