"""One writer per folder, and no lock outlives its holder."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lorabake.base import lock
from lorabake.base.errors import UserError
from lorabake.base.lock import exclusive

HOLDER = """
import sys, time
from pathlib import Path
from lorabake.base.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_by_name(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"in use by process {holder.pid}\."), exclusive(tmp_path / ".lock"):
        pytest.fail("the lock was given twice")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_holder_lets_go(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with exclusive(tmp_path / ".lock"):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_who_waits_gets_it_next(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    code = HOLDER.replace("sys.argv[1])", "sys.argv[1]), wait=True")
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    waiting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.5)
    assert waiting.stdout
    holder.communicate()
    assert waiting.stdout.readline() == "held\n"
    waiting.communicate()


def test_it_can_be_held_again(tmp_path: Path) -> None:
    for _ in range(2):
        with exclusive(tmp_path / "new" / ".lock"):
            pass


def test_a_file_in_the_place_of_the_folder_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"), exclusive(tmp_path / "file" / ".lock"):
        pytest.fail("there can be no lock")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_disk_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refused(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with exclusive(tmp_path / ".lock"):
        assert lock.holder(tmp_path / ".lock") is None, "what nobody can hold would show as running for ever"
    with exclusive(tmp_path / ".lock", wait=True):
        pass


def as_on_windows(monkeypatch: pytest.MonkeyPatch, answers: list[int | None]) -> ModuleType:
    """The module as Windows imports it; its locks answer with these error numbers, None being success."""

    def locking(descriptor: int, mode: str, count: int) -> None:
        if number := answers.pop(0):
            raise OSError(number, os.strerror(number))

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK="wait", LK_NBLCK="ask"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert lock.__spec__ and lock.__spec__.origin
    spec = importlib.util.spec_from_file_location("lock_on_windows", lock.__spec__.origin)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_windows_gives_up_waiting_after_ten_seconds_and_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [errno.EDEADLK, errno.EACCES, errno.EDEADLK, None]
    with as_on_windows(monkeypatch, answers).exclusive(tmp_path / ".lock", wait=True):
        assert answers == []


def test_windows_says_held_and_says_that_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = as_on_windows(monkeypatch, [errno.EACCES, errno.EINVAL])
    with pytest.raises(UserError, match="is in use by process unknown"), module.exclusive(tmp_path / ".lock"):
        pytest.fail("the lock was given twice")
    with module.exclusive(tmp_path / ".lock"):
        pass
