"""Progress for people: where nothing can move, lines."""

from __future__ import annotations

import pytest

from lorabake.cli import terminal


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    with terminal.TrainingProgress() as progress:
        progress({"kind": "started", "step": 10, "total_steps": 40, "folder": "runs/mira"})
        for step in (11, 12):
            progress({"kind": "step", "step": step, "epoch": 2, "loss": 0.5, "images": 4})
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    lines = told(capsys)
    assert lines[0] == "Continuing runs/mira at step 10 of 40."
    assert lines[1].startswith("epoch 2: 11 of 40  loss 0.5000") and lines[1].endswith("min left")
    assert lines[2].startswith("epoch 2: 12 of 40")


def test_but_not_one_for_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys) == ["Continuing runs/mira at step 10 of 40."]
