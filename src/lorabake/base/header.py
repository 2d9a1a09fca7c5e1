"""The header of a safetensors file, read as something a stranger wrote.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header, and the raw bytes of the tensors.
Everything that costs memory is counted before it is parsed, and nothing of the payload is touched before the header has
been checked to describe it exactly. No torch here. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from lorabake.base.errors import UserError

LENGTH_BYTES = 8
METADATA = "__metadata__"
MAX_HEADER_BYTES = 32 << 20
"""The format allows 100 MB; the largest honest header we know of (tag counts of a huge dataset) is well below this."""
MAX_TENSORS = 32_768
MAX_METADATA = 16_384
MAX_DEPTH = 3
"""Header → tensor → shape. Nothing in the format is nested deeper."""
MAX_DIMENSIONS = 64
"""As torch."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
"""What weights are called that are none of this format."""

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element by the format's name of its type, in the format's order: tensors are stored last type first."""

_CUT_SHORT = "Copy or download it again."
_DAMAGED = "Save it again with the tool it came from, or get it again from where it was published."
_WEB_PAGE = ("it is a web page", "The download led to a page; download the file itself.")
_PICKLE = (
    "it is a pickle, which is not opened: loading one runs whatever code is in it",
    (
        'Get the same as .safetensors, or convert it with `python -c "import sys, torch, safetensors.torch as s; '
        "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); w = w.get('state_dict', w); "
        "s.save_file({k: v.clone().contiguous() for k, v in w.items() if hasattr(v, 'shape')}, sys.argv[2])\" OLD NEW.safetensors` "
        "(weights_only refuses code)."
    ),
)
_TELLTALES = {
    b"version ": ("it is a git-lfs pointer, a note of where the file is", "Fetch the file itself with `git lfs pull`."),
    b"<!doctyp": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"gguf": (
        "it is a GGUF file: quantised, too coarse to train on",
        "Get the model as .safetensors in fp16, bf16 or fp32.",
    ),
    b"pk\x03\x04": _PICKLE,
    **{bytes((0x80, protocol)): _PICKLE for protocol in range(2, 6)},
}
"""What other files begin with, in lower case; none of it is the length of a header."""


class TensorInfo(NamedTuple):
    """One tensor as the header describes it. ``offsets``: its first byte in the payload and the byte after its last."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    header_size: int
    """Bytes of JSON, without the eight bytes of its length."""

    @functools.cached_property
    def payload_sha256(self) -> str:
        """sha256 (hex) of everything after the header, read when first asked for. AutoV3 is its first 12 digits."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(LENGTH_BYTES + self.header_size)
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Read and check a file's header; the payload is not read.

    Raises:
        UserError: there is no such file, or it is not a well-formed safetensors file; the message says in what.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path} is not a file. Give the .safetensors file itself.")
        with path.open("rb") as file:
            raw, payload_size = _read_raw(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except _Refused as refusal:
        raise _refusal(path, refusal) from None
    try:
        metadata, tensors = _parse(raw)
        _check_payload(tensors, payload_size)
    except _Refused as refusal:
        raise _refusal(path, refusal) from None
    return Header(path, metadata, tensors, len(raw))


def render_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a file (length, header) for tensors ``(name, dtype, shape, bytes)`` in the payload's order.

    Metadata is sorted by key and the header padded with spaces to eight bytes, so equal content gives equal bytes.

    Raises:
        UserError: the header would be larger than we read ourselves, or some text in it cannot be stored.
    """
    content: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, dtype, shape, size in tensors:
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    try:
        header = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text {error.object[error.start - 20 : error.end + 20]!a} cannot be stored: it is not valid Unicode."
        ) from error
    header += b" " * (-len(header) % LENGTH_BYTES)
    try:
        _check_counts(header)
    except _Refused as refusal:
        raise UserError(f"This would make a file that cannot be read again: {refusal}. Shorten the metadata.") from None
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


class _Refused(ValueError):
    def __init__(self, reason: str, advice: str = _DAMAGED) -> None:
        super().__init__(reason)
        self.advice = advice


def _refusal(path: Path, refusal: _Refused) -> UserError:
    if path.suffix.lower() in PICKLES:
        refusal = _Refused(*_PICKLE)
    return UserError(f"{path} is not a usable safetensors file: {refusal}. {refusal.advice}")


