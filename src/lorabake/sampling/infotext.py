"""Generation parameters as text, in the form that Stable Diffusion web UI (A1111), ComfyUI readers and Civitai understand.

    a girl, smile <lora:mira:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15, Lora hashes: "mira: 0123456789ab"

A PNG carries it in the text chunk ``parameters``. Everything that is written can be read back to equal values; a text that the format
cannot hold (a prompt with a line ``Negative prompt: …`` in it, say) is added in quotes under a key of our own.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from lorabake.base.errors import UserError
from lorabake.base.files import write_atomic
from lorabake.recipe.prompts import Prompt, prompts_from_file, sampler_cards

CHUNK = "parameters"
"""Name of the PNG text chunk."""

_NEGATIVE = "Negative prompt:"
_EXACT_TEXT, _EXACT_NEGATIVE, _EXACT_LORAS = "Exact prompt", "Exact negative prompt", "Exact loras"
_OWN = ("Steps", "Sampler", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model hash", "Model", "Lora hashes")
_KEY = re.compile(r"\w[\w \-/]*")
_LORA = re.compile(r" <lora:([^:<>\n]+):(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)>\Z")
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|\Z)')
_SIZE = re.compile(r"(\d+)x(\d+)\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class UsedLora:
    """A LoRA file that a picture was drawn with."""

    name: str
    """Its file's name without folder and suffix, as clients name it in ``<lora:name:weight>``."""
    weight: float = 1.0
    hash: str = ""
    """First 12 hex digits of the hash over its tensors (AutoV3)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _without_folder(self.name))


@dataclass(frozen=True)
class Infotext:
    """Everything that made one picture. Names that come with a folder lose it: paths of a machine are never written."""

    prompt: Prompt
    model: str = ""
    model_hash: str = ""
    loras: tuple[UsedLora, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further parameters in order, such as ``Clip skip`` or ``Version``."""

    def __post_init__(self) -> None:
        for key in self.extra:
            assert _KEY.fullmatch(key) and key not in _OWN, f"'{key}' cannot name a further parameter"
        object.__setattr__(self, "model", _without_folder(self.model))
        object.__setattr__(self, "extra", {key: value for key, value in self.extra.items() if value})


