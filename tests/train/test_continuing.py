"""A run goes on with changed settings only if that is said, is told of in its log, and stays exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorabake.base.runs import Run
from lorabake.recipe import check_values
from lorabake.sampling.infotext import save_png
from lorabake.train.continuing import pictures_of

Options = Callable[..., list[str]]

DIE = """
import os, signal
import lorabake.train.run as m
real = m._Session._after_step
def after(self, step):
    stop = real(self, step)
    if step == {step}: os.kill(os.getpid(), signal.SIGKILL)
    return stop
m._Session._after_step = after
"""


def settings(options: Options, **more: Any) -> list[str]:
    return options(**{"save__every": "2 steps", "train__length": "4 steps", **more})


def events(run: Path) -> list[dict[str, Any]]:
    return Run(run).read_events()


def train(oven: Any, dataset: Path, into: Path, words: list[str], *more: str, before: str = "", code: int = 0) -> Any:
    done = oven.run("train", dataset, "--into", into, *words, *more, before=before)
    assert done.code == code and "Traceback" not in done.err, done.err
    return done


@pytest.fixture(scope="module")
def short(oven: Any, drawings: Any, options: Options, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of six pictures, and a finished run of four steps on it that keeps states."""
    from lorabake.sampling.infotext import save_png

    folder = tmp_path_factory.mktemp("short")
    for index, (image, caption) in enumerate(drawings):
        save_png(image, folder / "mira" / "1_mira" / f"{index:03d}.png")
        (folder / "mira" / "1_mira" / f"{index:03d}.txt").write_text(caption)
    train(oven, folder / "mira", folder / "run", settings(options, save__keep_state=True))
    return folder / "mira", folder / "run"


@pytest.fixture
def run(short: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(short[1], tmp_path / "run")
    return tmp_path / "run"


KEEP = {"save__keep_state": True}


def test_a_longer_run_has_to_be_said(oven: Any, short: Any, run: Path, options: Options, result: Any) -> None:
    before = result(run)
    done = train(oven, short[0], run, settings(options, train__length="8 steps", **KEEP), code=2)
    assert (
        "  train.length: 4 steps there, 8 steps now (the learning rate follows the schedule over the new length"
        in done.err
    )
    assert "--continue-changed" in done.err and "--into" in done.err
    assert result(run) == before
    done = train(oven, short[0], run, settings(options, train__length="8 steps", **KEEP), "--json", code=2)
    assert "--continue-changed" in json.loads(done.err)["message"]


def test_a_finished_run_goes_on(oven: Any, short: Any, run: Path, options: Options) -> None:
    old_final = (run / "checkpoints" / "mira.safetensors").read_bytes()
    longer = settings(options, train__length="8 steps", **KEEP)
    done = train(oven, short[0], run, longer, "--continue-changed")
    assert "at step 4 of 8" in done.err and "from step 4 on: train.length 8 steps (was 4 steps)" in done.err
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"mira{end}.safetensors" for end in ("-000002", "-step00000002", "-step00000004", "")]
    assert (run / "checkpoints" / "mira-step00000004.safetensors").read_bytes() == old_final
    told = events(run)
    assert [event["step"] for event in told if event["kind"] == "step"] == list(range(1, 9))
    (sitting,) = (event for event in told if event["kind"] == "sitting")
    assert sitting == {"kind": "sitting", "step": 4, "changes": {"train.length": ["4 steps", "8 steps"]}}
    assert json.loads((run / "run.json").read_text())["sittings"] == [{"step": 4, "changes": sitting["changes"]}]
    from lorabake.base.runs import Run

    assert [path.name for path in Run(run).checkpoint_paths()] == [
        "mira-step00000002.safetensors", "mira-step00000004.safetensors", "mira-000002.safetensors", "mira.safetensors",
    ]  # fmt: skip
    again = train(oven, short[0], run, longer)
    assert "already finished" in again.err


