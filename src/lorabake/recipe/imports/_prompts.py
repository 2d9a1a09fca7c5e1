"""Sample prompts of sd-scripts as lines that a recipe reads: from lines, a TOML file with shared values, or a JSON list."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problems, UserError
from lorabake.recipe.imports import _values
from lorabake.recipe.imports._files import read_config, read_text
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.prompts import LARGEST_SEED, MOST_STEPS, line_to_prompt

KEY = "sample_prompts"
_FILES = (".txt", ".toml", ".json")
_FLOWS = ("flux", "sd3", "other")
_SAMPLERS = {"ddim": "ddim", "euler": "euler", "k_euler": "euler"}
"""Ours by their names."""
_FLAGS = {
    "w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "scale", "g": "guidance_scale", "n": "negative_prompt",
    "ss": "sample_sampler", "cn": "controlnet_image", "ctr": "cfg_trunc_ratio", "rcfg": "renorm_cfg", "fs": "flow_shift", "i": "image",
    "am": "additional_network_multiplier",
}  # fmt: skip
"""What TOML and JSON files call the options of lines."""
_ELSEWHERE = {
    "controlnet_image": "there is no ControlNet.",
    "cfg_trunc_ratio": "guidance holds for all steps here.",
    "renorm_cfg": "guidance is not scaled back here.",
    "flow_shift": "steps are shifted as the model's own files say.",
    "image": "pictures are drawn from noise alone.",
    "additional_network_multiplier": "the LoRA is drawn with at full strength.",
}
_SIDES = ("width", "height")
_STEPS = {"sd": 64, "sdxl": 32, "sd3": 16, "flux": 16}
"""Pixels that sides are multiples of, by family; of one that is not known, what all can draw."""
_SHORTEST = 64
"""Pixels. sd-scripts draws no shorter side."""
_IDLE = ("prompt", "enum", "subset")


@dataclass(slots=True)
class Lines:
    """Prompts on their way, and what of them was left out."""

    family: str
    trainer: str = "sd-scripts"
    left: dict[str, str] = field(default_factory=dict)
    """Reasons by option."""

    def line(self, entry: Any) -> str:
        """A prompt of theirs, a line or a table, as a line."""
        given = table_of(entry) if isinstance(entry, str) else entry
        if not isinstance(given, Mapping):
            self.left["entry"] = f"{_values.shown(entry)} is neither a line nor a table with a prompt."
            return ""
        told = _harmless(given.get("prompt"))
        for key, value in given.items():
            if key not in _IDLE and not _values.is_nothing(value) and (option := self._option(key, value)):
                told += f" --{option}"
        return told.strip()

    def _option(self, key: str, value: Any) -> str:
        """An option with its value; "" where it is left out."""
        if key not in _OPTIONS:
            self.left[key] = _ELSEWHERE.get(key, f"{self.trainer} takes no notice of it.")
            return ""
        if key == "sample_sampler" and self.family in _FLOWS:
            self.left[key] = f"{self.trainer} does not look at it for {self.family}."
            return ""
        if key == "guidance_scale" and self.family != "flux":
            self.left[key] = "the model is told no guidance; scale is that of negative prompts."
            return ""
        flag, read = _OPTIONS[key]
        try:
            return f"{flag} {self._side(key, value) if key in _SIDES else read(value)}"
        except ValueError as error:
            self.left[key] = f"{_values.shown(value)} {error}."
            return ""

    def _side(self, key: str, value: Any) -> int:
        """A side that the family's models can draw: rounded down, as sd-scripts does, but to their own step."""
        given, step = _count(value), _STEPS.get(self.family, _STEPS["sd"])
        side = max(_SHORTEST, given // step * step)
        if side != given:
            self.left[key] = f"{given} is drawn as {side}: sides are multiples of {step}, and at least {_SHORTEST}."
        return side


def prompts(reading: Reading, family: str) -> None:
    """Set what is drawn while training.

    Args:
        reading: that the recipe is put into.
        family: as the config's program has it.
    """
    given = reading.text(KEY)
    if given is None:
        return
    lines = Lines(family)
    if not given.lower().endswith(_FILES):
        found = [line.strip() for line in given.splitlines() if line.strip() and not line.startswith("#")]
        _put(reading, [lines.line(entry) for entry in found], lines, "one a line")
        return
    path = located(reading, KEY, given)
    if not os.path.isfile(path):
        reading.put("sample.prompts_file", path, KEY)
        return
    try:
        entries = _entries(Path(path))
    except (UserError, ValueError, RecursionError) as error:
        what = str(error).removesuffix(" Nothing was written.")
        what = what if isinstance(error, UserError) else f"{path} holds no prompts: {what}."
        reading.left(KEY, f"{what} Give sample.prompts.")
        return
    found = [lines.line(entry) for entry in entries]
    if path.lower().endswith(".txt") and not lines.left and all(_reads(entry) for entry in entries):
        reading.put("sample.prompts_file", path, KEY)
    else:
        _put(reading, found, lines, "the file's prompts, each with its values")


def _put(reading: Reading, found: list[str], lines: Lines, note: str) -> None:
    reading.put("sample.prompts", [line for line in found if line], KEY, note)
    for option, why in lines.left.items():
        reading.left(f"{KEY}: {option}", why)


def _entries(path: Path) -> list[Any]:
    """Lines or tables.

    Raises:
        UserError: the file cannot be read.
        ValueError: it holds no prompts.
    """
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
    data = json.loads(read_text(path)) if path.suffix.lower() == ".json" else read_config(path)
    if path.suffix.lower() == ".json":
        if not isinstance(data, list):
            raise ValueError("it is no list of prompts")
        return data
    shared = _values.table(_values.table(data).get("prompt"))
    subsets = _values.tables(shared.get("subset"))
    if not subsets:
        raise ValueError("it has no [prompt] with [[prompt.subset]]")
    return [{**shared, **subset} for subset in subsets]


def table_of(line: str) -> dict[str, Any]:
    """A line as the table that sd-scripts and ai-toolkit make of it: of an option that is given twice the last counts."""
    text, *options = line.split(" --")
    found: dict[str, Any] = {"prompt": text}
    for option in options:
        flag, _, value = option.partition(" ")
        found[_FLAGS.get(flag.lower(), f"--{flag}")] = value.strip()
    return found


def _reads(line: str) -> bool:
    try:
        return bool(line_to_prompt(line))
    except Problems:
        return False


# ---- values ----


def _harmless(text: Any) -> str:
    """Text on one line in which nothing reads as an option."""
    line = " ".join(str(text or "").split())
    return re.sub(r"(^|\s)--(?=\S)", r"\1-- ", line)


def _count(value: Any) -> int:
    """A whole number that is not below 0; of a line's, as far as its digits go."""
    digits = re.match(r"\d+", value) if isinstance(value, str) else None
    found = int(digits[0]) if digits else _values.whole(value)
    if found < 0:
        raise ValueError("is below 0")
    if found > LARGEST_SEED:
        raise ValueError("is too large")
    return found


def _steps(value: Any) -> int:
    return max(1, min(MOST_STEPS, _count(value)))


def _strength(value: Any) -> str:
    found = _values.number(value)
    if not 0 <= found < 1e6:
        raise ValueError("is no strength")
    return f"{found:.6f}".rstrip("0").rstrip(".")


def _scale(value: Any) -> str:
    """1 and less are no guidance."""
    return _strength(max(1.0, _values.number(value)))


def _sampler(value: Any) -> str:
    if (ours := _SAMPLERS.get(str(value).strip().lower())) is None:
        raise ValueError(
            f"is not offered: the usual sampler is taken, or one of {', '.join(sorted(set(_SAMPLERS.values())))}"
        )
    return ours


_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "negative_prompt": ("n", _harmless),
    "width": ("w", _count),
    "height": ("h", _count),
    "seed": ("d", _count),
    "sample_steps": ("s", _steps),
    "scale": ("l", _scale),
    "guidance_scale": ("g", _strength),
    "sample_sampler": ("ss", _sampler),
}
"""Our flags by their keys, and how their values are read."""
