"""Small datasets, and runs of the command line in processes that can be killed at any instant.

Starting Python and importing torch takes longer than a whole run here. So one process imports everything and then only forks:
each run still is a process of its own that goes through ``lorabake.cli.main``, and gets real signals.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import save_png

_OVEN = """
import importlib, json, os, pkgutil, signal, sys, traceback
import lorabake, lorabake.api, lorabake.cli, lorabake.families
import numpy.ctypeslib, PIL.Image, rich.progress, rich.table, tokenizers, torch._dynamo, torch.utils._device  # which torch imports as late as it can
PIL.Image.preinit()
from lorabake.base.cards import ROOMS, cards
families = ["families." + item.name for item in pkgutil.iter_modules(lorabake.families.__path__)]
for room in ("base", "dataset", "protocols", *families, "adapters", "objectives", "optimizers", "formats", "recipe", "sampling", "train", "cli"):
    package = importlib.import_module("lorabake." + room)
    for item in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(item.name)
for kind in ROOMS:
    cards(kind)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(job["cwd"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = 1
        try:
            exec(job["before"])
            code = lorabake.cli.main(job["argv"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(json.dumps(child), flush=True)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


class Oven:
    """Runs ``lorabake …`` in forked processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "COLUMNS": "1000"}  # messages in one line each
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OVEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *argv: str | Path, cwd: Path | None = None, before: str = "") -> int:
        """Start a command; returns its process id."""
        job = {"argv": list(map(str, argv)), "cwd": str(cwd or self._folder), "before": before,
               "out": str(self._folder / "out"), "err": str(self._folder / "err")}  # fmt: skip
        self._tell(job)
        return self._hear()

    def end(self) -> Done:
        """Wait for the command that was started."""
        code = self._hear()
        return Done(code, (self._folder / "out").read_text(), (self._folder / "err").read_text())

    def run(self, *argv: str | Path, cwd: Path | None = None, before: str = "") -> Done:
        """Run a command to its end."""
        self.start(*argv, cwd=cwd, before=before)
        return self.end()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, job: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> int:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the oven is broken: see what it wrote to standard error"
        return json.loads(line)


@pytest.fixture(scope="session")
def oven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oven]:
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    oven = Oven(tmp_path_factory.mktemp("oven"))
    yield oven
    oven.close()


@pytest.fixture(scope="session")
def drawings() -> list[tuple[Any, str]]:
    """Six pictures with their captions."""
    rng = random.Random(1)
    return [(drawing.image, ", ".join(drawing.tags)) for drawing in (draw(sample(rng), i, 64) for i in range(6))]


def write_dataset(folder: Path, drawings: list[tuple[Any, str]], repeats: int = 1) -> Path:
    """A folder of pictures and captions: ``2_mira/000.png`` …"""
    for index, (image, caption) in enumerate(drawings):
        path = folder / f"{repeats}_mira" / f"{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the pocket model's shape with random weights, which takes a third of its time a step: for all that does not depend
    on what a base has learned."""
    spec = importlib.util.spec_from_file_location("models", Path(__file__).parent / "every_family" / "conftest.py")
    assert spec and spec.loader
    models: Any = importlib.util.module_from_spec(spec)
    sys.modules["models"] = models  # its dataclasses look for it there
    spec.loader.exec_module(models)
    folder = tmp_path_factory.mktemp("tiny") / "base"
    models.write_unet(folder, block_out_channels=(16, 32), norm_num_groups=8, heads=(2, 2), transformer_depth=(1, 1),
                      attends_down=(True, False), attends_up=(True, False), cross_attention_dim=32)  # fmt: skip
    models.write_clip(folder)
    models.write_vae(folder, block_out_channels=(8, 8, 16))
    models.write_scheduler(folder, "DDIMScheduler", **models.BETAS, prediction_type="epsilon")
    return folder


@pytest.fixture
def dataset(tmp_path: Path, drawings: list[tuple[Any, str]], tiny: Path) -> Path:
    """A folder of pictures, and the tiny base beside it: ``mira`` and ``base``."""
    shutil.copytree(tiny, tmp_path / "base", copy_function=os.link)
    return write_dataset(tmp_path / "mira", drawings)


SMALL = {
    "adapter.rank": 2,
    "train.batch_size": 2,
    "train.device": "cpu",
    "save.state_every": 1e-3,
    "output.name": "mira",
}


@pytest.fixture(scope="session")
def options(tiny: Path) -> Callable[..., list[str]]:
    """``--set`` arguments of a small run on the tiny base; double underscores stand for dots."""

    def make(**settings: Any) -> list[str]:
        chosen = {
            **SMALL,
            "model.base": str(tiny),
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        return [word for name, value in chosen.items() for word in ("--set", f"{name}={json.dumps(value)}")]

    return make


@dataclass(frozen=True)
class Result:
    """Everything of a run folder that must not depend on how often it was interrupted."""

    files: dict[str, bytes]

    @classmethod
    def of(cls, folder: Path) -> Result:
        """Checkpoints, samples, events and the last state."""
        wanted = [path for name in ("checkpoints", "samples") for path in (folder / name).rglob("*") if path.is_file()]
        states = sorted((folder / "state").glob("*"))
        return cls(
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in [*wanted, folder / "events.jsonl", states[-1]]
            }
        )

    def differences(self, other: Result) -> list[str]:
        """Names of files that are not equal."""
        return sorted(
            name for name in self.files.keys() | other.files.keys() if self.files.get(name) != other.files.get(name)
        )


@pytest.fixture(scope="session")
def result() -> Callable[[Path], Result]:
    return Result.of


@pytest.fixture(scope="session")
def kill_at() -> Callable[..., bool]:
    """Sends a signal once a condition holds; False if the process ended before."""

    def kill(pid: int, condition: Callable[[], bool], number: int = signal.SIGKILL, patience: float = 60) -> bool:
        limit = time.monotonic() + patience
        while time.monotonic() < limit:
            if condition():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    return False
                return True
            time.sleep(0.002)
        raise AssertionError("the moment never came")

    return kill
