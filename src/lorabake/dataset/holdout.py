"""Which pictures are held out of training, to be asked about only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lorabake.dataset.folder import Sample


def chances(samples: Sequence[Sample], seed: int) -> list[float]:
    """Where each picture stands between 0 and 1: those below the share are held out.

    It goes by the picture's bytes alone. So adding or removing pictures changes nothing for the others, and copies stay together.
    """
    texts = (f"held out:{seed}:{sample.sha256}" for sample in samples)
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64 for text in texts]
