"""From the caption in the file to the text of one training step.

The order of the steps is the one of kohya's sd-scripts; its traps are gone. `keep_tokens_separator` and
`secondary_separator` never stay in the caption, tags are joined with the separator that was asked for, blank tags (a
trailing comma) are not shuffled into the middle, and prefix and suffix are put around the line that was drawn.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator, model_validator

from lorabake.base.cards import Settings
from lorabake.base.units import Duration, Stretch
from lorabake.dataset.wildcards import choose, count_variants, has_choices, lines_of, stray_braces, variants

_MOST_VARIANTS = 64
"""Variants of one caption that are looked at, the longest first."""


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

    secondary_separator: str | None = Field(default=None, min_length=1)
    """What stands between tags that stay together: shuffled and dropped as one, and parted by `separator` in the end.
    Absent: there is none. ";;;" is usual, as in "suzu, red hair;;;ribbon, smile"."""

    wildcards: bool = False
    """Whether captions leave something to chance, anew at every step: of a file with several lines one is drawn, and of
    "{red|blue} hat" one choice; "{{" and "}}" are braces that stay. Default false: the first line, as it is written."""

    token_warmup: Duration | Stretch | None = None
    """Begin with the first `token_warmup_min` tags alone, and show one more after the other until all are shown after this
    long: "500 steps", "2 epochs", or a share of the run such as 0.1 or "10 %". Absent: all from the start. Fixed tags are always shown."""

    token_warmup_min: int = Field(default=1, ge=0)
    """Tags that `token_warmup` begins with, beside the fixed ones. Default 1."""

    prefix: str = ""
    """Text put before every caption, with a space between. Default none. Its tags are tags of the caption: write your
    own comma, and count them in `keep_tokens`."""

    suffix: str = ""
    """Text put behind every caption, with a space between. Default none. Its tags are tags of the caption."""

    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability, per picture and step, of training without any caption (prefix and suffix included), which keeps
    classifier-free guidance healthy. Default 0, right for small sets; 0.05 to 0.1 for large ones."""

    caption_dropout_every_n_epochs: int = Field(default=0, ge=0)
    """Epochs. Every so many epochs, one is trained without any caption: 5 leaves them out in epochs 5, 10, 15 and so on.
    Default 0, never."""

    tag_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability, per tag and step, of leaving a tag out; fixed tags stay. Default 0; 0.1 helps when all captions look alike."""

    @field_validator("token_warmup", mode="before")
    @classmethod
    def _is_a_length_or_a_share(cls, given: Any) -> Any:
        if given is None or isinstance(given, Duration):
            return given
        try:
            length = Duration.parse(given) if "epoch" in str(given) else Stretch.parse(given)
        except ValueError as error:
            raise ValueError(f'{error}, or a number of epochs such as "2 epochs"') from None
        if not length:
            raise ValueError(f"{given} is no length. Leave it out, and all tags are shown from the start")
        return length

    @model_validator(mode="after")
    def _separators_differ(self) -> CaptionConfig:
        given = {"separator": self.separator, "keep_tokens_separator": self.keep_tokens_separator.strip()}
        if not given["keep_tokens_separator"]:
            raise ValueError("keep_tokens_separator is only space. Use for example '|||'.")
        if self.secondary_separator is not None:
            given["secondary_separator"] = self.secondary_separator.strip()
            if not given["secondary_separator"]:
                raise ValueError("secondary_separator is only space. Use for example ';;;'.")
        for (one, text), (other, its) in itertools.combinations(given.items(), 2):
            if set(text) & set(its):
                what = f"{one} '{text}' and {other} '{its}' must not share a character"
                raise ValueError(f"{what}. Use for example ',', '|||' and ';;;'.")
        braced = [name for name, text in given.items() if set(text) & set("{}")]
        if self.wildcards and braced:
            raise ValueError(
                f"{braced[0]} '{given[braced[0]]}' holds braces, which choose with wildcards. Use another."
            )
        return self

    @model_validator(mode="after")
    def _every_epoch_is_always(self) -> CaptionConfig:
        if self.caption_dropout_every_n_epochs == 1:
            raise ValueError(
                "caption_dropout_every_n_epochs = 1 never shows a caption. Say caption_dropout = 1 for that."
            )
        return self


@dataclass(frozen=True, slots=True)
class Moment:
    """When in a run a caption is shown."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 1
    """The epoch it is, counted from 1."""
    warmup_steps: int = 0
    """Optimizer steps that `token_warmup` lasts."""


