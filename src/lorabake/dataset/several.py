"""Several folders of pictures as one dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems
from lorabake.base.places import expanded
from lorabake.dataset.folder import Dataset, Sample, open_dataset


def open_datasets(paths: Sequence[Path], repeats: Sequence[int] = (), **options: Any) -> Dataset:
    """Open folders of pictures together; one alone is opened as `open_dataset` does.

    Of several, each stands as a folder in a dataset would: pictures directly in ``10_suzu`` have 10 repeats. Names begin with the
    folder's own; a second folder of the same name gets a number. The dataset's path, where its cache lies, is the first folder.

    Args:
        paths: the folders; at least one.
        repeats: for each folder, how often each of its pictures is trained on per epoch, in place of what the folder's own name says;
            numbers of folders inside it count besides. Empty: the names say it.
        **options: as for `open_dataset`.

    Raises:
        Problems: everything that is wrong with any of them, or a folder is given twice or lies in another.
    """
    if len(paths) == 1:
        return _repeated(open_dataset(paths[0], **options), repeats[0] if repeats else 1)
    roots = [Path(os.path.abspath(expanded(path))) for path in paths]
    problems = _overlaps(roots)
    found: list[Dataset] = []
    for name, root, times in zip(names_of(roots), roots, repeats or [1] * len(roots), strict=True):
        try:
            found.append(_renamed(_repeated(open_dataset(root, number_counts=not repeats, **options), times), name))
        except Problems as error:
            problems += [Problem(f"{name}/{item.where}", f"{name}: {item.what}") for item in error.problems]
    if problems:
        raise Problems("The dataset", problems)
    return Dataset(
        roots[0],
        tuple(sample for dataset in found for sample in dataset.samples),
        tuple(item for dataset in found for item in dataset.dropped),
        tuple(note for dataset in found for note in dataset.notes),
        tuple(warning for dataset in found for warning in dataset.warnings),
        tuple(roots[1:]),
    )


def _repeated(dataset: Dataset, times: int) -> Dataset:
    """The same with every picture so many times as often."""
    if times == 1:
        return dataset
    samples = tuple(dataclasses.replace(sample, repeats=sample.repeats * times) for sample in dataset.samples)
    return dataclasses.replace(dataset, samples=samples)


def _overlaps(roots: Sequence[Path]) -> list[Problem]:
    """Folders whose pictures would be used twice without a word."""
    real = [Path(os.path.realpath(root)) for root in roots]
    problems: list[Problem] = []
    for index, root in enumerate(real):
        others = [other for at, other in enumerate(real) if at != index]
        if root in real[:index]:
            problems.append(
                Problem(str(roots[index]), f"{roots[index]} is given twice. Repeats are for that: name it 2_name.")
            )
        elif any(other in root.parents for other in others):
            problems.append(
                Problem(str(roots[index]), f"{roots[index]} lies in another of the folders. Leave one of them out.")
            )
    return problems


def names_of(roots: Sequence[Path]) -> list[str]:
    """The folders' own names; a number behind those that were met before."""
    names: list[str] = []
    for root in roots:
        name, count = root.name, 1
        while name in names:
            count += 1
            name = f"{root.name} ({count})"
        names.append(name)
    return names


def renamed(samples: Iterable[Sample], label: str) -> tuple[Sample, ...]:
    """The same with ``label`` in front of their names and folders."""
    return tuple(
        dataclasses.replace(sample, name=f"{label}/{sample.name}", folder=f"{label}/{sample.folder}".rstrip("/"))
        for sample in samples
    )


def _renamed(dataset: Dataset, name: str) -> Dataset:
    """The same with ``name`` in front of everything."""
    return dataclasses.replace(
        dataset,
        samples=renamed(dataset.samples, name),
        notes=tuple(f"{name}: {note}" for note in dataset.notes),
        warnings=tuple(Problem(f"{name}/{item.where}", item.what) for item in dataset.warnings),
    )
