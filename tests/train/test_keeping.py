"""How many checkpoints stay, what is kept beside them, and that there is room for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.events import Event, EventLog, Events
from lorabake.base.runs import Run
from lorabake.train.keeping import drop_old, fingerprint

Options = Callable[..., list[str]]


def written(run: Run, *names: str) -> None:
    """Checkpoints as a run writes them and tells of them; a name without suffix is a folder."""
    log = EventLog(run.events)
    for step, name in enumerate(names, 1):
        path = run.checkpoints / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_bytes(name.encode() * 9)
        else:
            (path / "unet").mkdir(parents=True)
            (path / "unet" / "weights.safetensors").write_bytes(name.encode() * 9)
        log({"kind": "checkpoint", "step": step, "file": f"checkpoints/{name}", "digest": fingerprint(path)})


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_the_newest_stay_whatever_their_names_are(tmp_path: Path) -> None:
    run, told = Run(tmp_path), []
    written(run, "b-000001.safetensors", "a-step00000003.safetensors", "c-000002.safetensors", "b.safetensors")
    drop_old(run, None, Events(told.append))
    assert told == [] and len(names(run)) == 4
    drop_old(run, 2, Events(told.append))
    assert names(run) == ["b.safetensors", "c-000002.safetensors"]
    assert [(event["kind"], event["step"]) for event in told] == [("dropped", 1), ("dropped", 2)]
    drop_old(run, 2, Events(told.append))
    assert len(told) == 2 and len(names(run)) == 2


def test_whole_models_and_states_go_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    written(run, "mira-000001", "mira-000002", "mira")
    run.states.mkdir()
    for step in (1, 2, 3):
        (run.states / f"step{step:08d}-{'0' * 64}.safetensors").touch()
    drop_old(run, 1, Events())
    assert names(run) == ["mira"] and [path.name[:12] for path in run.states.iterdir()] == ["step00000003"]


def test_what_was_not_written_by_the_run_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    written(run, "a.safetensors", "b", "c.safetensors", "d.safetensors")
    (run.checkpoints / "a.safetensors").write_text("mine now")
    (run.checkpoints / "b" / "notes.txt").write_text("mine too")
    (run.checkpoints / "other.safetensors").write_text("never told of")
    drop_old(run, 1, Events())
    assert names(run) == ["a.safetensors", "b", "d.safetensors", "other.safetensors"]
    assert (run.checkpoints / "b" / "unet" / "weights.safetensors").exists()


def test_a_run_keeps_as_many_as_it_was_told(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    words = options(train__length="5 steps", save__every="1 steps", save__keep_state=True)
    done = oven.run("train", dataset, "--into", tmp_path / "all", *words)
    assert done.code == 0 and len(list((tmp_path / "all" / "states").iterdir())) == 5, done.err
    done = oven.run("train", dataset, "--into", tmp_path / "two", *words, "--set", "save.keep=2")
    assert done.code == 0 and done.err.count("deleted checkpoints/") == 3, done.err
    kept = {path.name: path.read_bytes() for path in (tmp_path / "two" / "checkpoints").iterdir()}
    assert sorted(kept) == ["mira-step00000004.safetensors", "mira.safetensors"]
    assert kept == {name: (tmp_path / "all" / "checkpoints" / name).read_bytes() for name in kept}
    assert sorted(path.name[:12] for path in (tmp_path / "two" / "states").iterdir()) == [
        "step00000004",
        "step00000005",
    ]
    events = [(tmp_path / name / "events.jsonl").read_bytes() for name in ("all", "two")]
    assert events[0] == events[1]


@pytest.mark.parametrize("moment", ["states", "drop", "finished"])
def test_killed_while_old_ones_are_dropped(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any, moment: str
) -> None:
    words = options(train__length="4 steps", save__every="1 steps", save__keep=1, save__keep_state=True)
    assert oven.run("train", dataset, "--into", tmp_path / "whole", *words).code == 0
    before = (
        {
            "states": "import lorabake.train.run as m; name = 'save_state'; when = lambda folder, *a: folder.name == 'state'",
            "drop": "import lorabake.train.run as m; name = 'drop_old'; when = lambda *a: True",
            "finished": "import lorabake.train.keeping as m; name = 'fingerprint'; when = lambda path: path.name == 'mira-000001.safetensors'",
        }[moment]
        + """
import os, signal
real = getattr(m, name)
def killing(*arguments, **options):
    if when(*arguments): os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(m, name, killing)
"""
    )
    assert oven.run("train", dataset, "--into", tmp_path / "cut", *words, before=before).code == -9
    assert oven.run("train", dataset, "--into", tmp_path / "cut", *words).code == 0
    assert result(tmp_path / "cut").differences(result(tmp_path / "whole")) == []
    assert len(list((tmp_path / "cut" / "states").iterdir())) == 1


def with_free(amount: int) -> str:
    return f"""