def test_with_a_constant_rate_a_longer_run_is_the_longer_run(
    oven: Any, short: Any, options: Options, tmp_path: Path
) -> None:
    words = {"schedule__name": "constant", "save__dtype": "fp32"}
    train(oven, short[0], tmp_path / "two", settings(options, **words))
    longer = settings(options, train__length="7 steps", **words)
    done = train(oven, short[0], tmp_path / "two", longer, code=2)
    assert "train.length: 4 steps there, 7 steps now\n" in done.err
    train(oven, short[0], tmp_path / "two", longer, "--continue-changed")
    train(oven, short[0], tmp_path / "one", longer)
    one, two = (load_file(tmp_path / name / "checkpoints" / "mira.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    losses = [
        [event["loss"] for event in events(tmp_path / name) if event["kind"] == "step"] for name in ("one", "two")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("warm_up", "means"), [("3 steps", ""), ("20 %", " (the learning rate follows the schedule over the new length from here on)")]
)  # fmt: skip
def test_a_constant_rate_depends_on_the_length_only_through_a_share_of_it(
    oven: Any, short: Any, options: Options, tmp_path: Path, warm_up: str, means: str
) -> None:
    words = {"schedule__name": "constant", "schedule__warmup": warm_up}
    train(oven, short[0], tmp_path / "run", settings(options, **words), before=DIE.format(step=2), code=-9)
    done = train(oven, short[0], tmp_path / "run", settings(options, train__length="7 steps", **words), code=2)
    assert f"train.length: 4 steps there, 7 steps now{means}\n" in done.err


def test_a_sitting_whose_line_is_damaged_is_not_told_again(oven: Any, short: Any, run: Path, options: Options) -> None:
    """run.json knows both; the log was told of both, and of a damaged line nobody can say again where it stood."""
    for more in ({"train__length": "5 steps"}, {"train__length": "6 steps"}):
        train(oven, short[0], run, settings(options, **more, **KEEP), "--continue-changed")
    log = run / "events.jsonl"
    first, second = (line for line in log.read_bytes().splitlines(keepends=True) if b'"sitting"' in line)
    log.write_bytes(log.read_bytes().replace(first, first.replace(b"5 steps", b"9 steps")))
    (run / "checkpoints" / "mira.safetensors").unlink()  # so that there is something to do again
    done = train(oven, short[0], run, settings(options, train__length="7 steps", **KEEP), "--continue-changed")
    assert "damaged" in done.err
    assert [event["changes"]["train.length"] for event in events(run) if event["kind"] == "sitting"] == [
        ["5 steps", "6 steps"], ["6 steps", "7 steps"],
    ]  # fmt: skip
    assert log.read_bytes().count(second) == 1


def test_the_last_checkpoint_of_before_is_dropped_like_any_other(
    oven: Any, short: Any, run: Path, options: Options
) -> None:
    longer = settings(options, train__length="8 steps", **KEEP)
    train(oven, short[0], run, longer, "--continue-changed", "--set", "save.keep=2")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "mira-000002.safetensors", "mira.safetensors",
    ]  # fmt: skip


CHANGED = {"train__length": "8 steps", "optimizer__lr": 1e-3, "schedule__name": "linear", **KEEP}


def test_changed_runs_are_exact_too(
    oven: Any, short: Any, run: Path, options: Options, result: Any, tmp_path: Path
) -> None:
    """Two changes one after the other; the second run is killed in the middle of each, and between its files."""
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    first, second = settings(options, **CHANGED), settings(options, **{**CHANGED, "optimizer__betas": [0.9, 0.99], "train__length": "10 steps"})  # fmt: skip
    for words in (first, second):
        train(oven, short[0], whole, words, "--continue-changed")

    train(oven, short[0], run, first, "--continue-changed", before=DIE_AFTER_MANIFEST, code=-9)
    train(oven, short[0], run, first, before=DIE.format(step=5), code=-9)
    train(oven, short[0], run, first, before=DIE.format(step=8), code=-9)
    train(oven, short[0], run, first)
    train(oven, short[0], run, second, "--continue-changed", before=DIE.format(step=9), code=-9)
    train(oven, short[0], run, second)
    assert result(run).differences(result(whole)) == []
    assert (run / "run.json").read_bytes() == (whole / "run.json").read_bytes()
    told = [(event["step"], sorted(event["changes"])) for event in events(run) if event["kind"] == "sitting"]
    assert told == [
        (4, ["optimizer.lr", "optimizer.text_encoder_lr", "schedule.name", "train.length"]),
        (8, ["optimizer.betas", "train.length"]),
    ]


