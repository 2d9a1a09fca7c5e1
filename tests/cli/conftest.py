"""The command line, in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorabake.cli import main
from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import save_png


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, parsed."""
        return json.loads(self.out)


@pytest.fixture
def lorabake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """Runs a command; an exception that is not turned into a message fails the test."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*argv: object) -> Said:
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def drawings() -> list[tuple[Any, str]]:
    """Three pictures with captions."""
    rng = random.Random(1)
    return [(drawing.image, ", ".join(drawing.tags)) for drawing in (draw(sample(rng), i, 64) for i in range(3))]


@pytest.fixture
def dataset(tmp_path: Path, drawings: list[tuple[Any, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the current folder."""
    monkeypatch.chdir(tmp_path)
    for index, (image, caption) in enumerate(drawings):
        path = tmp_path / "mira" / f"{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(caption)
    return tmp_path / "mira"


@pytest.fixture
def everything(tmp_path: Path) -> Callable[[], dict[str, bytes]]:
    """Every file and folder here, with its content: nothing may have changed."""

    def look() -> dict[str, bytes]:
        return {
            path.relative_to(tmp_path).as_posix(): path.read_bytes() if path.is_file() else b""
            for path in tmp_path.rglob("*")
        }

    return look
