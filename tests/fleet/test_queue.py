"""What a queue says of its jobs is what is so: nothing is believed that a dead process could have left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import pytest

from lorabake.base.errors import UserError
from lorabake.base.lock import exclusive, holder
from lorabake.base.places import queue_folder
from lorabake.fleet.queue import Job, Queue
from lorabake.fleet.runner import _Follower, event_of

RECIPE = {"data": {"folder": "/pictures/すず"}, "adapter": {"rank": 4}}


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue(tmp_path / "queue")


def add(queue: Queue, name: str = "mira") -> Any:
    return queue.add(name, f"/pictures/{name}", queue.folder.parent / "runs" / name, RECIPE)


def test_what_is_queued_is_read_back(queue: Queue) -> None:
    assert queue.jobs() == []
    jobs = [add(queue, name) for name in ("mira", "noor", "すず")]
    assert [job.id for job in jobs] == [1, 2, 3]
    again = Queue(queue.folder)
    assert again.jobs() == jobs and again.job(2) == jobs[1] and again.job(3).recipe == RECIPE
    assert {again.state(job) for job in jobs} == {"waiting"}
    with pytest.raises(UserError, match=r"no job 7 in .*Jobs there: 1, 2, 3\."):
        again.job(7)


def test_added_at_the_same_time_each_gets_its_number(queue: Queue) -> None:
    threads = [threading.Thread(target=add, args=(queue, f"job{index}")) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(job.id for job in queue.jobs()) == list(range(1, 17))
    assert len({job.name for job in queue.jobs()}) == 16


def test_numbers_are_not_used_again_while_a_log_is_there(queue: Queue) -> None:
    job = add(queue)
    queue.log(job).parent.mkdir()
    queue.log(job).touch()
    (queue.folder / "jobs" / "000001.json").unlink()
    assert add(queue).id == 2


def test_running_is_who_holds_the_lock(queue: Queue) -> None:
    job = add(queue)
    with exclusive(queue.job_lock(job)):
        begun = queue.begin(job)
        assert begun and queue.state(begun) == "running" and queue.process_of(job) == str(os.getpid())
        queue.ask_to_stop(job, "stop")
        assert queue.state(job) == "stopping"
    assert queue.state(begun) == "interrupted"
    queue.end(begun, "done")
    assert queue.state(queue.job(1)) == "done" and not queue.asked_to_stop(job)


HOLDER = """
import sys
from pathlib import Path
from lorabake.base.lock import exclusive
from lorabake.fleet.queue import Queue
queue = Queue(Path(sys.argv[1]))
with exclusive(queue.job_lock(queue.job(1)), wait=True):
    queue.begin(queue.job(1))
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_job_does_not_run(queue: Queue) -> None:
    job = add(queue)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(queue.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "begun\n"
    assert queue.state(queue.job(1)) == "running" and queue.process_of(job) == str(process.pid)
    with pytest.raises(UserError, match=f"is running .process {process.pid}"):
        queue.remove(job)
    process.kill()
    process.communicate()
    assert queue.state(queue.job(1)) == "interrupted" and queue.process_of(job) is None


def test_a_lock_file_of_long_ago_means_nothing(queue: Queue) -> None:
    job = add(queue)
    queue.job_lock(job).write_text(f"\0{os.getpid()}\n")  # even with the number of a process that lives
    assert holder(queue.job_lock(job)) is None and queue.state(job) == "waiting"


def test_cancel(queue: Queue) -> None:
    waiting, running, killed = (add(queue, name) for name in "abc")
    assert queue.cancel(waiting) == "cancelled" and queue.begin(waiting) is None
    with pytest.raises(UserError, match="ended already"):
        queue.cancel(queue.job(waiting.id))
    with exclusive(queue.job_lock(running)):
        queue.begin(running)
        assert queue.cancel(queue.job(running.id)) == "stopping"
        assert queue.asked_to_stop(running) == "cancel"
        queue.ask_to_stop(running, "stop")
        assert queue.asked_to_stop(running) == "cancel", "a start that is stopped does not take it back"
    with exclusive(queue.job_lock(killed)):
        queue.begin(killed)
        queue.cancel(queue.job(killed.id))
    assert queue.begin(queue.job(killed.id)) is None, "cancelled and then killed is still cancelled"
    assert queue.state(queue.job(killed.id)) == "cancelled"


def test_retry_and_remove(queue: Queue) -> None:
    job = add(queue)
    for state in ("failed", "cancelled"):
        queue.end(job, state, "the disk is full")
        assert queue.job(1).message == "the disk is full"
        queue.retry(queue.job(1))
        assert queue.state(queue.job(1)) == "waiting" and queue.job(1).message == ""
    with pytest.raises(UserError, match="Job 1 is waiting"):
        queue.retry(queue.job(1))
    queue.end(job, "done")
    with pytest.raises(UserError, match="Job 1 is done"):
        queue.retry(queue.job(1))
    queue.remove(job)
    assert queue.jobs() == [] and add(queue).id == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": 1}', "\0\0"])
def test_a_damaged_job_stands_in_nobodys_way(queue: Queue, content: str) -> None:
    jobs = [add(queue) for _ in range(2)]
    (queue.folder / "jobs" / "000001.json").write_text(content)
    found = queue.jobs()
    assert [queue.state(job) for job in found] == ["damaged", "waiting"] and found[1] == jobs[1]
    queue.remove(found[0])
    assert queue.jobs() == [jobs[1]]


def test_what_a_later_version_wrote_is_read(queue: Queue) -> None:
    add(queue)
    path = queue.folder / "jobs" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "priority": 9}))
    assert queue.job(1).name == "mira"


