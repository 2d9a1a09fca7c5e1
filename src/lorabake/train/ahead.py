"""Pictures of the next step, read while this one is computed: where every step sees new views of them, nothing of them is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from lorabake.base.machine import cores
from lorabake.protocols.family import Model
from lorabake.train.latents import Pixels, View, fresh_latent, pixels_of
from lorabake.train.views import each_of

_MOST = 4
"""Pictures that are read at once: a large one takes some hundred megabytes meanwhile."""
_T = TypeVar("_T")
Row = tuple[int, int]
"""A sample and one of its views."""


class PicturesAhead:
    """Reads pictures, crops them and changes their colours, on other cores than those that train.

    What is made of a view is a function of the view alone, so that it does not matter when and where that happens: whoever asks for what
    was not begun gets it as well. An error is raised where the picture is asked for. Pictures of two steps are in memory at most.

    Args:
        views: of every sample.
    """

    def __init__(self, views: Sequence[Sequence[View]]) -> None:
        self._views = views
        self._pool: ThreadPoolExecutor | None = None
        self._now: dict[Row, Future[Pixels]] = {}
        self._next: dict[Row, Future[Pixels]] = {}

    def begin(self, rows: Iterable[Row]) -> None:
        """Begin what the step after the coming one asks for, whose own was begun by the last call; what is older is forgotten."""
        if self._pool is None:
            workers = max(1, min(_MOST, cores() - 1))
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
        pool = self._pool
        self._now, self._next = self._next, {row: pool.submit(self._read, row) for row in rows}

    def take(self, row: Row) -> Pixels:
        """The pixels of a view.

        Raises:
            UnreadableImage: the picture is gone or broken by now.
        """
        begun = self._now.pop(row, None) or self._next.pop(row, None)
        return begun.result() if begun else self._read(row)

    def stop(self) -> None:
        """Drop what was begun, without waiting for it."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._now, self._next = None, {}, {}

    def latents(self, model: Model) -> list[Sequence[Tensor]]:
        """The latents of each sample's views, each encoded when it is asked for."""

        def of(index: int, own: Sequence[View]) -> Sequence[Tensor]:
            return each_of(own, lambda at: fresh_latent(own[at], self.take((index, at)), model))

        return [of(*each) for each in enumerate(self._views)]

    def _read(self, row: Row) -> Pixels:
        index, at = row
        return pixels_of(self._views[index][at])


def announced(steps: Iterable[tuple[_T, Iterable[Row]]], pictures: PicturesAhead) -> Iterator[_T]:
    """Each of ``steps``, when the pictures of the one after it have been begun; each comes with the rows that it asks for."""
    begun: list[_T] = []
    for step, rows in steps:
        pictures.begin(rows)
        begun.append(step)
        if len(begun) > 1:
            yield begun.pop(0)
    pictures.begin(())
    yield from begun
