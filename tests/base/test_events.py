"""The event log survives cuts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorabake.base.errors import UserError
from lorabake.base.events import EventLog, Events

EVENTS = [
    {"kind": "step", "step": 1, "loss": 0.1},
    {"kind": "checkpoint", "file": "すず.safetensors"},
    {"kind": "step", "step": 2},
]


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    log = EventLog(tmp_path / "events.jsonl")
    for event in EVENTS:
        log(dict(event))
    return log


def test_what_is_logged_is_read(log: EventLog) -> None:
    assert log.read() == EVENTS


def test_no_log_has_no_events(tmp_path: Path) -> None:
    assert EventLog(tmp_path / "none.jsonl").read() == []


def test_a_log_cut_at_every_byte_gives_its_whole_lines(tmp_path: Path, log: EventLog) -> None:
    data = (tmp_path / "events.jsonl").read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data)):
        (tmp_path / "events.jsonl").write_bytes(data[:length])
        assert log.read() == EVENTS[: sum(end <= length for end in ends)]


@pytest.mark.parametrize("junk", [b"\0" * 64, b"[1]\n", b'"text"\n', b"\xff\xfe\n", b"{'kind': 1}\n"])
def test_what_is_no_event_is_left_out(tmp_path: Path, log: EventLog, junk: bytes) -> None:
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(junk)
    assert log.read() == EVENTS


def test_a_disk_that_takes_a_part_at_a_time(tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    log({"kind": "last"})
    assert log.read() == [*EVENTS, {"kind": "last"}]


def test_a_full_disk_is_a_named_error(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"events\.jsonl could not be written: No space"):
        log({"kind": "last"})


def test_listeners_hear_everything_in_order() -> None:
    heard: list[tuple[str, str]] = []
    events = Events(lambda event: heard.append(("first", event["kind"])))
    events.listen(lambda event: heard.append(("second", event["kind"])))
    events.emit("a", x=1)
    events.emit("b")
    assert heard == [("first", "a"), ("second", "a"), ("first", "b"), ("second", "b")]
