"""The event log survives cuts."""

from __future__ import annotations

import errno
import json
import os
import zlib
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
    assert log.read() == EVENTS and log.damaged() == ([4] if junk.endswith(b"\n") else [])


def test_a_line_is_json_with_the_crc_of_what_is_before_it(tmp_path: Path, log: EventLog) -> None:
    for line, event in zip((tmp_path / "events.jsonl").read_bytes().splitlines(), EVENTS, strict=True):
        body, _, rest = line.partition(b', "crc32": ')
        assert json.loads(line) == {**event, "crc32": f"{zlib.crc32(body):08x}"} and len(rest) == len('"00000000"}')


def test_a_byte_that_is_not_what_it_was_is_noticed_wherever_it_is(tmp_path: Path, log: EventLog) -> None:
    """Told as a damaged line, or the events are exactly those that were written: also in the name of the first line's check."""
    events = [*EVENTS, {"kind": "note", "text": 'a "quoted" word'}, {"kind": "end", "losses": [0.5, 1e-9]}]
    log(events[3])
    log(events[4])
    path = tmp_path / "events.jsonl"
    data = path.read_bytes()
    for place, byte in enumerate(data):
        for wrong in {*(byte ^ 1 << bit for bit in range(8)), 0, *b'\n"}'} - {byte}:
            path.write_bytes(data[:place] + bytes([wrong]) + data[place + 1 :])
            found = log.read()
            if log.damaged():
                assert all(event in events for event in found) and len(found) >= len(events) - 2
            else:
                assert found == events and place == len(data) - 1, (
                    "only the last line's end, which cutting back puts back"
                )


def test_a_damaged_name_of_the_only_lines_check_is_noticed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log({"kind": "step"})
    data = (tmp_path / "events.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_bytes(data.replace(b"crc32", b"crc3r"))
    assert log.damaged() == [1] and log.read() == []


def test_the_end_of_the_last_line_is_put_back(tmp_path: Path, log: EventLog) -> None:
    path = tmp_path / "events.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x" + b'{"kind": "later"}\n')
    assert log.cut_back(len(data)) == 0 and path.read_bytes() == data
    log({"kind": "last"})
    assert log.read() == [*EVENTS, {"kind": "last"}] and not log.damaged()


def test_a_log_from_before_lines_had_a_check_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in EVENTS), encoding="utf-8")
    log = EventLog(path)
    assert log.read() == EVENTS and not log.damaged()
    log({"kind": "last"})
    assert log.read() == [*EVENTS, {"kind": "last"}] and not log.damaged()
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "step": 3}\n')
    assert log.damaged() == [5], "one without a check among those that have one"


def test_events_of_some_kinds(log: EventLog) -> None:
    log({"kind": "step"})
    assert log.read("checkpoint") == EVENTS[1:2] and log.read("step", "checkpoint") == [*EVENTS, {"kind": "step"}]
    assert log.read("ste") == []


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


def test_a_log_without_a_line_that_ends_there_keeps_its_whole_lines(tmp_path: Path, log: EventLog) -> None:
    """What a state knows of a log that was shortened, and has grown since, may end inside a line."""
    path = tmp_path / "events.jsonl"
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    assert log.cut_back(first + 9) == 9 and path.read_bytes() == data[:first]
    path.write_bytes(data[: first + 5])
    assert log.cut_back(len(data)) == len(data) - first and path.read_bytes() == data[:first]
    path.write_bytes(data[:3])
    assert log.cut_back(first) == first and path.read_bytes() == b""
    assert log.cut_back(0) == 0


def test_a_damaged_last_line_stays_where_it_is(tmp_path: Path, log: EventLog) -> None:
    path = tmp_path / "events.jsonl"
    data = path.read_bytes()
    spoiled = data[:-9] + b"?" + data[-8:]
    path.write_bytes(spoiled)
    assert log.cut_back(len(data)) == 0 and path.read_bytes() == spoiled


def test_deeply_nested_nonsense_is_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"[" * 200_000 + b"\n")
    assert EventLog(path).read() == [] and EventLog(path).damaged() == [1]
