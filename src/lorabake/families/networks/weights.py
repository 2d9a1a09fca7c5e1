"""Named tensors over one or more safetensors files, known from their headers alone. No torch here, and no weight is read.

:func:`open_weights` says at once what a file is that cannot be used: a pickle, a download cut short, quantised weights
(``base.header`` reads what strangers wrote). ``load`` reads the tensors into networks; ``layouts`` knows their names, ``sizes`` what
their shapes say.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorabake.base.errors import UserError
from lorabake.base.header import LENGTH_BYTES, read_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of numbers, by the format's names, that weights are read from."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_SMALL_TYPES = ("F8_", "F6_", "F4")


class Entry(NamedTuple):
    """Where one tensor lies: ``start`` and ``stop`` are bytes of the file, ``key`` its name there."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Weights(Mapping[str, Entry]):
    """Tensors by name. A mapping, so ``name in weights``, ``len(weights)`` and iteration work."""

    files: tuple[Path, ...]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    """The files' free texts, those of the first file winning."""

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def subject(self) -> str:
        """The files, for messages."""
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that has to be there.

        Raises:
            UserError: it is not.
        """
        if name not in self.entries:
            raise UserError(f"{self.subject}: the tensor '{name}' is missing. The file is not whole: fetch it again.")
        return self.entries[name].shape

    def under(self, prefix: str) -> Weights:
        """The tensors whose names begin with ``prefix``, by the rest of their names."""
        found = {name[len(prefix) :]: entry for name, entry in self.entries.items() if name.startswith(prefix)}
        return Weights(self.files, found, self.metadata)

    def count(self, pattern: str) -> int:
        """How many of ``pattern`` with {} replaced by 0, 1, 2 … are there without a gap."""
        number = 0
        while pattern.format(number) in self.entries:
            number += 1
        return number


def open_weights(*paths: Path) -> Weights:
    """The tensors of one file, or of several that belong together (shards).

    Raises:
        UserError: a file is missing, is no safetensors file that can be read, holds 8-bit or 4-bit floats, or repeats a tensor of another.
    """
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        found, texts = _header(path)
        if double := sorted(entries.keys() & found.keys()):
            raise UserError(
                f"{path} holds '{double[0]}', which is in {entries[double[0]].file} too: they do not belong together."
            )
        entries.update(found)
        metadata = {**texts, **metadata}
    return Weights(paths, entries, metadata)


def shards(path: Path) -> tuple[Path, ...]:
    """All files of the set that the shard ``path`` is one of; a file that is no shard alone.

    Raises:
        UserError: some of them are missing.
    """
    if (match := SHARD.search(path.name)) is None:
        return (path,)
    stem, count = path.name[: match.start()], int(match[2])
    files = [path.with_name(f"{stem}-{number:05d}-of-{match[2]}.safetensors") for number in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{path} is one of {count} shards, and not all of them are there: {', '.join(missing[:4])} missing. Fetch the rest."
        )
    return tuple(files)


def numbers(entry: Entry) -> npt.NDArray[np.float64]:
    """The numbers of a small tensor of floats, flat."""
    import numpy as np

    with entry.file.open("rb") as file:
        file.seek(entry.start)
        data = file.read(entry.stop - entry.start)
    if entry.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[entry.dtype]).astype(np.float64)


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    header = read_header(path)
    first = LENGTH_BYTES + header.header_size
    entries: dict[str, Entry] = {}
    for key, (dtype, shape, (start, stop)) in header.tensors.items():
        if dtype.startswith(_SMALL_TYPES):
            raise UserError(
                f"{path} holds {dtype} numbers ('{key}'): too coarse to train on. Get the model in fp16, bf16 or fp32."
            )
        entries[key] = Entry(path, key, dtype, shape, first + start, first + stop)
    return entries, header.metadata
