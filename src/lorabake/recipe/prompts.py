"""What shall be drawn: prompts, and the prompt files that people already have (sd-scripts' syntax)."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorabake.base.cards import cards
from lorabake.base.errors import Problem, Problems, UserError, nearest
from lorabake.protocols.family import ModelFacts, Prediction
from lorabake.protocols.sampler import SamplerCard
from lorabake.recipe.sections import SampleSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_STEPS = 1000
LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """One picture to draw. The same prompt on the same model gives the same picture, alone or among others.

    Raises:
        Problems: values that no model can draw; all are named.
    """

    text: str
    negative: str = ""
    """What guidance leads away from; without effect at ``cfg`` 1."""
    seed: int = 0
    steps: int = 20
    cfg: float | None = None
    """Strength of classifier-free guidance (2207.12598); 1 is none, and twice as fast. None is the usual one for the model."""
    width: int | None = None
    """In pixels; None is the side the model was trained on."""
    height: int | None = None
    """In pixels; None is the side the model was trained on."""
    sampler: str | None = None
    """None is the usual one for what the model predicts."""
    guidance: float | None = None
    """Strength that guidance-distilled models (Flux dev) are told; None is the usual one. It is no second forward pass, as ``cfg`` is."""

    def __post_init__(self) -> None:
        checks = {
            "seed": (0 <= self.seed <= LARGEST_SEED, "a whole number from 0 to 2^64-1"),
            "steps": (1 <= self.steps <= MOST_STEPS, f"from 1 to {MOST_STEPS}"),
            "cfg": (self.cfg is None or 1 <= self.cfg < float("inf"), "at least 1, where 1 means no guidance"),
            "width": (self.width is None or self.width > 0, "a number of pixels above 0"),
            "height": (self.height is None or self.height > 0, "a number of pixels above 0"),
            "guidance": (
                self.guidance is None or 0 <= self.guidance < float("inf"),
                "a number from 0 up; 3.5 is usual",
            ),
        }
        wrong = [
            Problem(name, f"{getattr(self, name)} is not allowed; it must be {rule}")
            for name, (fine, rule) in checks.items()
            if not fine
        ]
        if self.sampler is not None and self.sampler not in cards("sampler"):
            wrong.append(
                Problem("sampler", f"'{self.sampler}' is not offered. {nearest(self.sampler, cards('sampler'))}")
            )
        if wrong:
            raise Problems(f"The prompt '{shortened(self.text)}'", wrong)

    @property
    def guided(self) -> bool:
        """Whether each step takes a second forward pass, for classifier-free guidance."""
        return self.cfg is not None and self.cfg > 1

    def on(self, facts: ModelFacts) -> Prompt:
        """The same prompt with sides, sampler and guidance, where they were left open, as this model wants them."""
        return dataclasses.replace(
            self,
            width=self.width or facts.resolution,
            height=self.height or facts.resolution,
            sampler=self.sampler or sampler_card(None, facts.prediction).name,
            cfg=facts.usual_cfg if self.cfg is None else self.cfg,
            guidance=facts.usual_guidance if self.guidance is None else self.guidance,
        )


def samplers_for(prediction: Prediction) -> list[str]:
    """Names of the samplers for models that predict this, the usual one first."""
    fit = [card for card in sampler_cards().values() if prediction in card.predictions]
    return [card.name for card in sorted(fit, key=lambda card: not card.usual)]


def sampler_card(name: str | None, prediction: Prediction) -> SamplerCard:
    """The card of that sampler; None is the usual one for what the model predicts.

    Raises:
        UserError: there is no such sampler, or it is for other models; the message names those for this one.
    """
    allowed, known = samplers_for(prediction), sampler_cards()
    if name is not None and name not in known:
        raise UserError(f"'{name}' is not offered. {nearest(name, known)}")
    if name is not None and name not in allowed:
        raise UserError(
            f"'{name}' draws with models that predict {' or '.join(known[name].predictions)}; this one predicts {prediction}. "
            f"Allowed: {', '.join(allowed)}. Without a sampler, {allowed[0]} is taken."
        )
    return known[name or allowed[0]]


def sampler_cards() -> Mapping[str, SamplerCard]:
    """All of them, by name."""
    return cast(Mapping[str, SamplerCard], cards("sampler"))


def unfit(prompt: Prompt, facts: ModelFacts) -> Iterator[tuple[str, str]]:
    """What in a prompt a model cannot draw, and why, as far as its facts say."""
    unit = facts.pixel_step
    for name, side in (("width", prompt.width), ("height", prompt.height)):
        if side is not None and side % unit:
            below, above = side // unit * unit, (side // unit + 1) * unit
            yield name, f"{side} is not a multiple of {unit}; use {f'{below} or {above}' if below else above}"
    if prompt.guidance is not None and facts.usual_guidance is None:
        what = f"{prompt.guidance:g} does nothing with a model that is told no guidance: leave it out, and set cfg (--l) instead"
        yield "guidance", what
    try:
        sampler_card(prompt.sampler, facts.prediction)
    except UserError as error:
        yield "sampler", str(error)


def sample_prompts(settings: SampleSettings) -> list[Prompt]:
    """What a recipe wants to see: its own prompts, then those of its file.

    Raises:
        Problems: a prompt or the file cannot be read; every wrong line is named.
    """
    found: list[Prompt] = []
    problems: list[Problem] = []
    for number, line in enumerate(settings.prompts, 1):
        try:
            found.append(line_to_prompt(line))
        except Problems as error:
            problems += [Problem(f"sample.prompts {number}", f"{item.where} {item.what}") for item in error.problems]
    if settings.prompts_file:
        try:
            found += prompts_from_file(Path(settings.prompts_file))
        except Problems as error:
            problems += [Problem("sample.prompts_file", f"{item.where} {item.what}") for item in error.problems]
        except UserError as error:
            problems.append(Problem("sample.prompts_file", str(error)))
    if problems:
        raise Problems("The prompts", problems)
    return found


@dataclass(frozen=True, slots=True)
class _Option:
    field: str
    reads: type
    key: str
    """The option's name in JSON and TOML prompt files."""


