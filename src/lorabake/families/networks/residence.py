"""Networks whose weights leave memory while nobody needs them, and are read from their files again when somebody does.

A text encoder whose answers are kept and an autoencoder whose latents are kept would otherwise lie beside the denoiser for a whole run.
While a network rests, its weights are tensors of the right shape and type without storage. Calling it, or any module in it, wakes it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError

Read = Callable[[], Iterable[tuple[str, Tensor]]]
"""Tensors by name, one at a time, straight from the files."""
Store = Callable[[str, nn.Module, Tensor], bool]
"""Told of each weight as it arrives (name, the module it is of, the tensor); True where the module keeps it in another form."""
Then = Callable[[nn.Module, str], None]
"""Told of each weight once its module has it: the module, and its name there."""

_LATE: ContextVar[bool] = ContextVar("late", default=False)
STORED = "stored"
"""Where a module keeps a weight of its own that is stored in another form."""
_NAME = "residence"
"""Where a network keeps its own: what holds a network alive must not be held by a table."""


@contextmanager
def late() -> Iterator[None]:
    """Networks that are made within rest until they are needed: their files are checked now, and their weights read then."""
    token = _LATE.set(True)
    try:
        yield
    finally:
        _LATE.reset(token)


class Residence:
    """The weights of one network, in memory or not.

    Args:
        network: on the meta device.
        read: its weights.
        files: what they are read from; they must not change as long as the network lives.
        dtype: of its weights.
        identity: tells what the network is, weights and sizes; asked when it is needed.
    """

    def __init__(
        self, network: nn.Module, read: Read, files: Iterable[Path], dtype: torch.dtype, identity: Callable[[], str]
    ) -> None:
        self.identity = identity
        self._read, self._files = read, {file: _stamp(file) for file in files}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for path, module in network.named_modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None:
                        self._places[f"{path}.{name}" if path else name] = (module, name)
        self._modules = list(network.modules())
        self._hooks: list[Any] = []
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._then: Then | None = None
        self.rests = False
        self._leave(dtype)

    def wake(self) -> None:
        """Read the weights, if they are not there.

        Raises:
            UserError: a file has changed since it was first opened.
        """
        with self._lock:
            if not self.rests:
                return
            for file, stamp in self._files.items():
                if _stamp(file) != stamp:
                    raise UserError(f"{file} has changed since it was opened; start again.")
            for name, tensor in self._read():
                module, own = self._places[name]
                if self._store is None or not self._store(name, module, tensor):
                    _put(module, own, tensor)
                if self._then is not None:
                    self._then(module, own)
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self.rests = False

    def rest(self) -> bool:
        """Let the weights go, and say whether there were any. Trained ones would be lost, and stay."""
        with self._lock:
            if self.rests or any(_of(*place).requires_grad for place in self._places.values()):
                return False
            self._leave()
            return True

    def store(self, store: Store) -> None:
        """From the next time that weights are read, keep them in another form."""
        self._store = store

    def then(self, then: Then) -> None:
        """From the next time that weights are read, do something with each that has been."""
        self._then = then

    def _leave(self, dtype: torch.dtype | None = None) -> None:
        for module, name in self._places.values():
            _put(module, name, _of(module, name).detach().to("meta", dtype))
            module.__dict__.pop(STORED, None)
        self._hooks = [module.register_forward_pre_hook(lambda *_: self.wake()) for module in self._modules]
        self.rests = True


def settle(
    network: nn.Module, read: Read, files: Iterable[Path], dtype: torch.dtype, identity: Callable[[], str]
) -> None:
    """Give a network on the meta device its weights: now, or within :func:`late` once they are needed.

    The arguments are those of :class:`Residence`.

    Raises:
        UserError: as for :meth:`Residence.wake`.
    """
    residence = Residence(network, read, files, dtype, identity)
    network.__dict__[_NAME] = residence
    if not _LATE.get():
        residence.wake()


def inherit(network: nn.Module, part: nn.Module) -> None:
    """``network`` rests and wakes as ``part`` of it does, which is all of it that came from files."""
    network.__dict__[_NAME] = part.__dict__[_NAME]


def residence_of(network: nn.Module) -> Residence | None:
    """Of a network that came from files; None for others."""
    return network.__dict__.get(_NAME)


def resting(networks: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of those whose weights are not in memory."""
    found = {name: residence_of(network) for name, network in networks.items()}
    return frozenset(name for name, residence in found.items() if residence is not None and residence.rests)


def give_back(device: torch.device) -> None:
    """Hand memory that is free back to the system and the GPU: allocators keep what was once theirs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError, TypeError):  # other systems' C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _of(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name, module._buffers.get(name))
    assert tensor is not None, name
    return tensor


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _stamp(file: Path) -> tuple[int, int]:
    try:
        told = file.stat()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}. It has changed since it was opened; start again.") from error
    return told.st_size, told.st_mtime_ns
