"""A run folder, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabake.base.errors import UserError
from lorabake.base.events import EventLog
from lorabake.base.files import write_json
from lorabake.base.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "mira")
    run.checkpoints.mkdir(parents=True)
    return run


def told(run: Run, *files: str) -> None:
    log = EventLog(run.events)
    for step, file in enumerate(files):
        log({"kind": "checkpoint", "step": step, "file": f"checkpoints/{file}"})


def test_checkpoints_come_in_the_order_they_were_made(run: Run) -> None:
    names = [
        "mira-2-step00000500.safetensors",
        "mira-2-000001.safetensors",
        "mira-2-step00001500.safetensors",
        "mira-2.safetensors",
    ]
    for name in sorted(names):
        (run.checkpoints / name).touch()
    told(run, *names)
    assert [path.name for path in run.checkpoint_paths()] == names


def test_only_what_was_told_of_and_is_there(run: Run) -> None:
    (run.checkpoints / "mira-000001").mkdir()
    (run.checkpoints / "mira-000003").mkdir()  # a folder that a crash left half written
    (run.checkpoints / "mira-000002.safetensors.part").touch()
    told(run, "mira-000001", "mira-000002.safetensors")
    assert [path.name for path in run.checkpoint_paths()] == ["mira-000001"]


def test_the_newest_are_counted_in_steps_that_have_several(run: Run) -> None:
    log = EventLog(run.events)
    for step in (1, 2, 3):
        for end in ("-ema0.9", ""):
            (run.checkpoints / f"{step}{end}").touch()
            log({"kind": "checkpoint", "step": step, "file": f"checkpoints/{step}{end}"})
    assert [path.name for path in run.checkpoint_paths(2)] == ["2-ema0.9", "2", "3-ema0.9", "3"]
    (run.checkpoints / "3").unlink()
    assert [path.name for path in run.checkpoint_paths(1)] == ["3-ema0.9"]
    assert len(run.checkpoint_paths(9)) == len(run.checkpoint_paths()) == 5


def test_the_lowest_held_out_loss_is_that_of_a_file_that_is_there(run: Run) -> None:
    log = EventLog(run.events)
    assert run.lowest_held_out() is None

    def asked(step: int, loss: float, **more: float) -> None:
        log({"kind": "validation", "step": step, "loss": loss, "change": loss - 1, **more})

    def saved(step: int, name: str, **more: float) -> None:
        (run.checkpoints / name).touch()
        log({"kind": "checkpoint", "step": step, "file": f"checkpoints/{name}", **more})

    asked(0, 0.01)
    saved(1, "1")
    asked(1, 0.5)
    asked(2, 0.1)  # nothing was saved there
    saved(3, "3-ema0.9", ema=0.9)
    saved(3, "3")
    asked(3, 0.3, ema=0.9)
    asked(3, 0.4)
    lowest = run.lowest_held_out()
    assert lowest is not None
    assert (lowest["file"], lowest["ema"], lowest["loss"], lowest["change"]) == ("checkpoints/3-ema0.9", 0.9, 0.3, -0.7)
    (run.checkpoints / "3-ema0.9").unlink()
    assert (run.lowest_held_out() or {})["file"] == "checkpoints/3"
    log({"kind": "sitting", "step": 3, "changes": {"train.length": [1, 2]}})
    assert (run.lowest_held_out() or {})["file"] == "checkpoints/3"
    log({"kind": "sitting", "step": 3, "changes": {"objective.loss": [1, 2]}})
    saved(4, "4")
    asked(4, 0.9)
    assert (run.lowest_held_out() or {})["file"] == "checkpoints/4", "others were asked in another way"


def test_finished_is_an_event(run: Run) -> None:
    assert not run.finished()
    EventLog(run.events)({"kind": "finished", "steps": 3})
    assert run.finished()


@pytest.mark.parametrize("content", [None, "{", "\0\0"])
def test_a_folder_without_a_manifest_is_no_run(run: Run, content: str | None) -> None:
    if content is not None:
        run.manifest.write_text(content)
    with pytest.raises(UserError, match="is not a run folder"):
        run.read_manifest()


def test_a_manifest_makes_a_run(run: Run) -> None:
    assert not run.exists()
    write_json(run.manifest, {"recipe": {}, "lock": {}})
    assert run.exists() and run.read_manifest() == {"recipe": {}, "lock": {}}


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"recipe": [], "lock": {}}', '{"recipe": {}}', "[" * 200_000])
def test_a_manifest_that_no_run_writes_is_none(run: Run, text: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.manifest.write_text(text)
    with pytest.raises(UserError, match=r"is not a run folder: run\.json"):
        run.read_manifest()
    run.pictures.write_text(text)
    assert run.read_pictures() == {} or "recipe" in text
