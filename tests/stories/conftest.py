"""Stories run the command line as a user would: in a folder of their own, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def lorabake(tmp_path: Path) -> Shell:
    """``lorabake("train", "pictures")`` in a fresh folder; ``fails=True`` expects an exit code other than 0."""

    def run(*words: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "lorabake", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, (
            f"lorabake {' '.join(words)} ended with {done.returncode}:\n{done.stderr}"
        )
        assert "Traceback" not in done.stderr
        return done

    return run
