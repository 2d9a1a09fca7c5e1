"""Safetensors files: checked before they are read, and written to the same bytes for the same content.

The library's own writer stores metadata in another order in every process; our promise of equal files for equal runs
needs our own. The format is small: see :mod:`lorabake.base.header`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorabake.base.errors import CorruptFile, UserError
from lorabake.base.files import replacing, sha256_file
from lorabake.base.header import DTYPE_BITS, METADATA, Header, TensorInfo, read_header, render_header
from lorabake.base.lazy import lazy_module

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

__all__ = ["Header", "TensorInfo", "blocks", "read_header", "read_tensors", "write"]

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_STORAGE_ORDER = {name: index for index, name in enumerate(reversed(DTYPE_BITS))}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name, on the CPU, backed by the file's pages.

    Raises:
        UserError: the file is not a well-formed safetensors file, or holds a type of number that torch has not.
    """
    unreadable = {info.dtype for info in read_header(path).tensors.values()} - _TORCH_NAMES.keys()
    if unreadable:
        raise UserError(
            f"{path} holds {', '.join(sorted(unreadable))} numbers, which torch cannot read. "
            "Convert it to fp16, bf16 or fp32."
        )
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a file whole or not at all, read it back, and return its sha256 (hex). Equal content gives equal bytes.

    Raises:
        UserError: the folder cannot be written to, or the metadata is too large; what was at ``path`` is untouched.
        CorruptFile: the disk gave back other bytes than were written.
    """
    digest = hashlib.sha256()
    content = blocks(tensors, metadata)
    header = next(content)  # refuses too much metadata before anything is written
    with replacing(path) as part, part.open("wb") as file:
        for block in (header, *content):
            digest.update(block)
            file.write(block)
    if sha256_file(path) != digest.hexdigest():
        raise CorruptFile(f"{path}: what was read back differs from what was written. Check the disk.")
    return digest.hexdigest()


def blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its header with the length before it, then each tensor in the order the format stores them.

    Larger types come first, so that every tensor lies aligned; within a type the order is that of the names.
    """
    dtypes = {name: _dtype_name(name, tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (_STORAGE_ORDER[dtypes[name]], name))
    described = ((name, dtypes[name], tuple(tensors[name].shape), tensors[name].nbytes) for name in order)
    yield render_header(described, dict(metadata))
    for name in order:
        yield _bytes_of(tensors[name])


def _dtype_name(name: str, tensor: Tensor) -> str:
    assert name != METADATA, f"{METADATA} is where the format keeps metadata"
    return _names()[tensor.dtype]


def _names() -> dict[torch.dtype, str]:
    return {getattr(torch, attribute): name for name, attribute in _TORCH_NAMES.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    assert sys.byteorder == "little", "safetensors files are little-endian"
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
