"""Work behind a run's back: begun at once, waited for where it is asked, and its errors told there."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from lorabake.train.behind import behind


def test_it_begins_at_once_and_is_waited_for_when_asked() -> None:
    go, began = threading.Event(), threading.Event()

    def work() -> str:
        began.set()
        assert go.wait(10)
        return "done"

    result = behind(work)
    assert began.wait(10), "nobody has asked yet"
    go.set()
    assert result() == result() == "done"


def test_what_it_raises_is_raised_where_it_is_asked() -> None:
    result = behind(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result()


def test_a_process_ends_without_it() -> None:
    code = "import time\nfrom lorabake.train.behind import behind\nbehind(lambda: time.sleep(60))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
