"""Pictures beside the training folder's own, checked with everything else before a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.base.places import expanded
from lorabake.dataset.buckets import BucketConfig, Placement, placements
from lorabake.dataset.folder import Dataset, Sample, open_dataset
from lorabake.dataset.masks import Mask, MaskConfig, read_masks
from lorabake.dataset.regularisation import Turns
from lorabake.dataset.scan import named
from lorabake.dataset.several import names_of, renamed
from lorabake.recipe.sections import DataSettings


@dataclass(frozen=True, slots=True)
class Pictures:
    """Some pictures, and how each gets to what the model sees."""

    home: Path
    """The folder that they are from."""
    samples: tuple[Sample, ...]
    """Each once for every size that it is seen at."""
    placements: tuple[Placement, ...]
    """Bucket and crop of each."""
    masks: tuple[Mask | None, ...] = ()
    """As they are in the bucket; None counts whole. Empty where masks are not asked for."""


@dataclass(frozen=True, slots=True)
class Regularisation:
    """Pictures that keep the base model's idea of the class, and how many of them an epoch takes."""

    folders: tuple[Pictures, ...]
    turns: Turns
    weight: float
    """What their loss is multiplied by."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Of all folders, in their order, each once for every size that it is seen at."""
        return tuple(sample for folder in self.folders for sample in folder.samples)


def placed(
    samples: Iterable[Sample], buckets: BucketConfig, problems: list[Problem], *, every_size: bool = True
) -> tuple[tuple[Sample, ...], tuple[Placement, ...]]:
    """Every picture once for each size it is seen at, and where it goes there; without ``every_size`` once, at its largest.

    One for which there is no place is added to ``problems``.
    """
    found: list[tuple[Sample, Placement]] = []
    for sample in samples:
        try:
            places = placements(sample.size, buckets)
        except UserError as error:
            problems.append(Problem(sample.name, str(error)))
        else:
            found += [(sample, placement) for placement in (places if every_size else places[-1:])]
    return tuple(sample for sample, _ in found), tuple(placement for _, placement in found)


def pictures(
    home: Path,
    samples: tuple[Sample, ...],
    buckets: BucketConfig,
    masks: MaskConfig,
    cell: int,
    called: str,
    problems: list[Problem],
    notes: list[str] | None = None,
    *,
    every_size: bool = True,
) -> Pictures | None:
    """Pictures with their places and masks; None where something is wrong with one, which is added to ``problems``.

    Args:
        home: the folder that they are from.
        samples: the pictures.
        buckets: with nothing left open.
        masks: which masks are asked for.
        cell: pixels of a latent cell along a side.
        called: what messages call the pictures.
        problems: added to.
        notes: added to.
        every_size: whether they are seen at each size that they are large enough for, and not at the largest of them alone.
    """
    before = len(problems)
    samples, places = placed(samples, buckets, problems, every_size=every_size)
    if len(problems) > before:
        return None
    looks = read_masks(samples, places, masks, cell, called)
    problems.extend(looks.problems)
    if notes is not None:
        notes.extend(looks.notes)
    return None if looks.problems else Pictures(home, samples, places, looks.of_samples)


def open_regularisation(
    data: DataSettings,
    dataset: Dataset,
    entries: int,
    buckets: BucketConfig,
    cell: int,
    seed: int,
    problems: list[Problem],
    notes: list[str],
) -> Regularisation | None:
    """The regularisation folders, and what an epoch takes of them; None where there are none or something is wrong.

    Args:
        data: the recipe's settings.
        dataset: the training pictures.
        entries: those of an epoch, repeats and sizes included.
        buckets: with nothing left open.
        cell: pixels of a latent cell along a side.
        seed: the run's.
        problems: added to.
        notes: added to.
    """
    where, before = "data.regularisation", len(problems)
    folders: list[Pictures] = []
    for path, label in zip(data.regularisation, names_of(data.regularisation), strict=True):
        found = open_beside(path, where, label, dataset, problems, every_line=data.captions.wildcards)
        if found is None:
            continue
        notes += [f"{where}: {note}" for note in found.notes]
        looked_at = pictures(
            found.path, found.samples, buckets, data.masks, cell, "regularisation pictures", problems, notes
        )
        if looked_at:
            folders.append(looked_at)
    if len(problems) > before or not folders:
        return None
    samples = [sample for folder in folders for sample in folder.samples]
    buckets_wh = [placement.bucket_wh for folder in folders for placement in folder.placements]
    repeats = [sample.repeats for sample in samples]
    turns = Turns.for_entries(entries, data.regularisation_ratio, buckets_wh, repeats, seed)
    return Regularisation(tuple(folders), turns, data.prior_loss_weight)


def open_beside(
    path: Path, where: str, label: str, dataset: Dataset, problems: list[Problem], **options: Any
) -> Dataset | None:
    """A folder of pictures that are not trained as the training folder's are; its samples' names begin with ``label``.

    It must lie apart: whatever is inside a training folder is trained. ``options`` are those of `open_dataset`.
    """
    path = expanded(path).resolve()
    for home in (training.resolve() for training in (dataset.path, *dataset.more_paths)):
        if path == home or home in path.parents or path in home.parents:
            how = "is" if path == home else "lies inside" if home in path.parents else "holds"
            which = "a" if dataset.more_paths else "the"
            what = f"{path} {how} {which} folder of the training pictures ({home}), and all in that is trained. Move it beside."
            problems.append(Problem(where, what))
            return None
    try:
        found = open_dataset(path, **options)
    except Problems as error:
        problems.extend(Problem(where, f"{problem.where}: {problem.what}") for problem in error.problems)
        return None
    known = {sample.sha256: sample.name for sample in dataset.samples}
    if doubles := [f"{label}/{sample.name}" for sample in found.samples if sample.sha256 in known]:
        what = f"{len(doubles)} of {label}'s pictures are training pictures too: {named(doubles)}. Take them out of one of the folders."
        problems.append(Problem(where, what))
    return dataclasses.replace(found, samples=renamed(found.samples, label))


def regularisation_notes(regularisation: Regularisation, entries: int, epochs: int) -> Iterator[str]:
    """What an epoch and a run of so many epochs take, in numbers.

    Args:
        regularisation: what there is.
        entries: training pictures of an epoch, repeats and sizes included.
        epochs: begun by the run.
    """
    turns, count, each = regularisation.turns, len(set(regularisation.samples)), len(regularisation.samples)
    pool, taken = sum(turns.repeats), turns.entries
    sizes, of = (" and sizes", f"{each} pictures in their sizes") if each > count else ("", f"{count} pictures")
    yield (
        f"data.regularisation: {count} pictures ({pool} with repeats{sizes}). Every epoch takes {taken} of them, in turn, beside {entries} training pictures: "
        f"{taken + entries} in all. In {epochs} epochs each is seen {_times(epochs * taken / pool)}."
    )
    if unseen := turns.unseen(epochs):
        yield (
            f"data.regularisation: {unseen} of {of} are never seen in {epochs} epochs. "
            "To see more of them, train longer or raise data.regularisation_ratio."
        )


def _times(number: float) -> str:
    return "once" if number == 1 else f"{number:.3g} times on average"


def idle_settings(data: DataSettings) -> tuple[str, ...]:
    """Settings that were given and do nothing, each with the reason."""
    if data.regularisation:
        return ()
    return tuple(
        f"{name} = {value} does nothing: data.regularisation names no folder."
        for name, value in data.changed("prior_loss_weight", "regularisation_ratio").items()
    )
