"""How prompts are read: as captions were when the LoRA files were trained, so that pictures show what was learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError
from lorabake.base.header import read_header
from lorabake.families import caption_readers, family_card
from lorabake.protocols.family import MOST_T5_TOKENS, ZERO_TERMINAL_SNR, ModelFacts, TextOption, TextOptions
from lorabake.recipe.prompts import Prompt, shortened

_KEYS: Mapping[TextOption, str] = {
    "clip_skip": "ss_clip_skip",
    "max_tokens": "ss_max_token_length",
    "t5_tokens": "ss_t5xxl_max_token_length",
}
"""Metadata keys in the manner of kohya's tools, which hold a number or ``None``."""


def text_options(facts: ModelFacts, files: Sequence[Path], given: TextOptions) -> dict[TextOption, int]:
    """Options to load a model with (``clip_skip``, ``max_tokens`` …): those given, else those the files were trained with.

    Args:
        facts: the model; what its family has no option for is not taken from files.
        files: LoRA files. Those without such metadata say nothing; neither does a folder (a whole model).
        given: what was asked for; None is not asked for.

    Raises:
        UserError: the family has no such option; the files were trained with different values and none was given; or a file
            cannot be read.
    """
    known = family_card(facts).text_options
    options: dict[TextOption, int] = {name: value for name, value in given.items() if value is not None}
    if unknown := options.keys() - known:
        raise UserError(f"Models of the family '{facts.family}' have no {' and no '.join(sorted(unknown))}.")
    t5_tokens = options.get("t5_tokens")
    if t5_tokens is not None and not 1 <= t5_tokens <= MOST_T5_TOKENS:
        raise UserError(f"{t5_tokens} tokens for T5 are not allowed. Give 1 to {MOST_T5_TOKENS}.")
    headers = {path: read_header(path).metadata for path in files if not path.is_dir()}
    for name in sorted(known - options.keys()):
        found = {path.name: value for path, metadata in headers.items() if (value := _number(metadata, _KEYS[name]))}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{file} with {value}" for file, value in found.items())
            raise UserError(f"The LoRAs were trained with different {name}: {told}. Say which of them to draw with.")
        if found:
            options[name] = next(iter(found.values()))
    return options


def schedule_of(facts: ModelFacts, files: Sequence[Path]) -> Mapping[str, Any]:
    """What LoRA files were trained to expect of the noise schedule, beside the model's own."""
    told = [read_header(path).metadata.get("ss_zero_terminal_snr") for path in files if not path.is_dir()]
    return ZERO_TERMINAL_SNR if "True" in told and facts.prediction == "v" else {}


def cut_prompts(facts: ModelFacts, prompts: Sequence[Prompt], options: TextOptions) -> Iterator[str]:
    """A line for each distinct text of which a text encoder does not see the end."""
    texts = list(dict.fromkeys(text for prompt in prompts for text in (prompt.text, prompt.negative)))
    if not texts:
        return
    readings = [read(texts) for read in caption_readers(facts, options).values()]
    for text, *of_text in zip(texts, *readings, strict=True):
        worst = max(of_text, key=lambda reading: reading.tokens - reading.room, default=None)
        if worst and worst.lost:
            yield (
                f"'{shortened(text)}' has {worst.tokens} tokens; {worst.room} are read, the rest is not seen: "
                f"'{shortened(worst.lost)}'"
            )


def prompt_notes(facts: ModelFacts, prompts: Sequence[Prompt], options: TextOptions) -> Iterator[str]:
    """What is allowed and probably not meant: texts whose end is not seen, and negative prompts that do nothing.

    Args:
        facts: the model.
        prompts: what shall be drawn.
        options: what the model is loaded with.
    """
    yield from cut_prompts(facts, prompts, options)
    on_model = [prompt.on(facts) for prompt in prompts]
    for text in dict.fromkeys(prompt.negative for prompt in on_model if prompt.negative and not prompt.guided):
        yield f"the negative prompt '{shortened(text)}' does nothing where cfg is 1. Leave it out, or give a higher cfg (--l)."


def infotext_extra(options: TextOptions) -> dict[str, str]:
    """What a picture's parameters text says of how its prompt was read, where that is not the ordinary way."""
    clip_skip = options.get("clip_skip") or 1
    return {"Clip skip": str(clip_skip)} if clip_skip > 1 else {}


def _number(metadata: Mapping[str, str], key: str) -> int | None:
    """A whole number; None where it is missing or something else."""
    text = metadata.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None
