"""CLIP's tokenizer: lower-cased text to ids of byte-pair pieces (Sennrich et al. 2016, arXiv:1508.07909).

Read from ``vocab.json`` + ``merges.txt``, or from ``tokenizer.json`` where those are missing; no torch, no transformers.

A text encoder has 77 positions: start, 75 tokens of the caption, end. Longer captions are cut into pieces of 75 tokens, each in
a row of its own with start and end (a *window*), as kohya's ``max_token_length`` does. :mod:`prompt_windows` joins what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabake.base.errors import UserError
from lorabake.base.lazy import lazy_module
from lorabake.protocols.family import Reading

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import Tokenizer
else:
    tokenizers = lazy_module("tokenizers")

WINDOW_TOKENS = 75
"""Tokens of a caption that one window holds, beside its start and end: what ``max_tokens`` is a multiple of."""
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LARGEST_FILE = 64 << 20
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""Words, single digits, English endings, runs of anything else: what merges may not cross."""


def windows_for(max_tokens: int) -> int:
    """Windows that ``max_tokens`` tokens of a caption fill: 1 for 75, 2 for 150, 3 for 225.

    Raises:
        UserError: it is not a multiple of 75.
    """
    if max_tokens < WINDOW_TOKENS or max_tokens % WINDOW_TOKENS:
        raise UserError(f"max_tokens is {max_tokens}; text encoders read 75 tokens at a time: give 75, 150 or 225.")
    return max_tokens // WINDOW_TOKENS


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

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[str, int], merges: str, pad: str = _END) -> ClipTokenizer:
        """A tokenizer from what ``vocab.json`` and ``merges.txt`` hold; ``pad`` is the token that rows are filled up with.

        As in diffusers' folders, that token is a piece of its own wherever it stands in a caption: SD2's ``!`` is always token 0.
        """
        return cls(_byte_pairs(vocabulary, merges, Path("vocabulary"), {"pad_token": pad}), pad=pad)

    def encode(self, captions: Sequence[str], windows: int = 1) -> list[list[int]]:
        """Token ids ``ids_BL``, L = ``windows`` × 77: the windows of a caption one after the other.

        Each window is what its 75 tokens alone would be: start, tokens, end, padding. So windows that a caption does not reach are
        those of an empty caption, and where it ends at the last place of one, the next begins with the end. What is too long is cut.

        kohya pads the whole caption first and mends starts and ends afterwards, which comes to the same rows, but for captions with
        a ``!`` at a window's edge: it is also what SD2 and SDXL pad with, and kohya's mending takes it for padding.
        """
        room = self.max_length - 2
        rows: list[list[int]] = []
        for encoding in self._tokenizer.encode_batch(list(captions), add_special_tokens=False):
            row: list[int] = []
            for start in range(0, windows * room, room):
                tokens = encoding.ids[start : start + room]
                row += [self.start_id, *tokens, self.end_id, *[self.pad_id] * (room - len(tokens))]
            rows.append(row)
        return rows

    def pieces(self, caption: str) -> list[int]:
        """Ids of the caption alone: not cut, not padded, no start and end."""
        return self._tokenizer.encode(caption, add_special_tokens=False).ids

    def count(self, caption: str) -> int:
        """Number of tokens of a caption, without start and end."""
        return len(self.pieces(caption))

    def read(self, captions: Sequence[str], windows: int = 1) -> list[Reading]:
        """What of each caption fits into ``windows`` windows, and the text that does not."""
        room = self.max_length - 2
        encodings = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        readings: list[Reading] = []
        for caption, encoding in zip(captions, encodings, strict=True):
            total, kept, lost = len(encoding.ids), caption, ""
            if total > windows * room:
                where = encoding.offsets[windows * room][0]  # offsets count characters of the caption as it was given
                kept, lost = caption[:where].rstrip(), caption[where:].strip()
            used = min(windows, max(1, -(-total // room)))
            readings.append(Reading(tokens=total, room=windows * room, windows=used, kept=kept, lost=lost))
        return readings


def _byte_pairs(vocab: Any, merges: str, where: Path, settings: dict[str, Any]) -> Tokenizer:
    if not isinstance(vocab, dict) or not all(isinstance(value, int) for value in vocab.values()):
        raise UserError(f"{where} is not a vocabulary: a JSON object from tokens to whole numbers was expected.")
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    unknown = _content(settings, "unk_token", _END)
    try:
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab=vocab, merges=pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown
            )
        )
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where.parent}: vocab.json and merges.txt do not belong together: {error}.") from error
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            tokenizers.normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = dict.fromkeys(
        _content(settings, key, default)
        for key, default in (("bos_token", _START), ("eos_token", _END), ("pad_token", _END))
    )
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special if token in vocab]
    )
    return tokenizer


def _parsed(path: Path) -> Tokenizer:
    text = _text(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
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
