"""Caches of tensors by content key, in files that are named by the hash of their own bytes.

Such a folder may be deleted at any time, and others may write to it meanwhile: a file is whole or it does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.files import sha256_file, write_atomic
from lorabake.base.lock import exclusive


def write_pack(folder: Path, tensors: Mapping[str, Tensor], not_kept: Callable[[str], None]) -> Path | None:
    """The file, or None where nobody may write (``not_kept`` is told why): a dataset is no less good for that."""
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    path = folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    try:
        with exclusive(folder / ".lock", wait=True):  # two runs on one dataset write the same packs
            write_atomic(path, data)
    except UserError as error:
        not_kept(str(error))
        return None
    return path


def read_packs(folder: Path, wanted: Container[str]) -> dict[str, Tensor]:
    """Wanted tensors of every whole pack. A pack whose bytes are not what its name says is deleted, to be made again."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if sha256_file(path) != path.stem:
            path.unlink(missing_ok=True)
            continue
        found.update(read_pack(path, wanted))
    return found


def read_pack(path: Path, wanted: Container[str]) -> dict[str, Tensor]:
    """Its tensors, mapped: pages come from the file when they are used, and may leave memory again."""
    with safe_open(path, framework="pt") as pack:
        return {key: pack.get_tensor(key) for key in pack.keys() if key in wanted}  # noqa: SIM118 - not a dict
