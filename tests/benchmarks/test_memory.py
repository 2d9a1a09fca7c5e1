"""The benchmark of memory measures what it says."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.fixture(scope="module")
def memory() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_memory", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["benchmark_memory"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_option_saves_where_it_should(memory: Any, tmp_path: Path) -> None:
    memory.draw_pictures(tmp_path)

    def row(name: str) -> dict[str, float]:
        arguments = argparse.Namespace(row=name, data=tmp_path, base="pocket", batch=2, steps=1)
        return memory.measure(arguments)

    plain, recomputed = row("text encoder frozen (it is freed)"), row("train.gradient_checkpointing = true")
    small, trained = row("model.quantize = nf4"), row("text encoder trained (it stays)")
    assert plain["text"] == plain["vae"] == 0 < trained["text"]
    assert recomputed["activations"] < plain["activations"] / 5 and recomputed["denoiser"] == plain["denoiser"]
    assert small["denoiser"] < 0.8 * plain["denoiser"]
