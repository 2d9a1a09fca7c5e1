"""Whether what is to be kept of the base model can be told from what is to be learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorabake.base.errors import Problem
from lorabake.dataset.caption import CaptionConfig, full_captions
from lorabake.dataset.folder import Sample
from lorabake.dataset.scan import named
from lorabake.recipe.sections import DataSettings, PreservationSettings


def with_trigger(settings: PreservationSettings, trigger: str | None) -> PreservationSettings:
    """The same with the trigger of the file where no other is given and one is needed."""
    if settings.weight and settings.trigger is None and settings.caption is None and trigger:
        return settings.model_copy(update={"trigger": trigger})
    return settings


def preservation_problems(
    settings: PreservationSettings, data: DataSettings, samples: Sequence[Sample]
) -> Iterator[Problem]:
    """What cannot be kept as it is asked for. ``settings`` have their trigger."""
    if settings.outside_masks and data.masks.source == "none":
        what = f"{settings.outside_masks:g}, but no masks are used. Set data.masks.source, or leave it out."
        yield Problem("preservation.outside_masks", what)
    if not settings.weight or settings.caption is not None:
        return
    if not (settings.trigger or "").strip(" ,"):
        what = "is needed and not given: it is what is taken out of captions. Give it, or output.trigger, or preservation.caption."
        yield Problem("preservation.trigger", what)
    elif samples and len(_without(settings, data.captions, samples)) == len(samples):
        what = f"'{settings.trigger}' is in none of the {len(samples)} captions, so that nothing would be kept. Give what is in them."
        yield Problem("preservation.trigger", what)


def preservation_notes(settings: PreservationSettings, data: DataSettings, samples: Sequence[Sample]) -> Iterator[str]:
    """What is worth knowing of what is kept, and what it takes."""
    if not settings.weight:
        for name, value in settings.changed("share", "trigger", "class_words", "caption").items():
            yield f"preservation.{name} = {value} does nothing: preservation.weight is 0."
    elif settings.caption is not None:
        for name, value in settings.changed("trigger", "class_words").items():
            yield f"preservation.{name} = {value} does nothing: preservation.caption is asked instead."
    elif without := _without(settings, data.captions, samples):
        yield (
            f"preservation: {len(without)} of {len(samples)} captions do not hold '{settings.trigger}' and are not asked of the base: "
            f"{named([sample.name for sample in without])}."
        )
    passes = 4 * settings.share * bool(settings.weight) + bool(settings.outside_masks)
    if passes:  # a step is three: one forward, and backward as much as two
        yield f"preservation: every step asks the base model too, and takes about {1 + passes / 3:.1f} times as long."


def _without(settings: PreservationSettings, captions: CaptionConfig, samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose captions hold no trigger, whatever wildcards make of them."""

    def holds_none(sample: Sample) -> bool:
        return all(settings.kept_caption(text) == text for text in full_captions(sample.caption, captions))

    return [sample for sample in samples if holds_none(sample)]
