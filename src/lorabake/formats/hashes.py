"""The names that files go by: hashes that web UIs and model sites look LoRAs and base models up with.

| name | of what | digits |
|---|---|---|
| ``sshs_model_hash`` | everything after the header: the weights, whatever the metadata | 64 |
| ``sshs_legacy_hash`` | bytes 0x100000 to 0x110000 of the file as it is with ``ss_*`` metadata only | 8 |
| AutoV1 | the same bytes of the file as it is | 8 |
| AutoV2 | the whole file | 10 |
| AutoV3 | everything after the header | 12 |

All are sha256 in lower-case hex. A file below 1 MiB has no byte in the legacy window, and so the hash of nothing,
``e3b0c442``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorabake.base.errors import UserError
from lorabake.formats.safetensors_file import blocks

if TYPE_CHECKING:
    from torch import Tensor

LEGACY_WINDOW = (0x100000, 0x110000)


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """``sshs_model_hash``: sha256 of the weights as stored. Cast to the file's type first: other bytes, other hash."""
    digest = hashlib.sha256()
    stored = blocks(tensors, {})
    next(stored)
    for block in stored:
        digest.update(block)
    return digest.hexdigest()


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """``sshs_legacy_hash``. Only ``ss_*`` metadata counts: the rest may be edited later and would shift the window."""
    start, end = LEGACY_WINDOW
    digest = hashlib.sha256()
    position = 0
    for block in blocks(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}):
        digest.update(block[max(start - position, 0) : max(end - position, 0)])
        position += len(block)
    return digest.hexdigest()[:8]


def with_hashes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``metadata`` with the hashes of ``tensors``, which must already have the type they are stored in.

    ``modelspec.hash_sha256`` is the same hash as ``sshs_model_hash``, written as that standard asks.
    """
    weights = model_hash(tensors)
    return {
        **metadata,
        "modelspec.hash_sha256": f"0x{weights}",
        "sshs_model_hash": weights,
        "sshs_legacy_hash": legacy_hash(tensors, metadata),
    }


def legacy_file_hash(path: Path) -> str:
    """AutoV1 of any file; of a base checkpoint it is ``ss_sd_model_hash``.

    Raises:
        UserError: the file cannot be read.
    """
    start, end = LEGACY_WINDOW
    try:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(end - start)).hexdigest()[:8]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