def test_progress_is_the_last_that_was_told(queue: Queue) -> None:
    job = add(queue)
    assert queue.progress(job) == {}
    queue.log(job).parent.mkdir()
    lines = [
        {"kind": "started", "step": 0, "total_steps": 9},
        {"kind": "step", "step": 1, "loss": 0.5},
        {"kind": "step", "step": 2, "loss": 0.25},
    ]
    queue.log(job).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert queue.progress(job) == {"step": 2, "total_steps": 9, "loss": 0.25}
    with queue.log(job).open("a") as log:
        log.write('{"kind": "step", "st')
    assert queue.progress(job)["total_steps"] == 9


def test_a_log_is_followed_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"kind": "old"}\n')
    follower = _Follower(path)
    assert follower.news() == []
    with path.open("ab", buffering=0) as log:
        log.write(b'{"kind": "step", "s')
        assert follower.news() == []
        log.write(b'tep": 1}\nTraceback!\n')
        assert follower.news() == [{"kind": "step", "step": 1}, {"kind": "said", "text": "Traceback!"}]
    assert event_of(b"[1]")["kind"] == "said" and event_of(b"\xff")["kind"] == "said"


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORABAKE_QUEUE", str(tmp_path / "mine"))
    assert queue_folder() == tmp_path / "mine"
    monkeypatch.delenv("LORABAKE_QUEUE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert queue_folder() == tmp_path / "lorabake" / "queue"


def test_how_a_job_ended_first_is_how_it_ended(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end between the question whether it runs and the answer."""
    job, asked = add(queue), Queue.ask_to_stop

    def and_it_ends(queue: Queue, job: Job, how: Literal["cancel", "stop"]) -> None:
        asked(queue, job, how)
        queue.end(job, "done")

    with exclusive(queue.job_lock(job)):
        begun = queue.begin(job)
    assert begun
    monkeypatch.setattr(Queue, "ask_to_stop", and_it_ends)
    assert queue.cancel(begun) == "done"
    queue.end(begun, "failed", "too late")
    assert queue.job(job.id).ended == "done" and queue.job(job.id).message == ""
