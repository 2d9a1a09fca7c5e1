"""A night's queue: good jobs, a bad one, kills and cancels; what is left is what was asked for."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorabake.pocket.world import draw, sample

if TYPE_CHECKING:
    from conftest import Shell

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")]

SMALL = [
    "--set",
    "adapter.rank=2",
    "--set",
    "train.device=cpu",
    "--set",
    "train.batch_size=2",
    "--set",
    "save.state_every=0.001",
]


@pytest.fixture(autouse=True)
def own_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABAKE_QUEUE", str(tmp_path / "queue"))
    for name in ("mira", "noor"):
        (tmp_path / name).mkdir()
        for index in range(4):
            drawing = draw(sample(random.Random(index)), index)
            drawing.image.save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text(", ".join([name, *drawing.tags]))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the queue beside the test."""
    started: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lorabake", "queue", "start", "--json"]
        out = (tmp_path / f"start{len(started)}.txt").open("w")
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def jobs(lorabake: Shell) -> dict[int, dict[str, Any]]:
    return {job["id"]: job for job in json.loads(lorabake("queue", "list", "--json").stdout)}


def steps(run: Path) -> int:
    path = run / "events.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.exists() else 0


def until(condition: Callable[[], bool], patience: float = 90) -> None:
    limit = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.01)


def test_one_bad_job_never_blocks_the_next(lorabake: Shell, tmp_path: Path) -> None:
    added = json.loads(lorabake("queue", "add", "mira", *SMALL, "--set", "train.length=3 steps", "--json").stdout)
    assert (added["id"], added["state"], added["into"]) == (1, "waiting", str(tmp_path / "runs" / "mira"))
    bad = lorabake("queue", "add", "mira", "--set", "adapter.rnak=2", fails=True)
    assert "Did you mean 'rank'?" in bad.stderr
    lorabake("queue", "add", "noor", *SMALL, "--into", "runs/bad")
    lorabake("queue", "add", "noor", *SMALL, "--set", "train.length=2 steps")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bad").write_text("a file where the run should be")
    done = lorabake("queue", "start", fails=True)
    assert done.returncode == 1 and "2 done, 1 failed" in done.stdout, done
    found = jobs(lorabake)
    assert [job["state"] for job in found.values()] == ["done", "failed", "done"]
    assert (found[1]["step"], found[1]["total_steps"]) == (3, 3) and "runs/bad" in found[2]["message"]
    assert (tmp_path / "runs" / "noor" / "checkpoints" / "noor.safetensors").exists()
    assert "saved checkpoints/mira.safetensors" in lorabake("queue", "log", "1").stdout
    assert "step 3  epoch 2" in lorabake("queue", "log", "1").stdout
    assert "cannot be written" in lorabake("queue", "log", "2").stdout
    assert [event["kind"] for event in json.loads(lorabake("queue", "log", "1", "--json").stdout)][-1] == "finished"
    (tmp_path / "runs" / "bad").unlink()
    lorabake("queue", "retry", "2")
    assert "1 done" in lorabake("queue", "start").stdout and jobs(lorabake)[2]["state"] == "done"
    assert "Nothing was to be done." in lorabake("queue", "start").stdout
    listed = lorabake("queue", "list").stdout.splitlines()
    assert len(listed) == 3 and listed[0].split()[:6] == ["1", "done", "3", "of", "3", "loss"]
    lorabake("queue", "remove", "1")
    assert list(jobs(lorabake)) == [2, 3]
    assert "There is no job 1" in lorabake("queue", "cancel", "1", fails=True).stderr


