"""Check a recipe or folder without starting anything: every problem at once, and what would be trained."""

from __future__ import annotations

import argparse

HELP = "check a recipe without running it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``validate``."""
    from lorabake.cli.arguments import add_json, add_recipe

    add_recipe(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 when all is well; problems raise."""
    from lorabake.cli.arguments import checked_recipe
    from lorabake.cli.terminal import show_json
    from lorabake.dataset.order import batches_per_epoch

    checked = checked_recipe(arguments)
    recipe, dataset = checked.recipe, checked.dataset
    batches = batches_per_epoch(
        [place.bucket_wh for place in checked.placements], [s.repeats for s in dataset.samples], recipe.train.batch_size
    )
    per_epoch = -(-batches // recipe.train.gradient_accumulation)
    steps = recipe.train.length.steps(per_epoch)
    seen = round(dataset.entries * steps / per_epoch)
    if arguments.json:
        show_json({"recipe": recipe.to_dict(), "reasons": recipe.reasons, "dataset": dataset.summary(), "steps_per_epoch": per_epoch,
                   "steps": steps, "images_seen": seen, "warnings": list(checked.warnings)})  # fmt: skip
        return 0
    print(f"{arguments.recipe} is fine.")
    print(
        f"  base      {checked.facts.name} ({checked.facts.family}, {checked.facts.prediction}, {checked.facts.resolution} px)"
    )
    print(f"  pictures  {len(dataset.samples)}, {dataset.entries} per epoch with repeats")
    print(
        f"  run       {recipe.train.length} = {steps} optimizer steps of {recipe.train.batch_size} × {recipe.train.gradient_accumulation}, {seen} images seen"
    )
    for name, why in recipe.reasons.items():
        print(f"  {name} because {why}")
    for warning in checked.warnings:
        print(f"  note: {warning}")
    return 0
