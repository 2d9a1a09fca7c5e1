"""What the text encoders see of a dataset's captions, and what is cut off; told from the tokenizers' files, without weights."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorabake.dataset.caption import CaptionConfig, count_captions, full_captions
from lorabake.dataset.folder import Sample
from lorabake.protocols.family import MOST_T5_TOKENS, Part, Reader, Reading, TextOptions
from lorabake.recipe.sections import MaxTokens

_ALLOWED: tuple[int, ...] = typing.get_args(MaxTokens)


@dataclass(frozen=True, slots=True)
class SeenCaption:
    """One picture's caption as training shows it, every tag in the order of the file, and what each text encoder sees of it.

    Of what wildcards make of it, it is the variant with most tokens.
    """

    picture: str
    """Name of the picture inside the dataset."""
    text: str
    readings: Mapping[Part, Reading]
    """By text encoder; at least one."""
    variants: int = 1
    """How many captions wildcards make of it."""

    @property
    def tokens(self) -> int:
        """Tokens of the caption, in the tokenizer that makes the most of them."""
        return max(reading.tokens for reading in self.readings.values())

    @property
    def is_cut(self) -> bool:
        """Whether some text encoder does not see all of it."""
        return any(reading.tokens > reading.room for reading in self.readings.values())


def see_captions(
    samples: Sequence[Sample], config: CaptionConfig, readers: Mapping[Part, Reader]
) -> tuple[SeenCaption, ...]:
    """What ``readers`` see of each sample's caption, in the order of the samples. Equal captions are read once."""
    texts = [full_captions(sample.caption, config) for sample in samples]
    distinct = list(dict.fromkeys(text for of_sample in texts for text in of_sample))
    known: dict[Part, dict[str, Reading]] = {
        part: dict(zip(distinct, read(distinct), strict=True)) for part, read in readers.items()
    }

    def seen(sample: Sample, text: str) -> SeenCaption:
        readings: dict[Part, Reading] = {part: of_part[text] for part, of_part in known.items()}
        return SeenCaption(sample.name, text, readings, count_captions(sample.caption, config))

    return tuple(
        max((seen(sample, text) for text in of_sample), key=lambda caption: caption.tokens)
        for sample, of_sample in zip(samples, texts, strict=True)
    )


def token_warnings(seen: Sequence[SeenCaption], options: TextOptions, config: CaptionConfig) -> Iterator[str]:
    """What is worth saying about the captions' lengths: that some are cut, or that there is more room than any needs.

    Args:
        seen: all captions.
        options: the settings, without those that the models do not have.
        config: what training does to captions.
    """
    if not seen:
        return
    max_tokens = options.get("max_tokens")
    longest = max(seen, key=lambda caption: caption.tokens)
    cut = [caption for caption in seen if caption.is_cut]
    if cut:
        room = min(reading.room for reading in longest.readings.values())
        varying = ", other tags at every step as they are shuffled" if config.shuffle else ""
        yield (
            f"data.captions: {len(cut)} of {len(seen)} captions {'has' if len(cut) == 1 else 'have'} more than the {room} tokens that the text encoder reads; "
            f"what comes after is cut off{varying}. The longest has {longest.tokens} ({longest.picture}). "
            f"{_remedy(longest.tokens, cut, options)} `lorabake validate RECIPE --captions` shows what is cut."
        )
    elif max_tokens and max_tokens > (enough := _enough(longest.tokens)):
        yield (
            f"model.max_tokens: {max_tokens} is more than any caption needs: the longest has {longest.tokens} tokens "
            f"({longest.picture}). {enough} does, and each step is faster."
        )


def _enough(tokens: int) -> int:
    """The smallest setting that takes so many tokens, or the largest there is."""
    return next((allowed for allowed in _ALLOWED if tokens <= allowed), _ALLOWED[-1])


def _remedy(longest: int, cut: Sequence[SeenCaption], options: TextOptions) -> str:
    them = "it" if len(cut) == 1 else "them all"
    t5_tokens = options.get("t5_tokens")
    rooms = {reading.room for caption in cut for reading in caption.readings.values() if reading.tokens > reading.room}
    if t5_tokens and rooms == {t5_tokens - 1} and longest < MOST_T5_TOKENS:
        return f"model.t5_tokens = {longest + 1} takes {them}."
    if t5_tokens and all(any(seen.tokens <= seen.room for seen in caption.readings.values()) for caption in cut):
        return f"T5 reads {'it' if len(cut) == 1 else 'them'} whole; only CLIP does not."
    if options.get("max_tokens") is None:
        return f"Shorten {'it' if len(cut) == 1 else 'them'}."
    if longest <= _ALLOWED[-1]:
        return f"model.max_tokens = {_enough(longest)} takes {them}."
    too_long = sum(caption.tokens > _ALLOWED[-1] for caption in cut)
    return f"model.max_tokens goes up to {_ALLOWED[-1]}, which cuts {too_long}: shorten {'it' if too_long == 1 else 'them'}."
