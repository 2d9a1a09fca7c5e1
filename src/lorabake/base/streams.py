"""Independent streams of randomness without state.

Every random draw belongs to a named stream ("noise", "data", "captions", …) and to the step or epoch it is made in, and its
seed is a hash of just that. So a run can continue at any step with nothing to restore, and turning one option on never
changes what another option draws.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, name: str, *indices: int) -> int:
    """A 63-bit seed from the run's seed, the stream's name and where in the run we are."""
    text = ":".join([str(seed), name, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def random_stream(seed: int, name: str, *indices: int) -> random.Random:
    """Python's generator for stream ``name`` at ``indices`` (epoch, step, picture …)."""
    return random.Random(stream_seed(seed, name, *indices))


def torch_stream(seed: int, name: str, *indices: int) -> torch.Generator:
    """A CPU torch generator for stream ``name`` at ``indices``. Noise is drawn on the CPU on every device, so runs agree."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, name, *indices))