AFTER_WARMUP = Moment()
"""All tags are shown."""


def warmup_steps(config: CaptionConfig, steps_per_epoch: int, total_steps: int) -> int:
    """Optimizer steps that the token warm-up lasts in a run."""
    if config.token_warmup is None:
        return 0
    return config.token_warmup.steps(steps_per_epoch if isinstance(config.token_warmup, Duration) else total_steps)


def caption_for_step(text: str, config: CaptionConfig, rng: random.Random, moment: Moment = AFTER_WARMUP) -> str:
    """The caption to train on in one step.

    Args:
        text: the caption as it is in the file.
        config: what to do with it.
        rng: randomness of this picture and step. Each option has draws of its own: turning one on changes no other's.
        moment: which step that is.
    """
    dropped, order, tags, choices = rng.random(), rng.getrandbits(64), rng.getrandbits(64), rng.getrandbits(64)
    if dropped < config.caption_dropout or _is_left_out(config, moment):
        return ""
    text = _drawn(text, config, random.Random(choices))
    if _stays_whole(text, config):
        return text
    front, flexible, back = _split(text, config)
    shown = _shown(len(flexible), config, moment)
    kept = random.Random(tags)
    chances = [kept.random() for _ in flexible]
    places = list(range(len(flexible)))
    if config.shuffle:
        random.Random(order).shuffle(places)
    survivors = [flexible[place] for place in places if place < shown and chances[place] >= config.tag_dropout]
    return _joined([*front, *survivors, *back], config)


