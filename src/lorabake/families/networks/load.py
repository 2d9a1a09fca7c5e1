"""Networks filled from files: built without storage, then tensor by tensor in the wanted type, layout and place.

One copy of the weights in memory: what has to change is read through a buffer of one tensor, and what may stay as it is stays
pages of the file until something writes to them (which never reaches the file).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.families.networks.layouts import Rename, Target
from lorabake.families.networks.residence import settle
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.networks.weights import FLOATS, Entry, Weights

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 8
_SAMPLE = 1 << 16
_M = TypeVar("_M", bound=nn.Module)


def fill(
    build: Callable[[], _M],
    weights: Weights,
    rename: Rename,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> _M:
    """A network with the weights of files, frozen and in evaluation mode; within :func:`~.residence.late` they are read once they are needed.

    Args:
        build: makes the network; called with the meta device as default.
        weights: all of them must be the network's, or be ignored by ``rename``.
        rename: from their names to the network's.
        dtype: of the network's weights, whatever the files hold.
        device: where they go, tensor by tensor.

    Raises:
        Problems: names or shapes are not the network's, or numbers are not floating point; all of them are named.
        UserError: a file has changed since its header was read.
    """
    device = torch.device(device)
    with torch.device("meta"):
        network = build()
    wanted = network.state_dict()
    places = _matched(weights, rename, wanted)
    layout = memory_format(network, dtype, device)
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}

    def read() -> Iterator[tuple[str, Tensor]]:
        with _Files() as files:
            for name, sources in places.items():
                if sources[0].target.into is None:
                    yield name, files.read(*sources[0], shapes[name], dtype, device, layout)
                else:
                    yield name, files.joined(sources, shapes[name], dtype, device)

    network.requires_grad_(False).eval()
    files = {source.entry.file for sources in places.values() for source in sources}
    config = repr(getattr(network, "config", None))
    settle(network, read, files, dtype, lambda: fingerprint(weights, rename, config))
    return network


def memory_format(network: nn.Module, dtype: torch.dtype, device: torch.device) -> torch.memory_format:
    """How convolution weights lie fastest in memory, as measured on one AVX-512 core.

    Channels last on a CPU, where up-sampling a plain map takes 36 times as long (decoding: 22 against 28 ms, 15 against 21 in
    bfloat16; a U-Net step of SD1.5: 0.85 against 1.35 s at 64 px, 5.0 against 4.7 s at 256 px). Except for a bfloat16 U-Net
    (pocket model: 77 against 69 ms; SD1.5 at 64 px: 1.10 against 1.01 s).
    Plain on CUDA, where PyTorch's group norm gives plain maps whatever it gets, so that every norm would mean two copies.
    """
    if device.type != "cpu" or (dtype == torch.bfloat16 and isinstance(network, UNet2DConditionModel)):
        return torch.contiguous_format
    return torch.channels_last


def digest(weights: Weights, rename: Rename, extra: str = "") -> str:
    """sha256 (hex) of a network's weights as stored, under our names: equal in every file and layout that holds the same bytes.

    Args:
        weights, rename: as for :func:`fill`.
        extra: what else makes the difference.
    """
    found = sorted((target.name, target, entry) for name, entry in weights.items() for target in rename(name))
    total = hashlib.sha256(extra.encode())
    with _Files() as files:
        for name, target, entry in found:
            stored = files.stored(entry, target)
            shape = [
                size for size in stored.shape if size != 1
            ]  # 1×1 convolutions and linear layers hold the same bytes
            total.update(f"{name} {entry.dtype} {shape}\n".encode())
            total.update(stored.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(weights: Weights, rename: Rename, extra: str = "") -> str:
    """sha256 (hex) that tells networks apart without reading gigabytes: every tensor's name, type, shape, and bytes of its ends and middle.

    Args:
        weights, rename, extra: as for :func:`digest`.
    """
    found = sorted((target.name, target, entry) for name, entry in weights.items() for target in rename(name))
    total = hashlib.sha256(extra.encode())
    with _Files() as files:
        for name, target, entry in found:
            total.update(f"{name} {target[1:]} {entry.dtype} {entry.shape}\n".encode())
            for part in files.samples(entry):
                total.update(part)
    return total.hexdigest()


class _Source(NamedTuple):
    """What a tensor of the network, or some rows of it, is read from."""

    entry: Entry
    target: Target


def _matched(weights: Weights, rename: Rename, wanted: Mapping[str, Tensor]) -> dict[str, list[_Source]]:
    """Where each of the network's tensors is, after names, shapes and types have been compared."""
    places: dict[str, list[_Source]] = {}
    problems: list[Problem] = []
    for key, entry in weights.items():
        for target in rename(key):
            name, found = target.name, places.get(target.name, [])
            if name not in wanted:
                problems.append(Problem(entry.key, "is in the file, but not in the network."))
                continue
            if any(target.into is None or target.into == other.target.into for other in found):
                problems.append(Problem(entry.key, "is in the file twice under two names."))
                continue
            shape = _wanted_shape(wanted[name], target)
            places.setdefault(name, []).append(_Source(entry, target))
            given = _given_shape(entry, target)
            if _without_ones(given) != _without_ones(shape):
                problems.append(
                    Problem(entry.key, f"has shape {tuple(given)}; the network's sizes make it {tuple(shape)}.")
                )
            elif entry.dtype not in FLOATS:
                what = f"holds {entry.dtype} numbers; weights must be floating point (not quantised)."
                problems.append(Problem(entry.key, what))
    problems += [
        Problem(name, f"is missing in the file{' in part' if name in places else ''}.")
        for name, tensor in wanted.items()
        if not _is_whole(places.get(name, []), tensor)
    ]
    if problems:
        shown = problems[:_SHOWN] + [Problem("…", f"and {len(problems) - _SHOWN} more.")] * (len(problems) > _SHOWN)
        advice = (
            "The weights are of another model than the sizes they come with, or the file is not whole: fetch it again."
        )
        raise Problems(weights.subject, shown, advice)
    return places