def write(info: Infotext) -> str:
    """The parameters text."""
    prompt = info.prompt
    text = prompt.text + "".join(f" <lora:{lora.name}:{_number(lora.weight)}>" for lora in info.loras)
    pairs = {
        "Steps": str(prompt.steps),
        "Sampler": sampler_cards()[prompt.sampler].shown if prompt.sampler else "",
        "CFG scale": "" if prompt.cfg is None else _number(prompt.cfg),
        "Distilled CFG Scale": "" if prompt.guidance is None else _number(prompt.guidance),
        "Seed": str(prompt.seed),
    }
    if prompt.width and prompt.height:
        pairs["Size"] = f"{prompt.width}x{prompt.height}"
    pairs |= {"Model hash": info.model_hash, "Model": info.model}
    pairs["Lora hashes"] = ", ".join(f"{lora.name}: {lora.hash}" for lora in info.loras if lora.hash)
    pairs |= info.extra
    body = f"{text}\n{_NEGATIVE} {prompt.negative}" if prompt.negative else text
    seen_text, seen_negative, _ = parse(f"{body}\n{_joined(pairs)}")
    plain, loras = _split_loras(seen_text, pairs["Lora hashes"])
    if (plain, seen_negative) != (prompt.text, prompt.negative) or loras != info.loras:
        pairs |= {_EXACT_TEXT: json.dumps(prompt.text), _EXACT_NEGATIVE: json.dumps(prompt.negative)}
        pairs[_EXACT_LORAS] = json.dumps([[lora.name, lora.weight, lora.hash] for lora in info.loras])
    return f"{body}\n{_joined(pairs)}"


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and all parameters of a parameters text, whoever wrote it. What is not understood is left out."""
    body, _, last = text.rpartition("\n")
    pairs = {key: _unquoted(value) for key, value in _PAIR.findall(last)}
    if "Steps" not in pairs:
        body, pairs = text, {}
    if body.startswith(_NEGATIVE):
        body = "\n" + body
    positive, _, negative = body.partition("\n" + _NEGATIVE)
    return positive.strip(), negative.strip(), pairs


def read(text: str) -> Infotext:
    """What :func:`write` was given. Sides, hashes and names that are not there stay empty.

    Raises:
        UserError: there are no parameters in the text, or values that this tool cannot draw (another sampler, …).
    """
    positive, negative, pairs = parse(text)
    if not pairs:
        raise UserError("The text holds no generation parameters; a line that starts with 'Steps: ' was expected.")
    try:
        plain, loras = _split_loras(positive, pairs.pop("Lora hashes", ""))
        if _EXACT_TEXT in pairs:
            plain, negative = json.loads(pairs.pop(_EXACT_TEXT)), json.loads(pairs.pop(_EXACT_NEGATIVE))
            loras = tuple(
                UsedLora(str(name), float(weight), str(digest))
                for name, weight, digest in json.loads(pairs.pop(_EXACT_LORAS))
            )
        size = _SIZE.match(pairs.pop("Size", ""))
        given = pairs.pop("Sampler", None)
        cfg, guidance = pairs.pop("CFG scale", None), pairs.pop("Distilled CFG Scale", None)
        prompt = Prompt(
            text=str(plain),
            negative=str(negative),
            seed=int(pairs.pop("Seed", "0")),
            steps=int(pairs.pop("Steps")),
            cfg=float(cfg) if cfg else None,
            width=int(size[1]) if size else None,
            height=int(size[2]) if size else None,
            sampler=next((name for name, card in sampler_cards().items() if card.shown == given), given),
            guidance=float(guidance) if guidance else None,
        )
        return Infotext(prompt, pairs.pop("Model", ""), pairs.pop("Model hash", ""), loras, pairs)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"The generation parameters cannot be read: {error}.") from error


def save_png(image: Image.Image, path: Path, infotext: str = "") -> None:
    """Write a PNG, whole or not at all, with its parameters text (a tEXt chunk, or iTXt where Latin-1 does not suffice).

    Raises:
        UserError: the file cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    if infotext:
        chunks.add_text(CHUNK, _storable(infotext))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    write_atomic(path, buffer.getvalue())


def prompts_in(path: Path, seed: int = 0) -> list[Prompt]:
    """Prompts of a file, as :func:`lorabake.recipe.prompts.prompts_from_file` has them; of a PNG the one that it was drawn with.

    Raises:
        UserError: the file cannot be read, holds no prompt, or one that this tool cannot draw.
    """
    if path.suffix.lower() != ".png":
        return prompts_from_file(path, seed)
    try:
        return [read(infotext_of(path)).prompt]
    except UserError as error:
        raise UserError(f"{path} tells no prompt to draw. {error}") from error


def infotext_of(path: Path) -> str:
    """The parameters text of a PNG; empty if there is none.

    Raises:
        UserError: the file is not a picture that can be read.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return str(image.info.get(CHUNK, ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}.") from error


def _joined(pairs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items() if value)


def _quoted(value: str) -> str:
    plain = value == value.strip() and not re.search(r'[,:"\n]', value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value, strict=False))
        except ValueError:
            return value
    return value.strip()


def _split_loras(text: str, hashes: str) -> tuple[str, tuple[UsedLora, ...]]:
    """Take ``<lora:name:weight>`` off the end of a prompt, and find the hashes that belong to them."""
    known = dict(_hash_pairs(hashes))
    loras: list[UsedLora] = []
    while found := _LORA.search(text):
        loras.insert(0, UsedLora(found[1], float(found[2]), known.get(found[1], "")))
        text = text[: found.start()]
    return text, tuple(loras)


def _hash_pairs(hashes: str) -> Iterable[tuple[str, str]]:
    for pair in hashes.split(", "):
        name, _, digest = pair.rpartition(": ")
        yield name, digest


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _without_folder(name: str) -> str:
    return re.split(r"[\\/]", name)[-1]


def _storable(text: str) -> str:
    """Lone surrogates have no UTF-8, and NUL ends a text in PNG."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
