"""The benchmark for a GPU, as far as it runs without one."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
        assert spec and spec.loader
        module = sys.modules["benchmark_gpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.slow
def test_every_side_of_the_richer_case_is_measured(gpu: Any, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--cases", "SDXL 1024 px", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    sides = results["cases"]["SDXL 1024 px"]
    assert tuple(sides) == gpu.SIDES and not [row for row in sides.values() if "failed" in row], done.stderr
    assert all(row["images_per_second"] > 0 and row["first_step"] > 0 and not row["note"] for row in sides.values())
    assert results["device"]["tflops"] > 0 and results["device"]["work"]["SDXL 1024 px"] > 0
    assert all(side in done.stdout for side in gpu.SIDES)


def test_the_arithmetic_of_a_step_is_counted(gpu: Any) -> None:
    """Frozen layers cost as much backward, down to their input, as forward; the adapter and its gradient cost something on top."""
    found = gpu._measure_device(argparse.Namespace(device="cpu", tiny=True, cases=["SD1.5 512 px"]))
    case = gpu.CASES["SD1.5 512 px"]
    unet = gpu.our_unet(case.sizes(True), case.dtype(True), "meta")
    inputs = (
        torch.empty(1, 4, 8, 8, device="meta"),
        torch.empty(1, device="meta"),
        torch.empty(1, 77, 64, device="meta"),
    )
    with FlopCounterMode(display=False) as forward:
        unet(*inputs)
    assert 1.9 < found["work"]["SD1.5 512 px"] / (forward.get_total_flops() / 1e12) < 6


def test_a_side_that_takes_too_long_or_fails_is_told_and_left_out(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(device="cpu", tiny=True, cases=["SD1.5 512 px"], checkpointing="off")
    sides = {
        "ours captured": gpu._run(arguments, "SD1.5 512 px", "ours captured", 0.1),
        "ours eager": gpu._run(arguments, "SD1.5 512 px", "no such side", 60),
    }
    gpu._print_table("SD1.5 512 px", {"failed": "took longer than 1 s"}, sides)
    table = capsys.readouterr().out
    assert "took longer than 0 s" in table and "invalid choice" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("words", "told"), [([], "no CUDA device"), (["--device", "cpu"], "give --tiny")], ids=str)
def test_without_a_gpu_it_says_so(words: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