def _is_whole(sources: Sequence[_Source], wanted: Tensor) -> bool:
    """Whether they are all rows of the network's tensor."""
    rows = [source.target.into or (0, len(wanted)) for source in sources]
    return sum(last - first for first, last in rows) == len(wanted)


def _wanted_shape(wanted: Tensor, target: Target) -> tuple[int, ...]:
    """Shape of the rows of ours that ``target`` tells."""
    if target.into is None:
        return tuple(wanted.shape)
    first, last = target.into
    return (last - first, *wanted.shape[1:])


def _given_shape(entry: Entry, target: Target) -> tuple[int, ...]:
    shape = entry.shape
    if target.rows is not None:
        first, last = target.rows
        shape = (max(0, min(last, shape[0] if shape else 0) - first), *shape[1:])
    return shape[::-1] if target.transposed else shape


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A 1×1 convolution may be stored as a linear layer, and the other way round."""
    return tuple(size for size in shape if size != 1)


class _Files:
    """Open files, by path, for reading tensors."""

    def __init__(self) -> None:
        self._mapped: dict[Path, Any] = {}
        self._open: dict[Path, Any] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._mapped.clear()

    def read(
        self,
        entry: Entry,
        target: Target,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format,
    ) -> Tensor:
        """One tensor of the network: pages of the file where it may stay as it is there, else a copy of its own."""
        form = layout if len(shape) == 4 else torch.contiguous_format
        as_stored = _DTYPES[entry.dtype] == dtype and device.type == "cpu" and not target.transposed
        if as_stored:
            mapped = _part(self._map(entry), target).reshape(shape)
            if mapped.is_contiguous(memory_format=form):
                return mapped
            del mapped  # no page of it has been touched
        stored = self.stored(entry, target).reshape(shape)
        return stored.to(device, dtype, memory_format=form, copy=True).contiguous(memory_format=form)

    def joined(
        self, sources: Sequence[_Source], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """One tensor of the network, of which the file's tensors are rows."""
        whole = torch.empty(shape, dtype=dtype, device=device)
        for entry, target in sources:
            assert target.into is not None, f"{target.name} was found to have parts"
            rows = whole[slice(*target.into)]
            rows.copy_(self.stored(entry, target).reshape(rows.shape))
        return whole

    def stored(self, entry: Entry, target: Target) -> Tensor:
        """A tensor in the file's type, there until the next one is read: one buffer serves all, because new memory costs more than reading.

        Mapped pages would count as memory beside what is made of them.
        """
        return _part(
            self._bytes(entry, entry.start, entry.stop).view(_DTYPES[entry.dtype]).reshape(entry.shape), target
        )

    def samples(self, entry: Entry) -> Iterator[Any]:
        """Bytes of a tensor: all of a small one, of a large one beginning, middle and end."""
        size = entry.stop - entry.start
        starts = [0, (size - _SAMPLE) // 2, size - _SAMPLE] if size > 3 * _SAMPLE else [0]
        for start in starts:
            stop = entry.stop if len(starts) == 1 else entry.start + start + _SAMPLE
            yield self._bytes(entry, entry.start + start, stop).numpy().data

    def _bytes(self, entry: Entry, start: int, stop: int) -> Tensor:
        if len(self._buffer) < stop - start:
            self._buffer = torch.empty(stop - start, dtype=torch.uint8)
        buffer = self._buffer[: stop - start]
        try:
            file = self._open.get(entry.file) or entry.file.open("rb", buffering=0)
            self._open[entry.file] = file
            file.seek(start)
            view, done = buffer.numpy().data, 0
            while done < len(view):  # one call reads at most 2 GiB
                if not (count := file.readinto(view[done:])):
                    raise OSError("it ends too early")
                done += count
        except OSError as error:
            raise UserError(
                f"{entry.file} cannot be read: {error}. It has changed since it was opened; start again."
            ) from error
        return buffer

    def _map(self, entry: Entry) -> Tensor:
        try:
            if entry.file not in self._mapped:
                self._mapped[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            return self._mapped[entry.file].get_tensor(entry.key)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{entry.file} cannot be read: {error}. It has changed since it was opened; start again."
            ) from error


def _part(tensor: Tensor, target: Target) -> Tensor:
    if target.rows is not None:
        tensor = tensor[slice(*target.rows)]
    return tensor.T if target.transposed else tensor
