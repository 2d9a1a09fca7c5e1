"""The vocabulary that the T5 text encoders of all diffusion models share, for models that come without a tokenizer. No torch.

``t5_tokenizer.json.gz`` holds the pieces that Google published with T5 (see ``t5_tokenizer.LICENSE``).
"""

from __future__ import annotations

import gzip
from pathlib import Path

from lorabake.families.networks.t5_tokenizer import T5Tokenizer

_PIECES = Path(__file__).with_name("t5_tokenizer.json.gz")


def t5_tokenizer(path: Path | None = None) -> T5Tokenizer:
    """The tokenizer at ``path`` (see :meth:`T5Tokenizer.from_path`); by default T5's own: 32,100 tokens, the last hundred of them blanks."""
    return T5Tokenizer.from_path(path) if path else T5Tokenizer.from_json(gzip.decompress(_PIECES.read_bytes()))
