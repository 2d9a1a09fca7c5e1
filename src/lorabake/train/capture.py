"""A batch's loss and gradient, recorded once and then replayed: on a GPU a small batch is otherwise spent waiting for launches.

SD1.5 at 512 pixels, batch 1, is about 3,500 operations forward and backward, each launched by Python: several times as long as the
GPU needs to compute them. A CUDA graph launches all of them at once.

What is recorded is memory addresses and sizes. So there is one recording for every set of input shapes, with inputs of its own
that are overwritten before each replay, and gradients are added where they always are: in the groups' flat buffers. Recordings
share one pool of memory for everything in between, which is safe because they run one after the other and of what lies in the
pool only the loss is looked at, before the next one runs.

Randomness: PyTorch has a recording read the generator's seed and offset anew at every replay, in the numbers of a run without
recording. So layers' own dropout depends on the step's seed alone, whether its recording was made just now or long ago; what a
recording takes to be made is put back: gradients and generators.
"""

from __future__ import annotations

import functools
import gc
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabake.optimizers._flat import FlatGroup

Inputs = dict[str, Tensor]
"""What a batch's loss is computed from, by name."""
Step = Callable[[], Tensor]
"""Adds to the gradient; returns the loss, 0-d, without a history. The tensor it returns may be another call's too."""
Recorder = Callable[[Step], Step]
"""Makes of a step one that does the same with whatever the step's tensors hold by then. It may run the step to that end.
Raises RuntimeError where it cannot."""

_MOST = 16
"""Recordings kept: each holds some megabytes for its list of operations beside the pool they share."""
_WARM_UPS = 2
"""Runs before recording: libraries choose and allocate at the first that must not happen in between."""


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: Inputs
    """Where it reads from."""
    replay: Step


class Captured:
    """Computes loss and gradient of batches by recordings, where it can.

    Args:
        loss_of: loss of inputs on the device, 0-d: operations whose order depends on shapes alone.
        groups: what is trained; their gradients are added to.
        device: of the loss.
        record: how.
        told: told once why there will be no recordings in this run, should that turn out.
        around: entered for each pass forward and backward.
        scale: what the loss is multiplied by for its gradient, 0-d on the device; None is 1.
        most: recordings kept. Of more sets of shapes, those used least recently are computed without from then on.
    """

    def __init__(
        self,
        loss_of: Callable[[Inputs], Tensor],
        groups: Sequence[FlatGroup],
        device: torch.device,
        record: Recorder,
        told: Callable[[str], None] = lambda reason: None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        scale: Tensor | None = None,
        most: int = _MOST,
    ) -> None:
        self._scale = scale
        self._loss_of, self._groups, self._device = loss_of, groups, device
        self._record, self._told, self._around, self._most = record, told, around, most
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._given_up: set[Hashable] = set()
        self.obstacle: str | None = None
        """Why nothing is recorded any more; None as long as nothing stands in the way."""

    def __call__(self, inputs: Inputs, batches: int) -> Tensor:
        """Add a batch's share of a step's gradient; returns its share of the loss, 0-d, until the next call.

        Args:
            inputs: on the CPU; copied without waiting from pinned memory.
            batches: of the step; loss and gradient are divided by it.
        """
        key = (batches, *((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items())))
        recording = self._recording(key, inputs, batches)
        if recording is None:
            on_device = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
            return self._learn(on_device, batches)
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor, non_blocking=True)
        return recording.replay()

    def _learn(self, inputs: Inputs, batches: int) -> Tensor:
        with self._around():
            loss = self._loss_of(inputs) / batches
            loss.backward(self._scale)
        return loss.detach()

    def _recording(self, key: Hashable, inputs: Inputs, batches: int) -> _Recording | None:
        """The recording for these shapes, made if it can be; None if it cannot."""
        if self.obstacle is None and key not in self._recordings and key not in self._given_up:
            own = {name: torch.empty_like(tensor, device=self._device).copy_(tensor) for name, tensor in inputs.items()}
            try:
                with self._undone():
                    replay = self._record(functools.partial(self._learn, own, batches))
            except RuntimeError as error:  # CUDA's and the allocator's own errors among them
                self._stop(_cause(error))
            else:
                self._recordings[key] = _Recording(own, replay)
                if len(self._recordings) > self._most:
                    self._given_up.add(self._recordings.popitem(last=False)[0])
        if key in self._recordings:
            self._recordings.move_to_end(key)
        return self._recordings.get(key)

    def _stop(self, reason: str) -> None:
        self.obstacle = reason
        self._recordings.clear()  # and the memory they hold
        self._told(reason)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Gradients and generators afterwards as they were before."""
        gradients = [group.gradient.clone() for group in self._groups]
        state = torch.default_generator.get_state()
        gpu_state = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        try:
            yield
        finally:
            for group, gradient in zip(self._groups, gradients, strict=True):
                group.gradient.copy_(gradient)
            torch.default_generator.set_state(state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state, self._device)


class CudaGraphs:
    """Records steps as CUDA graphs; see :data:`Recorder`.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run ``step`` a few times, then record it.

        Raises:
            RuntimeError: it does what cannot be recorded.
        """
        gc.collect()  # what is left of earlier steps in cycles would tie the parameters to another stream
        torch.cuda.synchronize(self._device)  # a recording that is dropped afterwards must not be running
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream):  # left again even where `torch.cuda.graph` cannot, because it failed
                graph, loss = self._recorded(step)
        finally:  # what is put back now must not meet what still runs
            before.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay

    def _recorded(self, step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step, and where each replay leaves its loss."""
        if draws_on_cpu(step):
            raise RuntimeError(
                "random numbers are drawn on the CPU on the way (as module_dropout does), which would be the same in every step"
            )
        for _ in range(_WARM_UPS - 1):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = step()
        return graph, loss


def draws_on_cpu(step: Step) -> bool:
    """Whether a step, which is run, draws from PyTorch's or Python's global generator on the CPU: a recording would not."""
    before, state = torch.default_generator.get_state(), random.getstate()
    step()
    return random.getstate() != state or not torch.equal(torch.default_generator.get_state(), before)


def _cause(error: BaseException) -> str:
    """The first line of the first error: ending a failed recording fails as well, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]