import collections, shutil
usage = collections.namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(10**12, 0, {amount})
"""


def needed(text: str) -> float:
    amount, unit = text.partition("needs about ")[2].split()[:2]
    return float(amount) * {"kB": 1e3, "MB": 1e6}[unit]


def test_a_run_that_cannot_fit_is_not_started(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    words = options(
        train__length="8 steps", save__every="1 steps", save__keep_state=True, sample__prompts=["1girl --s 1"]
    )
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=with_free(10_000))
    assert done.code == 2 and "8 checkpoints of" in done.err and "10 kB are free there" in done.err, done.err
    assert "save.keep" in done.err and "Nothing was started." in done.err
    assert not (tmp_path / "run" / "run.json").exists()
    one = oven.run(
        "train", dataset, "--into", tmp_path / "run", *words, "--set", "save.keep=1", before=with_free(10_000)
    )
    assert "2 checkpoints of" in one.err and needed(one.err) < needed(done.err) / 2


def test_where_it_is_tight_it_is_told(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    words = options(
        train__length="3 steps", save__every="1 steps", save__keep_state=True, sample__prompts=["1girl --s 1"], model__base="pocket"
    )  # fmt: skip
    full = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=with_free(20_000))
    enough = int(1.1 * needed(full.err))
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, "--json", before=with_free(enough))
    assert done.code == 0, done.err
    notes = [event["text"] for event in map(json.loads, done.out.splitlines()) if event["kind"] == "note"]
    assert len(notes) == 1 and "It is tight" in notes[0]
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert 0.6 * needed(full.err) < used < needed(full.err), "the estimate is near what is written, and not below it"


@pytest.mark.parametrize(
    "settings",
    [
        {"train__ema": [0.9, 0.99]},
        {"train__ema": [0.99], "save__keep_state": True},
    ],
)
def test_the_room_that_is_asked_for_is_near_what_is_written(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, settings: dict[str, Any]
) -> None:
    """Averages have files and a place in every state."""
    words = options(train__length="4 steps", save__every="1 steps", model__base="pocket", **settings)
    full = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=with_free(20_000))
    assert full.code == 2, full.err
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words)
    assert done.code == 0, done.err
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert 0.5 * needed(full.err) < used < needed(full.err), full.err


def test_steps_of_many_pictures_have_long_rows_in_the_log(
    oven: Any, dataset: Path, tmp_path: Path, options: Options
) -> None:
    (dataset / "1_mira").rename(dataset / "10_mira")
    words = options(train__length="3 steps", train__batch_size=6, train__gradient_accumulation=10, adapter__rank=1)
    asked = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=with_free(1000))
    told = asked.err.partition("the log of ")[2].split()
    assert oven.run("train", dataset, "--into", tmp_path / "run", *words).code == 0
    rows = [
        line
        for line in (tmp_path / "run" / "events.jsonl").read_bytes().splitlines()
        if line.startswith(b'{"kind": "step"')
    ]
    assert 0.6 < sum(map(len, rows)) / (float(told[0]) * 1e3) < 1, asked.err


def test_a_continued_run_needs_only_what_is_missing(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    words = options(train__length="6 steps", save__every="1 steps")
    asked = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=with_free(10_000))
    stop = "import lorabake.train.run as m; real = m.run_loop; m.run_loop = lambda b, s, e, after: real(b, s, e, lambda step: after(step) or step == 5)"
    assert oven.run("train", dataset, "--into", tmp_path / "run", *words, before=stop).code == 130
    again = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=with_free(10_000))
    assert again.code == 2 and "1 checkpoint of" in again.err and needed(again.err) < needed(asked.err) / 3


def test_latents_that_do_not_fit_are_kept_for_the_run_only(
    oven: Any, dataset: Path, tmp_path: Path, options: Options
) -> None:
    small = """
import lorabake.train.latents as m
m.free_space = lambda folder: 100
"""
    done = oven.run("train", dataset, "--into", tmp_path / "run", *options(train__length="2 steps"), before=small)
    assert done.code == 0 and "They need about" in done.err and "100 B are free" in done.err, done.err
    assert not list((dataset / ".lorabake").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "run")
    done = oven.run("train", dataset, "--into", tmp_path / "run", *options(train__length="2 steps"))
    assert done.code == 0 and list((dataset / ".lorabake").rglob("*.safetensors"))
    again = oven.run("train", dataset, "--into", tmp_path / "two", *options(train__length="2 steps"), before=small)
    assert again.code == 0 and "They need about" not in again.err, "what is in the cache already needs no room"


def test_events_of_a_checkpoint_hold_its_fingerprint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    written(run, "mira.safetensors")
    told: list[Event] = run.checkpoint_events()
    assert told[0]["digest"] == fingerprint(run.checkpoint_paths()[0])
