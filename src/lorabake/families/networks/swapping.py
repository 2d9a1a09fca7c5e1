"""Blocks of a frozen network that wait in main memory, for models that are larger than the card.

Two places on the card are shared by all of them: while one block is computed with, the next is copied to the other place. Which is next is
learned from what came next last time, forwards and backwards alike. The same numbers are multiplied, so results are the same.

Nothing may keep a block's weights from forward to backward, for their place will hold another's by then. So blocks that wait must be
recomputed in the backward pass (gradient checkpointing), where their turn comes once more, last one first. Drawing has no backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabake.families.networks.quantised import Stored
from lorabake.families.networks.residence import STORED, residence_of

PLACES = 2
"""Blocks on the card at any time, of those that wait."""
_PAGE = 4096
_ALIGNED = 256
"""Bytes: where a tensor begins in a block's memory, for the fastest loads."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A block that waits. Its views are what is put into its modules, for where its weights are: at home, or in one of the places."""

    modules: Sequence[nn.Module]
    home: Tensor
    """All its bytes, in main memory, one tensor after the other."""
    at_home: Sequence[_View]
    at_places: Sequence[Sequence[_View]] = ()


@dataclass(frozen=True, slots=True)
class _View:
    """A module's weight (``value``), and under which name in which of its tables it is kept."""

    table: MutableMapping[str, Any]
    name: str
    value: Any


class BlockSwap:
    """Brings blocks to the card when they are called, and the one after.

    Args:
        network: what they are blocks of, with a :class:`~.residence.Residence`; its weights may be there already, or be read later.
        blocks: those that wait, in the order in which they are called: modules that are used, and recomputed, together.
        device: the card. Any will do, the CPU too, where copies are just made.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[Sequence[nn.Module]], device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self._modules = [[module for top in block for module in top.modules()] for block in blocks]
        self._waiting: list[_Waiting] = []
        self._places: list[Tensor] = []
        self._held: list[int | None] = [None] * PLACES
        self._ready: list[Any] = [None] * PLACES
        self._left: list[Any] = [None] * PLACES
        self._turn: tuple[int | None, int | None] = None, None
        self._after: dict[tuple[int | None, int | None, bool], int] = {}
        self._unread = 0
        waits = {module for block in self._modules for module in block}
        residence = residence_of(network)
        assert residence is not None, "only networks that came from files are swapped"
        residence.then(lambda module, name: self._send_home(module, name) if module in waits else None)
        for module in waits:
            for name in [*module._parameters, *module._buffers]:
                self._send_home(module, name)
        for index, block in enumerate(blocks):
            for top in block:
                top.register_forward_pre_hook(lambda *_, index=index: self._fetch(index))
        if self._stream is not None:  # nothing may go while it is being copied
            weakref.finalize(self, self._stream.synchronize).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes that wait in main memory, once the weights are there."""
        self._settle()
        return sum(block.home.numel() for block in self._waiting)

    @property
    def on_card(self) -> int:
        """Bytes of the two places."""
        self._settle()
        return sum(place.numel() for place in self._places)

    @property
    def unread(self) -> int:
        """Bytes at home that the card cannot read by itself, because the system refused: while they are copied nothing is computed."""
        self._settle()
        return self._unread

    def _send_home(self, module: nn.Module, name: str) -> None:
        """A weight that has been read, away from the card; places and homes are made anew for what is read anew."""
        if self._waiting and self._stream is not None:
            self._stream.synchronize()
        self._waiting, self._places = [], []
        for view in _weights(module, name):
            view.table[view.name] = _mapped(view.value, lambda tensor: tensor.to("cpu"))

    def _settle(self) -> None:
        """Homes and places, once the weights are known."""
        if self._waiting:
            return
        self._waiting = [_at_home(modules) for modules in self._modules]
        if self._stream is not None:
            self._unread = sum(block.home.numel() for block in self._waiting if not _pin(block.home, self._device))
        largest = max(block.home.numel() for block in self._waiting)
        self._places = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(PLACES)]
        for block in self._waiting:
            block.at_places = [_laid_out(block.at_home, place) for place in self._places]
        self._held, self._left, self._turn = [None] * PLACES, [None] * PLACES, (None, None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for place in self._places:
                place.record_stream(self._stream)

    def _fetch(self, index: int) -> None:
        """The block's weights on the card, and the next one's on their way."""
        self._settle()
        _, current = self._turn
        if index == current:
            return
        self._after[self._moment()] = index
        if current is not None:
            self._leave(current)
        if index not in self._held:
            self._load(index, 0 if current is None else 1 - self._held.index(current))
        place = self._held.index(index)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready[place])
        _put(self._waiting[index].at_places[place])
        self._turn = current, index
        following = self._after.get(self._moment(), index + 1)
        if following < len(self._waiting) and following not in self._held:
            self._load(following, 1 - place)

    def _moment(self) -> tuple[int | None, int | None, bool]:
        """What tells which block is next: the last two, and whether a backward pass will follow, which turns round at the end."""
        return *self._turn, torch.is_grad_enabled()

    def _leave(self, index: int) -> None:
        _put(self._waiting[index].at_home)
        if self._stream is not None:  # what is computed until now may still need it
            self._left[self._held.index(index)] = torch.cuda.current_stream(self._device).record_event()

    def _load(self, index: int, place: int) -> None:
        home = self._waiting[index].home
        if self._stream is not None and self._left[place] is not None:
            self._stream.wait_event(self._left[place])
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else nullcontext():
            self._places[place][: home.numel()].copy_(home, non_blocking=True)
            self._held[place] = index
            self._ready[place] = self._stream.record_event() if self._stream else None


