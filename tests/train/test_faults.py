"""Whatever fails on the disk, and whenever: what was saved is whole, the message says what happened, and the run ends in the same bytes.

A run's processes here count every operation on files that changes the disk (writing, flushing, renaming, deleting, making a folder) and
are killed at one of them, or have it refused by the system.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lorabake.base.events import Event, Events
from lorabake.recipe import check_values
from lorabake.train.run import train

Options = Callable[..., list[str]]

COUNTING = """
import builtins, errno, io, os, pathlib, signal
count, torn = [0], {torn}
def operation(name, path, half=lambda: None):
    if {where!r} in str(path):
        count[0] += 1
        if count[0] == {at}:
            half()
            {fault}
def counted(name, real):
    def call(path, *more, **options):
        operation(name, more[0] if name == "replace" else path)
        return real(path, *more, **options)
    return call
for name in ("replace", "unlink", "mkdir"):
    setattr(os, name, counted(name, getattr(os, name)))
fsync, write_bytes, os_write = os.fsync, pathlib.Path.write_bytes, os.write
def sync(descriptor):
    operation("fsync", os.readlink(f"/proc/self/fd/{{descriptor}}"))
    return fsync(descriptor)
def write(path, data):
    operation("write", path, lambda: write_bytes(path, data[:len(data) // 2]))
    return write_bytes(path, data)
def append(descriptor, data):
    operation("append", os.readlink(f"/proc/self/fd/{{descriptor}}"), lambda: os_write(descriptor, data[:len(data) // 2]))
    return os_write(descriptor, data)
os.fsync, pathlib.Path.write_bytes, os.write = sync, write, append
def told():
    with builtins.open({told!r}, "w") as file: file.write(str(count[0]))
import atexit
real_exit = os._exit
def leave(code):
    told()
    real_exit(code)
os._exit = leave
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def counting(run: Path, told: Path, at: int, fault: str) -> str:
    return COUNTING.format(torn=True, where=str(run), at=at, fault=fault, told=str(told))


def words_of(options: Options) -> list[str]:
    return options(
        train__length="3 steps",
        save__every="2 steps",
        save__keep=1,
        save__keep_state=True,
        sample__prompts=["1girl --s 1"],
    )


@pytest.fixture(scope="module")
def whole(
    oven: Any, drawings: Any, options: Options, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, int]:
    """A dataset, a run on it that nothing interrupted, and how many operations it took."""
    from lorabake.sampling.infotext import save_png

    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not say which file a descriptor is")
    folder = tmp_path_factory.mktemp("faults")
    for index, (image, caption) in enumerate(drawings):
        save_png(image, folder / "mira" / "1_mira" / f"{index:03d}.png")
        (folder / "mira" / "1_mira" / f"{index:03d}.txt").write_text(caption)
    run, told = folder / "run", folder / "told"
    before = counting(run, told, 0, "pass")
    assert oven.run("train", folder / "mira", "--into", run, *words_of(options), before=before).code == 0
    return folder / "mira", run, int(told.read_text())


def check_whole_files(run: Path) -> None:
    """Everything under a final name can be read, whatever else lies about."""
    for path in run.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                file.get_tensor(name)


def everything(run: Path) -> dict[str, bytes]:
    """All files of a run but its lock."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


def differences(run: Path, expected: Path) -> list[str]:
    """What differs from a run that nothing interrupted; of states only the last counts."""
    ours, theirs = everything(run), everything(expected)
    last = max(name for name in theirs if name.startswith("state/"))
    names = {name for name in ours | theirs if not name.startswith("state/")} | {last}
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def sweep(total: int, stride: int, offset: int = 0) -> range:
    return range(1 + offset, total + 1, stride)


def test_there_is_something_to_sweep(whole: tuple[Path, Path, int]) -> None:
    assert 60 < whole[2] < 400


def killed_at(oven: Any, options: Options, whole: tuple[Path, Path, int], tmp_path: Path, at: int) -> None:
    dataset, expected, _ = whole
    run = tmp_path / f"run{at}"
    killed = oven.run(
        "train", dataset, "--into", run, *words_of(options), before=counting(run, tmp_path / "told", at, KILL)
    )
    assert killed.code == -signal.SIGKILL, at
    check_whole_files(run)
    done = oven.run("train", dataset, "--into", run, *words_of(options))
    assert done.code == 0, (at, done.err)
    assert differences(run, expected) == [], at
    shutil.rmtree(run)


def test_killed_at_some_operations(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    for at in sweep(whole[2], 29):
        killed_at(oven, options, whole, tmp_path, at)


@pytest.mark.slow
def test_killed_at_more_operations(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    for at in sweep(whole[2], 16, offset=3):
        killed_at(oven, options, whole, tmp_path, at)


def refused_at(
    oven: Any, options: Options, whole: tuple[Path, Path, int], tmp_path: Path, at: int, number: int
) -> None:
    dataset, expected, _ = whole
    run = tmp_path / f"run{at}"
    fault = f"raise OSError({number}, os.strerror({number}))"
    failed = oven.run(
        "train", dataset, "--into", run, *words_of(options), before=counting(run, tmp_path / "told", at, fault)
    )
    reason = os.strerror(number)
    assert failed.code in (0, 2, 3) and "Traceback" not in failed.err, (at, failed.err)
    if failed.code:
        assert reason in failed.err, (at, failed.err)
    check_whole_files(run)
    done = oven.run("train", dataset, "--into", run, *words_of(options))
    assert done.code == 0, (at, done.err)
    found = differences(run, expected)
    if "no sample pictures at step" in failed.err:  # the log has one event less, and the state knows its length
        found = [name for name in found if name.startswith(("checkpoints/", "recipe", "run.json"))]
    assert found == [], at
    shutil.rmtree(run)


def test_a_failing_disk_at_some_operations(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    for at in sweep(whole[2], 37, offset=5):
        refused_at(oven, options, whole, tmp_path, at, errno.EIO)


@pytest.mark.slow
def test_a_full_disk_at_many_operations(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    for at in sweep(whole[2], 16, offset=13):
        refused_at(oven, options, whole, tmp_path, at, errno.ENOSPC)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits on files")
def test_a_limit_of_the_system_in_mid_run(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    """The system's own refusal, without any of our hands in it: no file may grow beyond a size that the second state exceeds."""
    dataset, expected, _ = whole
    limit = """
import resource, signal
import lorabake.train.run as m
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = m._Session._after_step
def after(self, step):
    if step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return real(self, step)
m._Session._after_step = after
"""
    run = tmp_path / "run"
    failed = oven.run("train", dataset, "--into", run, *words_of(options), before=limit)
    assert failed.code == 3 and "File too large" in failed.err and "the same command continues" in failed.err, (
        failed.err
    )
    check_whole_files(run)
    assert not list(run.rglob("*.part"))
    assert oven.run("train", dataset, "--into", run, *words_of(options)).code == 0
    assert differences(run, expected) == []


LIMITS = {
    "the first of its networks": ("lorabake.train.checkpoint", "write_checkpoint", "unet/diffusion_pytorch_model.safetensors could not be written"),
    "what is copied": ("lorabake.families.networks.export", "_copy_others", "vae/diffusion_pytorch_model.safetensors could not be written"),
    "what is no file of ours": ("lorabake.train.run", "fingerprint", "Is a directory"),
}  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits on files")
@pytest.mark.parametrize("moment", LIMITS)
def test_a_limit_while_a_whole_model_is_saved(
    oven: Any, options: Options, dataset: Path, tmp_path: Path, moment: str
) -> None:
    where, name, told = LIMITS[moment]
    limit = f"""
import resource, signal
import lorabake.train.run, {where} as m
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
real = m.{name}
def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    if m.__name__ == "lorabake.train.run": open(arguments[0])
    return real(*arguments)
m.{name} = limited
if {name!r} == "write_checkpoint": lorabake.train.run.write_checkpoint = limited
"""
    words = [word for word in options(train__length="2 steps", adapter__name="full") if "adapter.rank" not in word]
    words = [word for word, after in zip(words, [*words[1:], ""], strict=True) if (word, after[:2]) != ("--set", "--")]
    run = tmp_path / "run"
    failed = oven.run("train", dataset, "--into", run, *words, before=limit)
    assert failed.code == 3 and told in failed.err and "Traceback" not in failed.err, failed.err
    assert moment.startswith("what is no") or "File too large" in failed.err
    assert "the same command continues" in failed.err and not list(run.rglob("*.part"))
    assert oven.run("train", dataset, "--into", run, *words).code == 0
    check_whole_files(run)


def test_a_read_only_dataset_trains(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    """Root may write anywhere, so the system's refusal is put on: nothing below the dataset can be made or opened for writing."""
    dataset, expected, _ = whole
    copy = tmp_path / "mira"
    shutil.copytree(dataset, copy, ignore=shutil.ignore_patterns(".lorabake"))
    sealed = f"""
import errno, os
def refusing(real, changes):
    def call(path, *more, **options):
        if str(path).startswith({str(copy)!r}) and changes(*more):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *more, **options)
    return call
os.mkdir = refusing(os.mkdir, lambda *more: True)
os.open = refusing(os.open, lambda flags, *more: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
"""
    done = oven.run("train", copy, "--into", tmp_path / "run", *words_of(options), before=sealed)
    assert done.code == 0 and "encoded pictures are kept for this run only" in done.err, done.err
    assert "Read-only file system" in done.err
    assert not (copy / ".lorabake").exists()
    ours, theirs = (run / "checkpoints" / "mira.safetensors" for run in (tmp_path / "run", expected))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_folder_that_is_taken_away(oven: Any, options: Options, whole: Any, tmp_path: Path) -> None:
    away = """
import shutil
import lorabake.train.run as m
real = m._Session._after_step
def after(self, step):
    if step == 2: shutil.rmtree(self._run.folder)
    return real(self, step)
m._Session._after_step = after
"""
    run = tmp_path / "run"
    done = oven.run("train", whole[0], "--into", run, *words_of(options), before=away)
    assert done.code == 3 and "it was moved or deleted" in done.err and "Traceback" not in done.err, done.err


@pytest.mark.parametrize("name", ["run.json", "recipe.toml", "pictures.json", "events.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_text_file_is_told_of_or_made_again(
    oven: Any, options: Options, whole: Any, tmp_path: Path, name: str, damage: str
) -> None:
    dataset, expected, _ = whole
    run = tmp_path / "run"
    shutil.copytree(expected, run)
    data = bytearray((run / name).read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0x55
    (run / name).write_bytes(data)
    done = oven.run("train", dataset, "--into", run, *words_of(options))
    assert done.code in (0, 2) and "Traceback" not in done.err, done.err
    if name == "run.json":
        assert done.code == 2 and str(run) in done.err, "whose run it is must be known"
    if (name, damage) == ("events.jsonl", "flipped"):
        assert "events.jsonl is damaged: line" in done.err
    if (name, damage) == ("events.jsonl", "cut"):
        assert done.code == 0 and "bytes that it had; training goes on without them" in done.err
    assert (run / "checkpoints" / "mira.safetensors").read_bytes() == (
        expected / "checkpoints" / "mira.safetensors"
    ).read_bytes()


def test_a_log_that_is_damaged_anywhere_is_told_of_and_leads_nowhere_else(dataset: Path, tmp_path: Path) -> None:
    """Flipped bytes all over the log of a run that was stopped: weights and files are those of the whole run, and nobody is left in the dark."""
    raw = {
        "model": {"base": str(dataset.with_name("base"))}, "data": {"folder": str(dataset)},
        "adapter": {"rank": 1}, "output": {"name": "mira"}, "save": {"every": "1 steps", "keep": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "5 steps", "ema": [0.9]},
    }  # fmt: skip
    checked = check_values(raw)
    expected, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(checked, expected, Events())
    done: list[Event] = []
    train(checked, stopped, Events(done.append), stop=lambda: sum(event["kind"] == "step" for event in done) == 3)
    whole, log = (expected / "events.jsonl").read_bytes(), (stopped / "events.jsonl").read_bytes()
    assert whole.startswith(log)
    rng = random.Random(3)
    for place in sorted([0, len(log) - 1, log.index(b"\n"), *rng.sample(range(len(log)), 7)]):
        run = tmp_path / f"flipped {place}"
        shutil.copytree(stopped, run)
        (run / "events.jsonl").write_bytes(log[:place] + bytes([log[place] ^ 1 << rng.randrange(8)]) + log[place + 1 :])
        told: list[Event] = []
        train(checked, run, Events(told.append))
        notes = [event["text"] for event in told if event["kind"] == "note" and "is damaged: line" in event["text"]]
        after = (run / "events.jsonl").read_bytes()
        assert notes or after == whole, f"byte {place}"
        assert notes or place == len(log) - 1 or place < log.index(b"\n")
        assert after[len(log) :] == whole[len(log) :], f"byte {place}"
        kept, left = ({path.name for path in (of / "checkpoints").iterdir()} for of in (expected, run))
        assert kept <= left, "what a damaged line told of may stay, and nothing goes that should stay"
        for name in kept:
            assert (run / "checkpoints" / name).read_bytes() == (expected / "checkpoints" / name).read_bytes()
