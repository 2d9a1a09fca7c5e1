"""How prompts are read: as captions were when the LoRA files were trained, so that pictures show what was learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorabake.base.errors import UserError
from lorabake.families import caption_readers, family_card
from lorabake.formats.header import read_header
from lorabake.protocols.family import ModelFacts, TextOption
from lorabake.sampling.prompts import Prompt, shortened

_KEYS: Mapping[TextOption, str] = {"clip_skip": "ss_clip_skip", "max_tokens": "ss_max_token_length"}
"""Metadata keys of kohya's tools, which hold a number or ``None``."""


def text_options(facts: ModelFacts, files: Sequence[Path], **given: int | None) -> dict[str, int]:
    """Options to load a model with (``clip_skip``, ``max_tokens``): those given, else those the files were trained with.

    Args:
        facts: the model; what its family has no option for is not taken from files.
        files: LoRA files. Those without such metadata say nothing; neither does a folder (a whole model).
        **given: what was asked for; None is not asked for.

    Raises:
        UserError: the family has no such option; the files were trained with different values and none was given; or a file
            cannot be read.
    """
    known = family_card(facts).text_options
    options = {name: value for name, value in given.items() if value is not None}
    if unknown := options.keys() - known:
        raise UserError(f"Models of the family '{facts.family}' have no {' and no '.join(sorted(unknown))}.")
    headers = {path: read_header(path).metadata for path in files if not path.is_dir()}
    for name in sorted(known - options.keys()):
        found = {path.name: value for path, metadata in headers.items() if (value := _number(metadata, _KEYS[name]))}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{file} with {value}" for file, value in found.items())
            raise UserError(f"The LoRAs were trained with different {name}: {told}. Say which of them to draw with.")
        if found:
            options[name] = next(iter(found.values()))
    return options


def cut_prompts(facts: ModelFacts, prompts: Sequence[Prompt], max_tokens: int = 75) -> Iterator[str]:
    """A line for each distinct text of which a text encoder does not see the end."""
    texts = list(dict.fromkeys(text for prompt in prompts for text in (prompt.text, prompt.negative)))
    readings = [read(texts) for read in caption_readers(facts, max_tokens).values()]
    for text, *of_text in zip(texts, *readings, strict=True):
        worst = max(of_text, key=lambda reading: reading.tokens - reading.room, default=None)
        if worst and worst.lost:
            yield (
                f"'{shortened(text)}' has {worst.tokens} tokens; {worst.room} are read, the rest is not seen: "
                f"'{shortened(worst.lost)}'"
            )


def _number(metadata: Mapping[str, str], key: str) -> int | None:
    """A whole number; None where it is missing or something else."""
    text = metadata.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None