def test_killed_with_its_job_it_goes_on_to_the_same_bytes(lorabake: Shell, tmp_path: Path, start: Any) -> None:
    length = ["--set", "train.length=40 steps"]
    lorabake("train", "mira", *SMALL, *length, "--into", "whole")
    lorabake("queue", "add", "mira", *SMALL, *length)
    shutil.rmtree(tmp_path / "mira" / ".lorabake")
    run = tmp_path / "runs" / "mira"
    process = start()
    until(lambda: steps(run) >= 3)
    running = jobs(lorabake)[1]
    assert running["state"] == "running"
    twice = lorabake("queue", "start", fails=True)
    assert twice.returncode == 2 and f"is being run already, by process {process.pid}" in twice.stderr
    process.kill()
    os.kill(int(running["process"]), signal.SIGKILL)
    process.wait()
    until(lambda: jobs(lorabake)[1]["state"] == "interrupted", 20)
    assert "1 done" in lorabake("queue", "start").stdout
    final = Path("checkpoints", "mira.safetensors")
    assert (run / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    assert (run / "events.jsonl").read_bytes() == (tmp_path / "whole" / "events.jsonl").read_bytes()


def test_a_job_outlives_its_queue_and_is_found_by_the_next(lorabake: Shell, tmp_path: Path, start: Any) -> None:
    lorabake("queue", "add", "mira", *SMALL, "--set", "train.length=150 steps")
    process = start()
    until(lambda: steps(tmp_path / "runs" / "mira") >= 2)
    process.kill()
    process.wait()
    assert jobs(lorabake)[1]["state"] == "running"
    done = lorabake("queue", "start")
    assert "is still running" in done.stderr and "1 done" in done.stdout
    assert steps(tmp_path / "runs" / "mira") == 150


def test_a_job_that_dies_is_failed_and_the_next_begins(lorabake: Shell, tmp_path: Path, start: Any) -> None:
    lorabake("queue", "add", "mira", *SMALL, "--set", "train.length=2000 steps")
    lorabake("queue", "add", "noor", *SMALL, "--set", "train.length=2 steps")
    process = start()
    until(lambda: steps(tmp_path / "runs" / "mira") >= 2)
    os.kill(int(jobs(lorabake)[1]["process"]), signal.SIGKILL)
    assert process.wait(60) == 1
    found = jobs(lorabake)
    assert [job["state"] for job in found.values()] == ["failed", "done"]
    assert "killed by signal 9" in found[1]["message"] and "retry" in found[1]["message"]


def test_cancel_ends_within_a_step_and_saves(lorabake: Shell, tmp_path: Path, start: Any) -> None:
    lorabake("queue", "add", "mira", *SMALL, "--set", "train.length=2000 steps", "--set", "save.state_every=1000000")
    lorabake("queue", "add", "noor", *SMALL, "--set", "train.length=2 steps")
    run = tmp_path / "runs" / "mira"
    process = start()
    until(lambda: steps(run) >= 2)
    assert "ends after its step, with a save" in lorabake("queue", "cancel", "1").stdout
    assert process.wait(60) == 0
    found = jobs(lorabake)
    assert [job["state"] for job in found.values()] == ["cancelled", "done"]
    newest = max((run / "state").glob("step*.safetensors"))
    assert int(newest.name[4:12]) == steps(run) < 2000
    assert "2 of 2" in lorabake("queue", "list").stdout


def test_ctrl_c_saves_and_the_next_start_continues(lorabake: Shell, tmp_path: Path, start: Any) -> None:
    lorabake("queue", "add", "mira", *SMALL, "--set", "train.length=100 steps", "--set", "save.state_every=1000000")
    lorabake("queue", "add", "noor", *SMALL, "--set", "train.length=2 steps")
    run = tmp_path / "runs" / "mira"
    process = start()
    until(lambda: steps(run) >= 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert [job["state"] for job in jobs(lorabake).values()] == ["interrupted", "waiting"]
    done = steps(run)
    assert list((run / "state").glob(f"step{done:08d}-*")) and done < 100
    assert "2 done" in lorabake("queue", "start").stdout and steps(run) == 100


def test_a_second_ctrl_c_kills(lorabake: Shell, tmp_path: Path, start: Any) -> None:
    lorabake(
        "queue", "add", "mira", *SMALL, "--set", "train.length=2000 steps", "--set", 'sample.prompts=["1girl --s 1000"]'
    )
    process = start()
    until(lambda: jobs(lorabake)[1]["state"] == "running", 30)
    time.sleep(1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(20) == 130
    assert jobs(lorabake)[1]["state"] == "interrupted"
