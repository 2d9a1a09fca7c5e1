"""Which pictures are held out of training, and whether there are enough of them on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorabake.base.errors import Problem
from lorabake.dataset.folder import Sample
from lorabake.dataset.holdout import chances
from lorabake.dataset.scan import named
from lorabake.recipe.pictures import Pictures
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


def validation_notes(settings: ValidationSettings, held_out: Pictures | None, trained: int) -> Iterator[str]:
    """What is held out, and settings that do nothing."""
    if held_out is None:
        fields = type(settings).model_fields
        for name in ("every", "timesteps", "seed"):
            if getattr(settings, name) != fields[name].default:
                yield f"validation.{name} = {getattr(settings, name)} does nothing: neither a share nor a folder is held out."
        return
    count = len(held_out.samples)
    if settings.share:
        names = named([sample.name for sample in held_out.samples])
        yield f"validation: {count} of {count + trained} pictures are held out and not trained on: {names}."
    if count < 2:
        yield "validation: of a single picture's loss nobody can tell how far it is by chance. Hold out more."
