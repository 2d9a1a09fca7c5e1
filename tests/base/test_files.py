"""Files are whole or absent, whatever fails on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import CorruptFile, UserError
from lorabake.base.files import PART, replacing, sha256_file, write_atomic, write_json

OLD, NEW = b"old " * 100, b"new " * 200


class Kill(BaseException):
    """Stands for the process being killed: nothing of ours catches it."""


class Faults:
    """Counts operations on the disk and fails the one that is chosen."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.fail_at: int | None = None
        self.error: BaseException = Kill()
        for name in ("replace", "fsync"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        patch.setattr(Path, "write_bytes", lambda path, data: self._torn_write(path, data))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._count(name)
            return real(*arguments, **options)

        return call

    def _torn_write(self, path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            self._count("write")
            return file.write(data[len(data) // 2 :])

    def _count(self, name: str) -> None:
        self.done.append(name)
        if self.fail_at == len(self.done):
            raise self.error


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


OPERATIONS = ["write", "fsync", "replace", "fsync"]


def test_what_is_done_and_in_which_order(tmp_path: Path, faults: Faults) -> None:
    write_atomic(tmp_path / "x", NEW)
    assert faults.done == OPERATIONS


@pytest.mark.parametrize("fail_at", range(1, len(OPERATIONS) + 1))
@pytest.mark.parametrize("before", [None, OLD])
def test_killed_at_every_operation(tmp_path: Path, faults: Faults, fail_at: int, before: bytes | None) -> None:
    path = tmp_path / "x"
    if before is not None:
        write_atomic(path, before)
    faults.done.clear()
    faults.fail_at = fail_at
    with pytest.raises(Kill):
        write_atomic(path, NEW)
    found = path.read_bytes() if path.exists() else None
    assert found == (NEW if fail_at > OPERATIONS.index("replace") + 1 else before)
    faults.fail_at = None
    assert write_atomic(path, NEW) == sha256_file(path)  # left-overs do not stand in the way
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_is_a_named_error_and_the_old_file_stays(
    tmp_path: Path, faults: Faults, fail_at: int, number: int
) -> None:
    path = tmp_path / "x"
    write_atomic(path, OLD)
    faults.done.clear()
    faults.fail_at, faults.error = fail_at, OSError(number, os.strerror(number))
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        write_atomic(path, NEW)
    assert "untouched" in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == OLD
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_flushed_is_told_apart(tmp_path: Path, faults: Faults) -> None:
    faults.fail_at, faults.error = 4, OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(UserError, match="does not confirm"):
        write_atomic(tmp_path / "x", NEW)
    assert (tmp_path / "x").read_bytes() == NEW


def test_file_systems_that_flush_no_folders_are_served(tmp_path: Path, faults: Faults) -> None:
    faults.fail_at, faults.error = 4, OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    write_atomic(tmp_path / "x", NEW)
    assert (tmp_path / "x").read_bytes() == NEW


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def flip(source: Path, target: Path) -> None:
        real(source, target)
        data = bytearray(target.read_bytes())
        data[7] ^= 1
        with target.open("wb") as file:
            file.write(data)

    monkeypatch.setattr(os, "replace", flip)
    with pytest.raises(CorruptFile, match="differs"):
        write_atomic(tmp_path / "x", NEW)


def test_an_error_inside_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(OLD)
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_bytes(NEW)
        raise ZeroDivisionError
    assert path.read_bytes() == OLD


def test_an_operating_system_error_inside_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written"), replacing(tmp_path / "x") as part:
        part.write_bytes(NEW)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_left_overs_are_named_as_such(tmp_path: Path) -> None:
    with replacing(tmp_path / "mira.safetensors") as part:
        assert part.name == "mira.safetensors" + PART
        part.write_bytes(NEW)


@pytest.fixture
def file_in_the_way(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "file").write_bytes(OLD)
    yield tmp_path / "file" / "x"


def test_a_folder_that_cannot_be_made(file_in_the_way: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        write_atomic(file_in_the_way, NEW)


def test_json_is_utf8_and_ends_with_a_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": "すず"})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "name": "すず"\n}\n'.encode()
