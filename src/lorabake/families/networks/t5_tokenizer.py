"""T5's tokenizer: text to ids of pieces of words, cut so that the pieces are likeliest (Kudo 2018, arXiv:1804.10959).

Read from ``tokenizer.json``, or from SentencePiece's own ``spiece.model`` where that is missing; no torch, no transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorabake.base.errors import UserError
from lorabake.base.lazy import lazy_module
from lorabake.protocols.family import Reading

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import Tokenizer
else:
    tokenizers = lazy_module("tokenizers")

FILES = ("tokenizer.json", "spiece.model")
"""What a tokenizer is read from, in order."""
_END, _PAD, _UNKNOWN = "</s>", "<pad>", "<unk>"
_BLANKS = 100
"""Tokens ``<extra_id_N>`` that stand for what was cut out in T5's own training; SentencePiece's file does not list them."""
_LARGEST_FILE = 64 << 20
_SPECIAL = (2, 3)
"""Kinds of pieces that are never found in text: unknown, control."""


class T5Tokenizer:
    """Text to token ids.

    Attributes:
        end_id: put behind every caption.
        pad_id: fills rows up.
        size: number of different ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # As SentencePiece cuts: spaces at the ends and in rows are none. Older files make tokens of them.
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.WhitespaceSplit(),
                tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            ]
        )
        self._tokenizer = tokenizer
        self.end_id, self.pad_id = (_id_of(tokenizer, token) for token in (_END, _PAD))
        self.size = tokenizer.get_vocab_size()

    @classmethod
    def from_path(cls, path: Path) -> T5Tokenizer:
        """The tokenizer of a model's ``tokenizer_2/`` folder, or of one file of it.

        Raises:
            UserError: no tokenizer files, files that do not parse, or ones that are not T5's.
        """
        file = next((path / name for name in FILES if (path / name).is_file()), path)
        if file.is_dir() or not file.exists():
            raise UserError(f"{path} holds no T5 tokenizer: looked for {' and for '.join(FILES)}.")
        data = _bytes(file)
        try:
            return cls.from_json(data) if file.suffix == ".json" else cls(_from_sentencepiece(data))
        except UserError as error:
            raise UserError(f"{file}: {error}") from error

    @classmethod
    def from_json(cls, data: bytes) -> T5Tokenizer:
        """The tokenizer of what a ``tokenizer.json`` holds.

        Raises:
            UserError: it does not parse, or is not T5's.
        """
        return cls(_from_json(data))

    def encode(self, captions: Sequence[str], length: int) -> list[list[int]]:
        """Token ids ``ids_BL``: caption, end, padding, each row ``length`` long; what is too long is cut."""
        rows: list[list[int]] = []
        for encoding in self._tokenizer.encode_batch(list(captions), add_special_tokens=False):
            row = [*encoding.ids[: length - 1], self.end_id]
            rows.append(row + [self.pad_id] * (length - len(row)))
        return rows

    def files(self, length: int) -> dict[str, str]:
        """The same as the files of a diffusers model's ``tokenizer_2/`` folder, by name; ``length`` is what they say a row holds."""
        special = {"eos_token": _END, "unk_token": _UNKNOWN, "pad_token": _PAD}
        settings = {"extra_ids": _BLANKS, "model_max_length": length, "tokenizer_class": "T5TokenizerFast", **special}
        return {
            "tokenizer.json": self._tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        }

    def read(self, captions: Sequence[str], length: int) -> list[Reading]:
        """What of each caption fits into a row of ``length`` tokens, one of them the end, and the text that does not."""
        room = length - 1
        readings: list[Reading] = []
        for caption, encoding in zip(
            captions, self._tokenizer.encode_batch(list(captions), add_special_tokens=False), strict=True
        ):
            total, kept, lost = len(encoding.ids), caption, ""
            if total > room:
                where = encoding.offsets[room][0]  # offsets count characters of the caption as it was given
                kept, lost = caption[:where].rstrip(), caption[where:].strip()
            readings.append(Reading(tokens=total, room=room, windows=1, kept=kept, lost=lost))
        return readings


def _from_json(data: bytes) -> Tokenizer:
    try:
        kind = json.loads(data)["model"]["type"]
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"it is not a tokenizer file: {error}.") from error
    if kind != "Unigram":
        raise UserError(f"it is a {kind} tokenizer; T5's is a Unigram one.")
    return tokenizer


@dataclass(frozen=True, slots=True)
class _Model:
    """What is used of a SentencePiece file."""

    pieces: list[tuple[str, float]]
    special: list[str]
    charsmap: bytes


def _from_sentencepiece(data: bytes) -> Tokenizer:
    try:
        model = _parsed(data)
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(f"it is not a SentencePiece model: {error}.") from error
    blanks = [f"<extra_id_{index}>" for index in reversed(range(_BLANKS))]
    known = {piece for piece, _ in model.pieces}
    pieces = model.pieces + [(blank, 0.0) for blank in blanks if blank not in known]
    if _UNKNOWN not in known:
        raise UserError(f"it has no piece '{_UNKNOWN}': it is not T5's.")
    unknown = next(index for index, (piece, _) in enumerate(pieces) if piece == _UNKNOWN)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    if model.charsmap:
        tokenizer.normalizer = tokenizers.normalizers.Precompiled(model.charsmap)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in model.special + blanks]
    )
    return tokenizer


def _parsed(data: bytes) -> _Model:
    """The pieces and the table of equal characters in a SentencePiece model.

    Source: ``sentencepiece_model.proto`` (1: pieces of 1: text, 2: score, 3: kind; 2: training, with 3: algorithm;
    3: normaliser, with 2: table of equal characters).
    """
    pieces: list[tuple[str, float]] = []
    special: list[str] = []
    charsmap = b""
    for number, value in _fields(data):
        parts = dict(_fields(value)) if isinstance(value, bytes) and number in (1, 2, 3) else {}
        if number == 1:
            text, score = parts.get(1, b""), parts.get(2, bytes(4))
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("a piece has no text or score")
            pieces.append((text.decode("utf-8"), struct.unpack("<f", score)[0]))
            if parts.get(3, 1) in _SPECIAL:
                special.append(pieces[-1][0])
        elif number == 2 and parts.get(3, 1) != 1:
            raise ValueError("its algorithm is not Unigram")
        elif number == 3 and isinstance(found := parts.get(2, b""), bytes):
            charsmap = found
    if not pieces:
        raise ValueError("it holds no pieces")
    return _Model(pieces, special, charsmap)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol-buffer message: whole numbers, or the bytes of anything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        length, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or (_varint(data, at) if tag & 7 == 2 else (0, 0))
        if not at or at + length > len(data):
            raise ValueError(f"it is cut short or damaged at byte {at}")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"it is damaged at byte {at}")


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no token '{token}': it is not T5's.")
    return found


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} has {path.stat().st_size >> 20} MiB; a tokenizer file has a few. It is not one.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} could not be read: {error}.") from error