def full_captions(text: str, config: CaptionConfig) -> list[str]:
    """The captions that training shows when no tag is dropped, tags in the order of the file; [""] where none is ever shown.

    With wildcards these are the variants of every line, of many the longest.

    Args:
        text: the caption as it is in the file.
        config: what is done to it.
    """
    if config.caption_dropout == 1:
        return [""]
    found: dict[str, None] = {}
    lines = lines_of(text) if config.wildcards else [text]
    for line in lines:
        whole = _whole(line, config)
        each = variants(whole) if config.wildcards else [whole]
        for variant in itertools.islice(each, max(1, _MOST_VARIANTS // len(lines))):
            found[variant if _stays_whole(variant, config) else _joined(_every_tag(variant, config), config)] = None
    return list(found)


def full_caption(text: str, config: CaptionConfig) -> str:
    """The first of `full_captions`; without wildcards the only one."""
    return full_captions(text, config)[0]


def count_captions(text: str, config: CaptionConfig) -> int:
    """How many variants wildcards make of a caption; 1 without any."""
    return sum(count_variants(_whole(line, config)) for line in lines_of(text)) if config.wildcards else 1


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
    """Whether a picture has the same caption whenever it has one by plan, so that its text embedding may be computed once and kept."""
    warms_up = config.token_warmup is not None
    return not (config.shuffle or config.tag_dropout or config.caption_dropout or config.wildcards or warms_up)


def idle_settings(config: CaptionConfig) -> tuple[str, ...]:
    """Settings that were given and do nothing, each with the reason."""
    if config.caption_dropout == 1:
        return tuple(
            f"{name} does nothing: caption_dropout = 1 leaves every caption out."
            for name in config.changed()
            if name != "caption_dropout"
        )
    told: list[str] = []
    if config.keep_tokens and not _moves_tags(config):
        reason = "neither shuffle nor tag_dropout nor token_warmup is on"
        told.append(f"keep_tokens = {config.keep_tokens} does nothing: {reason}.")
    if config.token_warmup is None and config.changed("token_warmup_min"):
        told.append(f"token_warmup_min = {config.token_warmup_min} does nothing without token_warmup.")
    return tuple(told)


def unfit_captions(texts: Sequence[str], config: CaptionConfig) -> Iterator[str]:
    """What about these captions does not go with the settings: most likely one of the two is not meant.

    Args:
        texts: as they are in the files.
        config: what is done to them.
    """
    if config.caption_dropout == 1:
        return
    around = f"{config.prefix} {config.suffix}"
    chance = sum(has_choices(f"{around} {text}") or len(lines_of(text)) > 1 for text in texts)
    stray = sum(any(map(stray_braces, [around, *lines_of(text)])) for text in texts)
    if config.wildcards and not chance:
        yield "wildcards does nothing: no caption has several lines, or choices such as {red|blue}."
    if config.wildcards and stray:
        what = f"wildcards: {stray} of {len(texts)} captions have braces that are no pair, and are trained as written"
        yield f"{what}. Choices cannot be nested; write {{{{ or }}}} for a brace that stays."
    if not config.wildcards and chance:
        what = f"{chance} of {len(texts)} captions have choices such as {{red|blue}}, and are trained as written"
        yield f"{what}. Set wildcards = true to draw one."
    secondary = config.secondary_separator
    if secondary and not any(secondary.strip() in text for text in [around, *texts]):
        yield f"secondary_separator does nothing: no caption holds '{secondary}'."


def unfit_lengths(config: CaptionConfig, steps_per_epoch: int, total_steps: int) -> Iterator[str]:
    """What about the settings does not go with the length of the run."""
    if config.caption_dropout == 1:
        return
    epochs = -(-total_steps // steps_per_epoch)
    if config.caption_dropout_every_n_epochs > epochs:
        given = config.caption_dropout_every_n_epochs
        yield f"caption_dropout_every_n_epochs = {given} does nothing: the run has {epochs} epochs."
    warmup = warmup_steps(config, steps_per_epoch, total_steps)
    if warmup >= total_steps:
        yield f"token_warmup lasts {warmup} steps and the run {total_steps}: it ends before all tags are shown."


def _is_left_out(config: CaptionConfig, moment: Moment) -> bool:
    every = config.caption_dropout_every_n_epochs
    return every > 0 and moment.epoch % every == 0


def _drawn(text: str, config: CaptionConfig, rng: random.Random) -> str:
    """The whole caption, with whatever is left to chance drawn."""
    if not config.wildcards:
        return _whole(text, config)
    return choose(_whole(rng.choice(lines_of(text)), config), rng)


def _whole(text: str, config: CaptionConfig) -> str:
    return " ".join(part for part in (config.prefix.strip(), text.strip(), config.suffix.strip()) if part)


def _moves_tags(config: CaptionConfig) -> bool:
    return bool(config.shuffle or config.tag_dropout or config.token_warmup is not None)


def _stays_whole(text: str, config: CaptionConfig) -> bool:
    """Whether the caption is not taken apart into tags."""
    secondary = config.secondary_separator
    held = config.keep_tokens_separator.strip() in text or (secondary is not None and secondary.strip() in text)
    return not held and not _moves_tags(config)


def _shown(tags: int, config: CaptionConfig, moment: Moment) -> int:
    """How many flexible tags are shown by now, of so many."""
    if config.token_warmup is None or moment.step >= moment.warmup_steps:
        return tags
    least = min(config.token_warmup_min, tags)
    return least + moment.step * (tags - least) // moment.warmup_steps


def _split(text: str, config: CaptionConfig) -> tuple[list[str], list[str], list[str]]:
    """(fixed tags at the front, flexible tags, fixed tags at the back)."""
    parts = [_tags(part, config.separator) for part in text.split(config.keep_tokens_separator.strip())]
    if len(parts) == 1:
        return parts[0][: config.keep_tokens], parts[0][config.keep_tokens :], []
    return parts[0], parts[1], [tag for part in parts[2:] for tag in part]


def _every_tag(text: str, config: CaptionConfig) -> list[str]:
    return [tag for tags in _split(text, config) for tag in tags]


def _tags(text: str, separator: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(separator)) if tag]


def _joined(tags: Sequence[str], config: CaptionConfig) -> str:
    """The tags as one text; those that stayed together are parted now."""
    joiner = config.separator if config.separator[-1].isspace() else config.separator + " "
    if config.secondary_separator is not None:
        tags = [single for tag in tags for single in _tags(tag, config.secondary_separator.strip())]
    return joiner.join(tags)
