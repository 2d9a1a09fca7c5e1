"""Work that nothing waits for until its result is asked for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")
_LEAST = 19
"""The priority of what runs only where nothing else wants to."""


def behind(work: Callable[[], _T]) -> Callable[[], _T]:
    """Begin ``work`` beside everything else, which it makes way for; returns what waits for its result, or raises what it raised.

    The thread ends with the process: a run that is stopped does not wait for it, as it would for one of a pool.
    """
    told: Future[_T] = Future()

    def do() -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST)
        try:
            told.set_result(work())
        except BaseException as error:
            told.set_exception(error)

    threading.Thread(target=do, name="behind", daemon=True).start()
    return told.result
