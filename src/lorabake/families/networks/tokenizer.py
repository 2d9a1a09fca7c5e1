"""CLIP's tokenizer: lower-cased text to ids of byte-pair pieces (Sennrich et al. 2016, arXiv:1508.07909).

Read from ``vocab.json`` + ``merges.txt``, or from ``tokenizer.json`` where those are missing; no torch, no transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from lorabake.base.errors import UserError

_START, _END = "<|startoftext|>", "<|endoftext|>"
_LARGEST_FILE = 64 << 20
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""Words, single digits, English endings, runs of anything else: what merges may not cross."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A caption as a row of a given length holds it."""

    tokens: int
    """Tokens of the whole caption, without start and end."""
    kept: str
    lost: str
    """The end of the caption that does not fit; empty when all of it does."""


class ClipTokenizer:
    """Text to token ids.

    Attributes:
        start_id, end_id: put around every caption.
        pad_id: fills rows up; SD1 pads with ``end_id``, SD2 with the id of ``!``.
        max_length: tokens per row with start and end, 77.
        size: number of different ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: str = _START, end: str = _END, pad: str = _END, max_length: int = 77
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.start_id, self.end_id, self.pad_id = (_id_of(tokenizer, token) for token in (start, end, pad))
        self.max_length = max_length
        self.size = tokenizer.get_vocab_size()

    @classmethod
    def from_folder(cls, folder: Path) -> ClipTokenizer:
        """The tokenizer of a model's ``tokenizer/`` folder.

        Raises:
            UserError: no tokenizer files, files that do not parse, or ones that are not CLIP's.
        """
        settings = _special_tokens(folder)
        vocab, merges, whole = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
        if vocab.is_file() and merges.is_file():
            tokenizer = _byte_pairs(_json(vocab), _text(merges), vocab, settings)
        elif whole.is_file():
            tokenizer = _parsed(whole)
        else:
            raise UserError(
                f"{folder} holds no tokenizer: looked for vocab.json with merges.txt, and for tokenizer.json."
            )
        length = settings.get("model_max_length", 77)
        usable = isinstance(length, int) and not isinstance(length, bool) and 3 <= length <= 4096
        try:
            return cls(
                tokenizer,
                start=_content(settings, "bos_token", _START),
                end=_content(settings, "eos_token", _END),
                pad=_content(settings, "pad_token", _END),
                max_length=length if usable else 77,
            )
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    def encode(self, captions: Sequence[str], length: int | None = None) -> list[list[int]]:
        """Token ids ``ids_BL``: start, caption, end, padding, each row ``length`` long (77 if not given); what is too long is cut."""
        length = length or self.max_length
        rows: list[list[int]] = []
        for encoding in self._tokenizer.encode_batch(list(captions), add_special_tokens=False):
            row = [self.start_id, *encoding.ids[: length - 2], self.end_id]
            rows.append(row + [self.pad_id] * (length - len(row)))
        return rows

    def pieces(self, caption: str) -> list[int]:
        """Ids of the caption alone: not cut, not padded, no start and end."""
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def count(self, caption: str) -> int:
        """Number of tokens of a caption, without start and end."""
        return len(self.pieces(caption))

    def cut(self, caption: str, length: int | None = None) -> Cut:
        """What of a caption fits into a row of ``length`` tokens (75 of them its own when 77), and the text that does not."""
        room = (length or self.max_length) - 2
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        total = len(encoding.ids)
        if total <= room:
            return Cut(total, caption, "")
        where = encoding.offsets[room][0]  # offsets count characters of the caption as it was given
        return Cut(total, caption[:where].rstrip(), caption[where:].strip())


def _byte_pairs(vocab: Any, merges: str, where: Path, settings: dict[str, Any]) -> Tokenizer:
    if not isinstance(vocab, dict) or not all(isinstance(value, int) for value in vocab.values()):
        raise UserError(f"{where} is not a vocabulary: a JSON object from tokens to whole numbers was expected.")
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    unknown = _content(settings, "unk_token", _END)
    try:
        tokenizer = Tokenizer(
            BPE(vocab=vocab, merges=pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown)
        )
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where.parent}: vocab.json and merges.txt do not belong together: {error}.") from error
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = dict.fromkeys(
        _content(settings, key, default)
        for key, default in (("bos_token", _START), ("eos_token", _END), ("pad_token", _END))
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special if token in vocab]
    )
    return tokenizer


def _parsed(path: Path) -> Tokenizer:
    text = _text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer file: {error}.") from error


def _special_tokens(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values = _json(folder / name)
            settings.update(values if isinstance(values, dict) else {})
    return settings


def _content(settings: dict[str, Any], key: str, default: str) -> str:
    """A special token is written as a string, or as an object with its ``content``."""
    given = settings.get(key, default)
    given = given.get("content") if isinstance(given, dict) else given
    return given if isinstance(given, str) else default


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no token '{token}': it is not CLIP's.")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} has {path.stat().st_size >> 20} MiB; a tokenizer file has a few. It is not one.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} could not be read: {error}.") from error