DIE_AFTER_MANIFEST = """
import os, signal
import lorabake.train.run as m
real = m._write_run
def write(*arguments):
    real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
m._write_run = write
"""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"adapter__rank": 4}, "adapter.rank: 2 there, 4 now (the weights so far have other shapes)"),
        ({"adapter__conv_rank": 2}, "adapter.conv_rank: None there, 2 now (the weights so far have other shapes)"),
        ({"adapter__name": "full", "adapter__rank": None}, "adapter.name: lora there, full now (the weights so far are those"),
        ({"train__seed": 7}, "train.seed: 42 there, 7 now (an epoch would show some pictures twice"),
        ({"train__length": "3 steps"}, "train.length: 4 steps there, 3 steps now (4 steps are done already)"),
        ({"train__batch_size": 3}, "train.batch_size: 2 there, 3 now (an epoch would have 2 steps instead of 3)"),
        ({"optimizer__text_encoder_lr": 0.0}, "optimizer.text_encoder_lr: 0.00075 there, 0.0 now (its weights are in the run)"),
        ({"optimizer__lr": 1e-3}, "is finished: after 4 steps nothing is left to train"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_continued_with_is_refused(
    oven: Any, short: Any, run: Path, options: Options, result: Any, change: dict[str, Any], why: str
) -> None:
    before = result(run)
    words = settings(
        options, **{"train__length": "8 steps" if "optimizer__lr" not in change else "4 steps", **KEEP, **change}
    )
    if "adapter__name" in change:
        at = words.index("adapter.rank=null")
        del words[at - 1 : at + 1]
    done = train(oven, short[0], run, words, "--continue-changed", code=2)
    assert why in done.err, done.err
    assert result(run) == before


def test_another_version_is_refused_even_if_said(oven: Any, short: Any, run: Path, options: Options) -> None:
    manifest = json.loads((run / "run.json").read_text())
    manifest["lock"]["torch"] = "9.9"
    (run / "run.json").write_text(json.dumps(manifest))
    done = train(oven, short[0], run, settings(options, train__length="8 steps", **KEEP), "--continue-changed", code=2)
    assert "torch: 9.9 there" in done.err and "cannot go on with another torch." in done.err


def test_other_shapes_are_noticed_whatever_made_them(oven: Any, short: Any, run: Path, options: Options) -> None:
    manifest = json.loads((run / "run.json").read_text())
    manifest["weights"] = "0" * 32
    (run / "run.json").write_text(json.dumps(manifest))
    words = settings(options, train__length="8 steps", adapter__alpha=1.0, **KEEP)
    done = train(oven, short[0], run, words, "--continue-changed", code=2)
    assert "other names or shapes" in done.err and "adapter.alpha: None there, 1.0 now (what was" in done.err
    assert "learned so far gets another strength)" in done.err
    assert json.loads((run / "run.json").read_text()) == manifest


def test_corrected_captions_may_be_taken(oven: Any, short: Any, run: Path, options: Options, tmp_path: Path) -> None:
    changed = tmp_path / "mira"
    shutil.copytree(short[0], changed)
    (changed / "1_mira" / "000.txt").write_text("something else")
    longer = settings(options, train__length="8 steps", **KEEP)
    done = train(oven, changed, run, longer, code=2)
    assert "dataset: changed 1_mira/000.png (what was learned so far came of the old ones)" in done.err
    train(oven, changed, run, longer, "--continue-changed")
    (changed / "1_mira" / "new.png").write_bytes((changed / "1_mira" / "000.png").read_bytes())
    done = train(oven, changed, run, settings(options, train__length="9 steps", **KEEP), "--continue-changed", code=2)
    assert "dataset: new 1_mira/new.png (an epoch would" in done.err


def test_a_person_is_asked(oven: Any, short: Any, run: Path, options: Options, tmp_path: Path) -> None:
    def answering(answer: str) -> str:
        return f"""
import io, sys
class Terminal(io.StringIO):
    def isatty(self): return True
sys.stdin = Terminal({answer!r})
sys.stderr.isatty = lambda: True
"""

    longer = settings(options, train__length="6 steps", **KEEP)
    done = train(oven, short[0], run, longer, before=answering("n\n"), code=2)
    assert "Go on with the new ones?" in done.err and "--continue-changed" in done.err
    train(oven, short[0], run, longer, before=answering("y\n"))
    assert len([event for event in events(run) if event["kind"] == "step"]) == 6


# ---- going back


def test_a_new_run_begins_where_a_checkpoint_was(
    oven: Any, short: Any, options: Options, result: Any, tmp_path: Path
) -> None:
    """With nothing changed it ends in the same bytes as the run it came from."""
    dataset, old = short
    new = tmp_path / "new"
    chosen = old / "checkpoints" / "mira-step00000002.safetensors"
    words = settings(options, **KEEP)
    train(oven, dataset, new, words, "--from-state", str(chosen), before=DIE.format(step=3), code=-9)
    done = train(oven, dataset, new, words)
    assert "at step 3 of 4" in done.err
    assert (new / "checkpoints" / "mira.safetensors").read_bytes() == (
        old / "checkpoints" / "mira.safetensors"
    ).read_bytes()
    told = events(new)
    assert told[0]["kind"] == "sitting" and told[0]["step"] == 2 and told[0]["changes"] == {}
    assert told[1:] == events(old)[-len(told) + 1 :]
    assert (new / "checkpoints" / "mira-step00000002.safetensors").exists() is False


def test_going_back_with_other_settings(oven: Any, short: Any, options: Options, tmp_path: Path) -> None:
    dataset, old = short
    words = settings(options, optimizer__lr=1e-3, **KEEP)
    state = ["--from-state", str(old / "checkpoints" / "mira-step00000002.safetensors")]
    done = train(oven, dataset, tmp_path / "new", words, *state, code=2)
    assert "optimizer.lr: 0.0015 there, 0.001 now" in done.err
    train(oven, dataset, tmp_path / "new", words, *state, "--continue-changed")
    assert events(tmp_path / "new")[0]["changes"]["optimizer.lr"] == [0.0015, 0.001]
    again = train(oven, dataset, tmp_path / "new", words, *state)
    assert "already finished" in again.err
    other = train(oven, dataset, tmp_path / "new", words, "--from-state", str(old), code=2)
    assert "already holds a run that began elsewhere" in other.err


def test_what_the_new_run_began_from_is_needed_once(oven: Any, short: Any, options: Options, tmp_path: Path) -> None:
    dataset, old = short
    words, new = settings(options, **KEEP), tmp_path / "new"
    state = ["--from-state", str(next((old / "states").glob("step00000002-*")))]
    train(oven, dataset, new, words, *state, before=DIE_AFTER_MANIFEST, code=-9)
    for path in (new / "state").iterdir():
        path.unlink()
    done = train(oven, dataset, new, words, code=2)
    assert "is gone. Give it again with --from-state" in done.err
    train(oven, dataset, new, words, *state)
    assert (new / "checkpoints" / "mira.safetensors").read_bytes() == (
        old / "checkpoints" / "mira.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nowhere", "is no state to begin from"),
        ("recipe.toml", "is no state to begin from"),
        ("checkpoints/mira-step00000002.safetensors", "No state was kept for"),
        ("states/damaged", "is damaged"),
    ],
)
def test_what_is_no_state(
    oven: Any, short: Any, run: Path, options: Options, tmp_path: Path, given: str, told: str
) -> None:
    if "damaged" in given:
        path = min((run / "states").iterdir())
        data = bytearray(path.read_bytes())
        data[200] ^= 1
        path.write_bytes(data)
        given = f"states/{path.name}"
    if "checkpoints" in given:
        shutil.rmtree(run / "states")
        for path in (run / "state").glob("step00000002-*"):
            path.unlink()
    done = train(oven, short[0], tmp_path / "new", settings(options, **KEEP), "--from-state", str(run / given), code=2)
    assert told in done.err, done.err
    assert not (tmp_path / "new" / "run.json").exists()