_OPTIONS = {
    "n": _Option("negative", str, "negative_prompt"),
    "w": _Option("width", int, "width"),
    "h": _Option("height", int, "height"),
    "d": _Option("seed", int, "seed"),
    "s": _Option("steps", int, "sample_steps"),
    "l": _Option("cfg", float, "scale"),
    "ss": _Option("sampler", str, "sample_sampler"),
    "g": _Option("guidance", float, "guidance_scale"),
}
_BY_KEY = {"prompt": _Option("text", str, "prompt")} | {option.key: option for option in _OPTIONS.values()}
_ELSEWHERE = {
    "cn": "ControlNet",
    "ctr": "ControlNet",
    "rcfg": "CFG renormalisation",
    "fs": "flow models",
}
_NAMES = {"k_euler": "euler"}
_WHOLE = re.compile(r"\d+\Z", re.ASCII)
_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)\Z", re.ASCII)


def line_to_prompt(line: str, seed: int = 0) -> Prompt:
    """A prompt from one line: ``text --n negative --w 512 --h 512 --d seed --s steps --l cfg --ss sampler --g guidance``.

    Args:
        line: options may come in any order, and in capitals; a value ends at the next ``" --"``.
        seed: for a line without ``--d``. (sd-scripts draws a random one; here the same line is always the same picture.)

    Raises:
        Problems: every option that is unknown, doubled, or has a value that is not allowed.
    """
    first, *rest = re.split(r"(?:^|\s+)--(?=\S)", line.strip())
    values: dict[str, Any] = {"text": first.strip(), "seed": seed}
    problems: list[Problem] = []
    seen: set[str] = set()
    for piece in rest:
        flag, _, value = piece.partition(" ")
        name = flag.lower()
        option = _OPTIONS.get(name)
        if option is None:
            problems.append(Problem(f"--{flag}", _unknown(name)))
        elif name in seen:
            problems.append(Problem(f"--{flag}", "is given twice; keep one"))
        else:
            _read(option, value.strip(), f"--{flag}", values, problems)
        seen.add(name)
    return _finished(f"The prompt line '{shortened(line)}'", values, problems)


