"""The vocabulary that all CLIP text encoders of diffusion models share, for models that come without a tokenizer. No torch.

``clip_merges.txt.gz`` holds the byte-pair merges that OpenAI published with CLIP (see ``clip_merges.LICENSE``). The 49,408 tokens
follow from them: 256 bytes, the same at a word's end, one for each merge, start and end.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

from lorabake.families.networks.tokenizer import ClipTokenizer

SD1_PAD = "<|endoftext|>"
"""OpenAI's CLIP fills rows up with the end."""
OPEN_CLIP_PAD = "!"
"""OpenCLIP fills rows up with token 0."""
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = Path(__file__).with_name("clip_merges.txt.gz")
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
"""Bytes that stand for themselves in tokens, in the vocabulary's order; each of the others is a character from 256 up."""


def clip_tokenizer(pad: str = SD1_PAD) -> ClipTokenizer:
    """CLIP's tokenizer, filling rows up with ``pad``."""
    return ClipTokenizer.from_vocabulary(dict(_vocabulary()), _merges(), pad)


def clip_tokenizer_files(pad: str = SD1_PAD) -> dict[str, str]:
    """The same as the files of a diffusers model's ``tokenizer/`` folder, by name."""
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": pad}
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    return {
        "vocab.json": json.dumps(_vocabulary(), ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + _merges(),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


@functools.cache
def _merges() -> str:
    """A merge a line: the left and the right half, in order of rank."""
    return gzip.decompress(_MERGES.read_bytes()).decode()


@functools.cache
def _vocabulary() -> dict[str, int]:
    printable = set(_PRINTABLE)
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, _PRINTABLE), *(chr(256 + index) for index in range(len(others)))]
    merged = [left + right for left, _, right in (line.partition(" ") for line in _merges().splitlines())]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged, _START, _END]
    return {token: index for index, token in enumerate(tokens)}