def test_folders_of_pictures_may_be_renamed(drawings: Any, tmp_path: Path) -> None:
    """All names but those of a training folder alone begin with a folder's own; inside of folders they may repeat."""
    for name, index in (("one", 0), ("two", 1), ("kept", 2), ("more", 3), ("asked", 4)):
        save_png(drawings[index][0], tmp_path / name / "0.png")
        (tmp_path / name / "0.txt").write_text(drawings[index][1])

    def pictures(one: str, two: str, kept: str, more: str, asked: str) -> dict[str, str]:
        data = {
            "folder": [str(tmp_path / one), str(tmp_path / two)],
            "regularisation": [str(tmp_path / kept), str(tmp_path / more)],
        }
        return pictures_of(check_values({"data": data, "validation": {"folder": str(tmp_path / asked)}}))

    names = ["one", "two", "kept", "more", "asked"]
    was = pictures(*names)
    assert list(was) == [
        "0.png",
        "folder 2: 0.png",
        "regularisation: 0.png",
        "regularisation: folder 2: 0.png",
        "held out: 0.png",
    ]
    for name in names:
        (tmp_path / name).rename(tmp_path / f"new {name}")
    assert pictures(*(f"new {name}" for name in names)) == was
    assert pictures("new two", "new one", *(f"new {name}" for name in names[2:])) != was
    (tmp_path / "new one").rename(tmp_path / "3_one")
    assert pictures("3_one", *(f"new {name}" for name in names[1:]))["0.png"] != was["0.png"], "repeats are in the name"