def prompts_from_file(path: Path, seed: int = 0) -> list[Prompt]:
    """Prompts of a file: lines of text (``#`` starts a comment), a JSON list, or TOML with ``[prompt]`` and ``[[prompt.subset]]``.

    Args:
        path: ``.json`` and ``.toml`` are read as such, everything else as lines.
        seed: for prompts without one.

    Raises:
        UserError: the file cannot be read, or holds no prompt.
        Problems: what is wrong in any of its prompts, all at once.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            entries: list[Any] = [(f"entry {n}", entry) for n, entry in enumerate(_listed(json.loads(text)), 1)]
        elif path.suffix.lower() == ".toml":
            entries = [(f"entry {n}", entry) for n, entry in enumerate(_merged(tomllib.loads(text)), 1)]
        else:
            lines = enumerate(text.split("\n"), 1)
            entries = [(f"line {n}", line) for n, line in lines if line.strip() and not line.lstrip().startswith("#")]
    except OSError as error:
        raise UserError(f"The prompt file {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"The prompt file {path} is not valid {path.suffix.lstrip('.').upper() or 'text'}: {error}."
        ) from error
    if not entries:
        raise UserError(
            f"The prompt file {path} holds no prompt. Write one a line, for example: a girl, smile --w 512 --h 512 --d 1"
        )
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for where, entry in entries:
        try:
            prompts.append(line_to_prompt(entry, seed) if isinstance(entry, str) else _from_table(entry, seed))
        except Problems as error:
            problems += [Problem(f"{where}: {problem.where}", problem.what) for problem in error.problems]
    if problems:
        raise Problems(f"The prompt file {path.name}", problems)
    return prompts


def shortened(text: str, length: int = 48) -> str:
    """``text`` in one short line, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _listed(found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError('a list of prompts was expected, such as [{"prompt": "a girl", "seed": 1}]')
    return found


def _merged(found: Mapping[str, Any]) -> list[Any]:
    shared = found.get("prompt")
    subsets = shared.get("subset") if isinstance(shared, dict) else None
    if not isinstance(shared, dict) or not isinstance(subsets, list):
        raise ValueError("tables [prompt] and [[prompt.subset]] were expected")
    common = {key: value for key, value in shared.items() if key != "subset"}
    return [common | subset if isinstance(subset, dict) else subset for subset in subsets]


def _from_table(entry: Any, seed: int) -> Prompt:
    if not isinstance(entry, dict):
        raise Problems(
            "The entry", [Problem("entry", f"{entry!r} is neither a line of text nor a table with a 'prompt'")]
        )
    values: dict[str, Any] = {"text": "", "seed": seed}
    problems: list[Problem] = []
    for key, value in entry.items():
        option = _BY_KEY.get(key)
        if option is None:
            problems.append(Problem(str(key), f"is not an option of a prompt. {nearest(str(key), _BY_KEY)}"))
        elif isinstance(value, bool) or not isinstance(value, str | int | float):
            problems.append(Problem(key, f"{value!r} is not allowed; it must be a text or a number"))
        else:
            _read(option, str(value), key, values, problems)
    return _finished(f"The prompt '{shortened(str(values['text']))}'", values, problems)


def _read(option: _Option, value: str, where: str, values: dict[str, Any], problems: list[Problem]) -> None:
    if option.reads is int and not _WHOLE.match(value):
        problems.append(Problem(where, f"'{value}' is not allowed; it must be a whole number"))
    elif option.reads is float and not _DECIMAL.match(value):
        problems.append(Problem(where, f"'{value}' is not allowed; it must be a number, such as 7.5"))
    elif option.field == "sampler":
        values["sampler"] = _NAMES.get(value.lower(), value.lower())
    elif len(value) > 32 and option.reads is not str:
        problems.append(Problem(where, f"'{shortened(value)}' is too long for a number"))
    else:
        values[option.field] = option.reads(value)


def _finished(subject: str, values: dict[str, Any], problems: Sequence[Problem]) -> Prompt:
    problems, prompt = list(problems), None
    try:
        prompt = Prompt(**values)
    except Problems as error:
        problems += error.problems
    if problems or prompt is None:
        raise Problems(subject, problems)
    return prompt


def _unknown(name: str) -> str:
    if name in _ELSEWHERE:
        return f"is not drawn here ({_ELSEWHERE[name]}); remove it"
    return f"is not an option of a prompt line. {nearest(name, _OPTIONS)}"
