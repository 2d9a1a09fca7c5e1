"""From the caption in the file to the text of one training step.

The order of the steps is the one of kohya's sd-scripts; three of its traps are gone: `keep_tokens_separator` never
stays in the caption, tags are joined with the separator that was asked for, and blank tags (a trailing comma) are not
shuffled into the middle.
"""

from __future__ import annotations

import functools
import random
import re

from pydantic import Field, model_validator

from lorabake.base.cards import Settings


class CaptionConfig(Settings):
    """What happens to captions between the file and the model."""

    shuffle: bool = False
    """Whether tags change places at every step, so that the model does not learn their order. Default false: sentences
    must stay whole, and a fixed text can be encoded once. Useful for tag captions."""

    keep_tokens: int = Field(default=0, ge=0)
    """Tags. How many tags at the front are neither shuffled nor dropped; put trigger words there. Default 0. A caption
    that holds `keep_tokens_separator` ignores it."""

    keep_tokens_separator: str = Field(default="|||", min_length=1)
    """Text in a caption that ends the fixed tags at the front; a second one begins fixed tags at the end. Default
    "|||", the custom of the field. It is always taken out."""

    separator: str = Field(default=",", min_length=1)
    """What stands between two tags. Default ",", as taggers write. When tags are joined again a space follows it."""

    prefix: str = ""
    """Text put before every caption, with a space between. Default none. Its tags are tags of the caption: write your
    own comma, and count them in `keep_tokens`."""

    suffix: str = ""
    """Text put behind every caption, with a space between. Default none. Its tags are tags of the caption."""

    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability, per picture and step, of training without any caption (prefix and suffix included), which keeps
    classifier-free guidance healthy. Default 0, right for small sets; 0.05 to 0.1 for large ones."""

    tag_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability, per tag and step, of leaving a tag out; fixed tags stay. Default 0; 0.1 helps when all captions look alike."""

    @model_validator(mode="after")
    def _separators_differ(self) -> CaptionConfig:
        keep = self.keep_tokens_separator.strip()
        if not keep or set(keep) & set(self.separator):
            given = f"keep_tokens_separator '{self.keep_tokens_separator}' and separator '{self.separator}'"
            raise ValueError(f"{given} must not share a character. Use for example '|||' and ','.")
        return self


def caption_for_step(text: str, config: CaptionConfig, rng: random.Random) -> str:
    """The caption to train on in one step.

    Args:
        text: the caption as it is in the file (one line).
        config: what to do with it.
        rng: randomness of this picture and step. Each option has draws of its own: turning one on changes no other's.
    """
    dropped, order, tags = rng.random(), rng.getrandbits(64), rng.getrandbits(64)
    if dropped < config.caption_dropout:
        return ""
    text = _whole(text, config)
    if _stays_whole(text, config):
        return text
    front, flexible, back = _split(text, config)
    kept = random.Random(tags)
    chances = [kept.random() for _ in flexible]
    if config.shuffle:
        places = list(range(len(flexible)))
        random.Random(order).shuffle(places)
        flexible, chances = [flexible[i] for i in places], [chances[i] for i in places]
    survivors = [tag for tag, chance in zip(flexible, chances, strict=True) if chance >= config.tag_dropout]
    return _joiner(config).join([*front, *survivors, *back])


def full_caption(text: str, config: CaptionConfig) -> str:
    """The caption as training shows it when no tag is dropped, its tags in the order of the file; "" where none is ever shown.

    Args:
        text: the caption as it is in the file (one line).
        config: what is done to it.
    """
    if config.caption_dropout == 1:
        return ""
    text = _whole(text, config)
    if _stays_whole(text, config):
        return text
    front, flexible, back = _split(text, config)
    return _joiner(config).join([*front, *flexible, *back])


def without_additions(config: CaptionConfig) -> CaptionConfig:
    """The same without prefix and suffix, which often hold what is being learnt: for pictures of something else."""
    return config.model_copy(update={"prefix": "", "suffix": ""})


def replaced(text: str, words: str, by: str = "") -> str:
    """``text`` with every occurrence of each of ``words`` (several are parted by commas) gone, or ``by`` in its place.

    Upper and lower case are alike, and so are blanks, "_" and "-" inside of words; parts of other words stay. Commas and blanks that are
    left without anything between them go too. A text that holds none of the words stays as it is.
    """
    pattern = _words(words)
    if not pattern.search(text):
        return text
    tags = [" ".join(pattern.sub(by, tag).split()) for tag in text.split(",")]
    return ", ".join(tag for tag in tags if tag)


@functools.lru_cache(maxsize=64)
def _words(words: str) -> re.Pattern[str]:
    each = [
        r"[\s_-]+".join(map(re.escape, re.split(r"[\s_-]+", word.strip()))) for word in words.split(",") if word.strip()
    ]
    longest_first = sorted(each, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first) or '(?!)'})(?!\w)", re.IGNORECASE)


def is_static(config: CaptionConfig) -> bool:
    """Whether a picture has the same caption at every step, so that its text embedding may be computed once and kept."""
    return not (config.shuffle or config.tag_dropout or config.caption_dropout)


def idle_settings(config: CaptionConfig) -> tuple[str, ...]:
    """Settings that were given and do nothing, each with the reason."""
    if config.keep_tokens and not (config.shuffle or config.tag_dropout):
        return (f"keep_tokens = {config.keep_tokens} does nothing: neither shuffle nor tag_dropout is on.",)
    return ()


def _whole(text: str, config: CaptionConfig) -> str:
    return " ".join(part for part in (config.prefix.strip(), text.strip(), config.suffix.strip()) if part)


def _stays_whole(text: str, config: CaptionConfig) -> bool:
    """Whether the caption is not taken apart into tags."""
    return config.keep_tokens_separator.strip() not in text and not (config.shuffle or config.tag_dropout)


def _split(text: str, config: CaptionConfig) -> tuple[list[str], list[str], list[str]]:
    """(fixed tags at the front, flexible tags, fixed tags at the back)."""
    parts = [_tags(part, config.separator) for part in text.split(config.keep_tokens_separator.strip())]
    if len(parts) == 1:
        return parts[0][: config.keep_tokens], parts[0][config.keep_tokens :], []
    return parts[0], parts[1], [tag for part in parts[2:] for tag in part]


def _tags(text: str, separator: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(separator)) if tag]


def _joiner(config: CaptionConfig) -> str:
    return config.separator if config.separator[-1].isspace() else config.separator + " "
