"""Which pictures are held out of training, and whether there are enough of them on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorabake.base.errors import Problem
from lorabake.dataset.folder import Sample
from lorabake.dataset.holdout import chances
from lorabake.dataset.scan import named
from lorabake.recipe.pictures import Pictures, Regularisation
from lorabake.recipe.sections import ValidationSettings


def split(
    samples: Sequence[Sample], settings: ValidationSettings, problems: list[Problem]
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(training pictures, held-out pictures) of one dataset, in its order."""
    if settings.folder is not None and settings.share:
        what = f"{settings.share:g}, and a folder is given as well. Leave one of them out."
        problems.append(Problem("validation.share", what))
    if not settings.share or settings.folder is not None:
        return tuple(samples), ()
    found = chances(samples, settings.seed)
    training = tuple(sample for sample, chance in zip(samples, found, strict=True) if chance >= settings.share)
    held_out = tuple(sample for sample, chance in zip(samples, found, strict=True) if chance < settings.share)
    if not held_out or not training:
        enough = " or ".join(f"{chance + 5e-4:.3f}" for chance in sorted(found)[:1])
        what = (
            f"{settings.share:g} holds out {'none' if training else 'all'} of the {len(samples)} pictures: chance decides for each by itself. "
            f"{f'{enough} takes one; or g' if training else 'G'}ive another validation.seed, or a validation.folder."
        )
        problems.append(Problem("validation.share", what))
        return tuple(samples), ()
    return training, held_out


def trained_after_all(held_out: Pictures | None, regularisation: Regularisation | None) -> Iterator[Problem]:
    """Held-out pictures that are trained on as regularisation pictures: what is measured on them would be memory."""
    if held_out is None or regularisation is None:
        return
    trained = {sample.sha256: sample.name for sample in regularisation.samples}
    both = {sample.name: trained[sample.sha256] for sample in held_out.samples if sample.sha256 in trained}
    if both:
        what = (
            f"{len(both)} of the held-out pictures are regularisation pictures too: "
            f"{named([f'{name} (as {as_trained})' for name, as_trained in both.items()])}. Take them out of one of the folders."
        )
        yield Problem("validation", what)


def validation_notes(settings: ValidationSettings, held_out: Pictures | None, trained: int) -> Iterator[str]:
    """What is held out, and settings that do nothing."""
    if held_out is None:
        for name, value in settings.changed("every", "timesteps", "seed").items():
            yield f"validation.{name} = {value} does nothing: neither a share nor a folder is held out."
        return
    count = len(held_out.samples)
    if settings.share:
        names = named([sample.name for sample in held_out.samples])
        yield f"validation: {count} of {count + trained} pictures are held out and not trained on: {names}."
    if count < 2:
        yield "validation: of a single picture's loss nobody can tell how far it is by chance. Hold out more."