def evenly(blocks: int, count: int) -> list[int]:
    """``count`` of the indices below ``blocks``, spread: while one is copied, those between are computed. All of them if there are not so many."""
    count = min(blocks, count)
    return [(2 * index + 1) * blocks // (2 * count) for index in range(count)]


def _weights(module: nn.Module, name: str) -> Iterator[_View]:
    """What a module keeps under a name, in whatever form; nothing where it has none."""
    if name in module._parameters and isinstance(stored := module.__dict__.get(STORED), Stored) and name == "weight":
        yield _View(module.__dict__, STORED, stored)
        return
    for table in (module._parameters, module._buffers):
        if (tensor := table.get(name)) is not None and not tensor.is_meta:
            yield _View(table, name, tensor)


def _mapped(value: Any, to: Any) -> Any:
    """The value with other tensors in place of its own."""
    if isinstance(value, Stored):
        return replace(value, values=to(value.values), scale=to(value.scale))
    return nn.Parameter(to(value.data), requires_grad=False) if isinstance(value, nn.Parameter) else to(value)


def _tensors(value: Any) -> list[Tensor]:
    return [value.values, value.scale] if isinstance(value, Stored) else [value]


def _at_home(modules: Sequence[nn.Module]) -> _Waiting:
    """A block's weights as they are now, one after the other in memory of their own."""
    views = [
        view
        for module in modules
        for name in [*module._parameters, *module._buffers]
        for view in _weights(module, name)
    ]
    total = sum(_room(tensor) for view in views for tensor in _tensors(view.value))
    home = _pages(total)
    laid = _laid_out(views, home)
    for view, own in zip(views, laid, strict=True):
        for given, kept in zip(_tensors(view.value), _tensors(own.value), strict=True):
            kept.data.copy_(given.data)
    _put(laid)
    return _Waiting(modules, home, laid)


def _laid_out(views: Sequence[_View], memory: Tensor) -> list[_View]:
    """The same weights where they are, or will be, in ``memory``."""
    offset = 0

    def take(tensor: Tensor) -> Tensor:
        nonlocal offset
        start, offset = offset, offset + _room(tensor)
        flat = memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        return flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    return [replace(view, value=_mapped(view.value, take)) for view in views]


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _put(views: Sequence[_View]) -> None:
    for view in views:
        view.table[view.name] = view.value


def _pages(count: int) -> Tensor:
    """So many bytes of main memory, on pages that they share with nothing else."""
    memory = torch.empty(-(-count // _PAGE) * _PAGE + _PAGE, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % _PAGE :][:count]


def _pin(memory: Tensor, device: torch.device) -> bool:
    """Have the card read it by itself while something is computed; whether the system lets it, of which it may have a limit.

    PyTorch's own pinned memory is rounded up to powers of two.
    """
    runtime: Any = torch.cuda.cudart()
    start = memory.data_ptr()
    if int(runtime.cudaHostRegister(start, -(-memory.numel() // _PAGE) * _PAGE, 0)) == 0:
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, start).atexit = False
        return True
    with suppress(RuntimeError):  # the refusal is told once more by whatever is launched next
        torch.zeros(1, device=device)
    return False