def _quoted(text: str) -> str:
    """A name out of the file, safe to print on a terminal."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def _read_raw(file: BinaryIO) -> tuple[bytes, int]:
    """The header's bytes and the payload's size."""
    file_size = os.fstat(file.fileno()).st_size
    start = file.read(LENGTH_BYTES)
    if len(start) < LENGTH_BYTES:
        raise _Refused(f"it is only {file_size} bytes long", _CUT_SHORT)
    size = int.from_bytes(start, "little")
    if size > MAX_HEADER_BYTES:
        for telltale, (reason, advice) in _TELLTALES.items():
            if start.lower().startswith(telltale):
                raise _Refused(reason, advice)
        raise _Refused(f"its header claims {size:,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
    payload_size = file_size - LENGTH_BYTES - size
    if payload_size < 0:
        raise _Refused(f"it is cut short: its header has {size:,} bytes and the whole file {file_size:,}", _CUT_SHORT)
    return file.read(size), payload_size


def _check_counts(raw: bytes) -> None:
    """Count what parsing would build, in linear time and before building it."""
    if len(raw) > MAX_HEADER_BYTES:
        raise _Refused(f"its header has {len(raw):,} bytes, and at most {MAX_HEADER_BYTES:,} are read")
    # Without escapes every quote begins or ends a text, and every second piece between quotes lies outside all texts.
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * (5 * MAX_TENSORS + 2 * MAX_METADATA):
        raise _Refused(f"its header holds more texts than {MAX_TENSORS:,} tensors need")
    structure = b"".join(unescaped.split(b'"')[::2])
    if structure.count(b"{") > MAX_TENSORS + 2:
        raise _Refused(f"its header describes more than {MAX_TENSORS:,} tensors")
    if structure.count(b"[") > 2 * MAX_TENSORS or structure.count(b",") > 8 * MAX_TENSORS + MAX_METADATA:
        raise _Refused(f"its header holds longer lists than {MAX_TENSORS:,} tensors need")
    if any(structure.count(begin) != structure.count(end) for begin, end in (b"{}", b"[]")):
        raise _Refused("its header is not JSON (a bracket is missing)")
    depth = 0
    for character in structure.translate(None, delete=bytes(set(range(256)) - set(b"{}[]"))):
        depth += 1 if character in b"{[" else -1
        if depth > MAX_DEPTH:
            raise _Refused("its header is nested too deeply")


def _parse(raw: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    if not raw.startswith(b"{"):
        raise _Refused("its header is not JSON")
    _check_counts(raw)
    try:
        content = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_not_a_number,
            parse_constant=_not_a_number,
        )
    except UnicodeDecodeError:
        raise _Refused("its header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _Refused(f"its header is not JSON ({error.msg} at character {error.pos:,})") from None
    metadata = _metadata(content.pop(METADATA, {}))
    return metadata, {_text(name): _tensor_info(name, value) for name, value in content.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"its header holds {_quoted(double)} twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > 19:
        raise _Refused("its header holds a number too large to be a size")
    return int(digits)


def _not_a_number(text: str) -> NoReturn:
    raise _Refused(f"its header holds {_quoted(text)} where only whole numbers are allowed")


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused(f"its header holds {_quoted(text)}, which is not valid Unicode") from None
    return text


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _Refused("its metadata is not a table of texts")
    if len(value) > MAX_METADATA:
        raise _Refused(f"it has {len(value):,} metadata entries, and at most {MAX_METADATA:,} are read")
    return {_text(key): _text(text) for key, text in value.items()}


def _tensor_info(name: str, value: Any) -> TensorInfo:
    where = f"tensor {_quoted(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _Refused(f"{where} has the unknown dtype {_quoted(str(dtype))}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Refused(f"the shape of {where} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Refused(f"the data_offsets of {where} are not a first and a last byte")
    if math.prod(size for size in shape if size) >= 2**63:
        raise _Refused(f"the shape of {where} is too large")
    if math.prod(shape) * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise _Refused(f"{where} has {offsets[1] - offsets[0]:,} bytes, which does not fit {dtype} {shape}"[:200])
    return TensorInfo(dtype, tuple(shape), (offsets[0], offsets[1]))


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and size >= 0 for size in value
    )  # True is an int, but no size


def _check_payload(tensors: dict[str, TensorInfo], payload_size: int) -> None:
    """The tensors must cover the payload exactly: no hole to hide bytes in, no byte that two tensors share."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offsets):
        if info.offsets[0] != end:
            fault = "overlaps another tensor" if info.offsets[0] < end else "leaves a hole before it"
            raise _Refused(f"tensor {_quoted(name)} {fault} (it begins at byte {info.offsets[0]:,}, not {end:,})")
        end = info.offsets[1]
    if end > payload_size:
        raise _Refused(
            f"it is cut short: {end:,} bytes of weights are announced and {payload_size:,} are there", _CUT_SHORT
        )
    if end < payload_size:
        raise _Refused(f"it ends with {payload_size - end:,} bytes that belong to no tensor")
