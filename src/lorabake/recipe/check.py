"""Everything that can be wrong before a run, found before the run, and told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.dataset.buckets import Placement, bucket_problems, place
from lorabake.dataset.caption import idle_settings
from lorabake.dataset.folder import Dataset, open_dataset
from lorabake.families import inspect_model
from lorabake.protocols.family import ModelFacts
from lorabake.recipe.load import parse_sections, read_raw
from lorabake.recipe.recipe import Recipe
from lorabake.recipe.resolve import resolve


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe with nothing left open, and what it stands on."""

    recipe: Recipe
    facts: ModelFacts
    dataset: Dataset
    placements: tuple[Placement, ...]
    """Bucket and crop of each of the dataset's samples."""
    warnings: tuple[str, ...]
    """What is allowed and probably not meant."""


def check(path: Path, overrides: Sequence[str] = ()) -> Checked:
    """Read and check a recipe file or a dataset folder.

    Raises:
        UserError: there is nothing at ``path``.
        Problems: anything is wrong with the settings, the model or the dataset; everything found is named.
    """
    return check_values(read_raw(path, overrides), subject=str(path))


def check_values(raw: Mapping[str, Any], subject: str = "The recipe") -> Checked:
    """The same for plain values by section.

    Raises:
        Problems: as for :func:`check`.
    """
    problems: list[Problem] = []
    values = parse_sections(raw, problems)
    facts = _facts(values, problems)
    dataset = _dataset(values, problems)
    if problems or facts is None or dataset is None:
        raise Problems(subject, problems, "`lorabake explain SECTION` lists what a section accepts.")
    recipe = resolve(Recipe(**values), facts)
    placements = _placements(recipe, facts, dataset, problems)
    if not (recipe.rates.lr or recipe.rates.text_encoder_lr):
        problems.append(
            Problem(
                "optimizer.lr", "0 here and for the text encoder: nothing would be trained. Give one of them a value."
            )
        )
    if problems:
        raise Problems(subject, problems, "`lorabake explain SECTION` lists what a section accepts.")
    return Checked(recipe, facts, dataset, placements, _warnings(recipe, dataset))


def _facts(values: Mapping[str, Any], problems: list[Problem]) -> ModelFacts | None:
    if "model" not in values:
        return None
    try:
        return inspect_model(values["model"].base)
    except UserError as error:
        problems.append(Problem("model.base", str(error)))
        return None


def _dataset(values: Mapping[str, Any], problems: list[Problem]) -> Dataset | None:
    if "data" not in values:
        return None
    try:
        return open_dataset(values["data"].folder)
    except Problems as error:
        problems.extend(Problem("data.folder", problem.what) for problem in error.problems)
    except UserError as error:
        problems.append(Problem("data.folder", str(error)))
    return None


def _placements(recipe: Recipe, facts: ModelFacts, dataset: Dataset, problems: list[Problem]) -> tuple[Placement, ...]:
    buckets = recipe.data.buckets
    found = [Problem(f"data.buckets.{problem.where}", problem.what) for problem in bucket_problems(buckets)]
    if buckets.step % facts.pixel_step:
        found.append(
            Problem(
                "data.buckets.step",
                f"{buckets.step}: {facts.name} needs sides in multiples of {facts.pixel_step} pixels.",
            )
        )
    problems.extend(found)
    if found:
        return ()
    placements = []
    for sample in dataset.samples:
        try:
            placements.append(place((sample.width, sample.height), buckets))
        except UserError as error:
            problems.append(Problem(sample.name, str(error)))
    return tuple(placements)


def _warnings(recipe: Recipe, dataset: Dataset) -> tuple[str, ...]:
    found = [*dataset.notes, *idle_settings(recipe.data.captions)]
    if dataset.dropped:
        first = ", ".join(f"{drop.path.name} ({drop.reason})" for drop in dataset.dropped[:3])
        found.append(f"{len(dataset.dropped)} files are left out: {first}{', …' if len(dataset.dropped) > 3 else ''}.")
    return tuple(found)
