"""Killed at any instant, the same command continues to the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorabake.base.runs import Run

Options = Callable[..., list[str]]

PROMPT = "1girl, smile --s 2 --d 3"
KINDS: dict[str, dict[str, Any]] = {
    "accumulation": {"train__gradient_accumulation": 2, "train__length": "7 steps", "save__every": "3 steps"},
    "everything random": {
        "train__length": "10 steps", "save__every": "3 steps", "data__flip": True, "data__captions__shuffle": True,
        "data__captions__tag_dropout": 0.2, "adapter__dropout": 0.1, "adapter__rank_dropout": 0.1, "adapter__module_dropout": 0.1,
        "schedule__warmup": 0.3, "sample__prompts": [PROMPT],
    },
    "an objective that learns, and noise of its own": {
        "train__length": "8 steps", "save__every": "3 steps", "objective__weighting": "learned", "objective__noise": "pyramid",
        "objective__input_perturbation": 0.1, "objective__loss": "huber", "objective__timesteps": "sigmoid",
        "objective__stratified": True,
    },
    "captions left to chance": {
        "train__length": "10 steps", "save__every": "3 steps", "data__captions__wildcards": True, "data__captions__token_warmup": 0.5,
        "data__captions__suffix": ", {red|blue} sky", "data__captions__caption_dropout_every_n_epochs": 2,
    },
    "fresh views": {
        "train__length": "8 steps", "save__every": "3 steps", "data__augment__brightness": 0.2, "data__augment__hue": 10,
        "data__augment__views": "fresh", "data__flip": True,
    },
    "cached text": {"train__length": "10 steps", "save__every": "1 epoch", "optimizer__text_encoder_lr": 0.0},
    "states at checkpoints only": {"train__length": "10 steps", "save__every": "3 steps", "save__state_every": 1e6},
    "a whole model": {"adapter__name": "full", "adapter__rank": None, "train__length": "6 steps", "save__every": "2 steps"},
    "convolutions, recomputed": {"adapter__conv_rank": 2, "train__gradient_checkpointing": True, "train__length": "7 steps"},
}  # fmt: skip


def steps_done(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_bytes().count(b'"kind": "step"') if events.exists() else 0


def arguments(options: Options, kind: str) -> list[str]:
    words = options(**KINDS[kind])
    pairs = list(zip(words[::2], words[1::2], strict=True))
    return [
        word
        for pair in pairs
        if not pair[1].endswith("=null") and not ("full" in " ".join(words) and "adapter.rank" in pair[1])
        for word in pair
    ]


def uninterrupted(oven: Any, dataset: Path, into: Path, words: list[str]) -> float:
    started = time.monotonic()
    done = oven.run("train", dataset, "--into", into, *words)
    assert done.code == 0, done.err
    return time.monotonic() - started


def interrupt(
    oven: Any, dataset: Path, into: Path, words: list[str], moments: list[Callable[[float], bool]], kill_at: Any
) -> int:
    """Start again and again, killing at each of the moments (told the seconds since the start), then run to the end."""
    kills = 0
    for moment in moments:
        pid = oven.start("train", dataset, "--into", into, *words)
        began = time.monotonic()
        kills += kill_at(pid, lambda now=moment, since=began: now(time.monotonic() - since) or finished(into))
        if oven.end().code == 0:
            break
    done = oven.run("train", dataset, "--into", into, *words)
    assert done.code == 0, done.err
    return kills


def after(delay: float) -> Callable[[float], bool]:
    """The moment so many seconds after the start."""
    return lambda passed: passed > delay


def finished(run: Path) -> bool:
    events = run / "events.jsonl"
    return events.exists() and b'"finished"' in events.read_bytes()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_six_kills(oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any, kill_at: Any) -> None:
    words = arguments(options, "accumulation")
    seconds = uninterrupted(oven, dataset, tmp_path / "whole", words)
    cut, rng = tmp_path / "cut", random.Random(5)

    moments = [
        after(rng.uniform(0, 0.3) * seconds),  # before or in the first step
        lambda passed: steps_done(cut) >= 1,
        lambda passed: (cut / "checkpoints").exists(),  # while the first checkpoint is written
        after(rng.uniform(0.2, 0.8) * seconds),
        lambda passed: (cut / "checkpoints" / "mira-000002.safetensors").exists() or steps_done(cut) >= 6,
        lambda passed: (cut / "checkpoints" / "mira.safetensors").exists(),  # between the last file and "finished"
    ]
    assert interrupt(oven, dataset, cut, words, moments, kill_at) >= 4
    assert result(cut).differences(result(tmp_path / "whole")) == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize(
    ("kind", "kills"), [(kind, 20 if kind == "everything random" else 4) for kind in KINDS if kind != "accumulation"]
)
def test_many_kills(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any, kill_at: Any, kind: str, kills: int
) -> None:
    words = arguments(options, kind)
    seconds = uninterrupted(oven, dataset, tmp_path / "whole", words)
    rng, cut = random.Random(kind), tmp_path / "cut"
    moments = [after(rng.uniform(0, seconds)) for _ in range(kills)]
    assert interrupt(oven, dataset, cut, words, moments, kill_at) >= 1
    assert result(cut).differences(result(tmp_path / "whole")) == []


@pytest.mark.slow
def test_a_real_command_line_is_killed_and_continues(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any, kill_at: Any
) -> None:
    """The same without the forking: ``python -m lorabake`` in processes of its own, to the bytes of a forked one."""
    import subprocess
    import sys

    words = options(train__length="8 steps")
    command = [sys.executable, "-m", "lorabake", "train", str(dataset), *words, "--into"]
    uninterrupted(oven, dataset, tmp_path / "whole", words)
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert kill_at(process.pid, lambda: steps_done(tmp_path / "cut") >= 3)
    assert process.wait() != 0
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert result(tmp_path / "cut").differences(result(tmp_path / "whole")) == []


def test_ctrl_c_stops_after_the_step_with_a_state(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any, kill_at: Any
) -> None:
    words = options(train__length="10 steps", save__state_every=1e6, save__every="100 steps")
    cut = tmp_path / "cut"
    pid = oven.start("train", dataset, "--into", cut, *words)
    assert kill_at(pid, lambda: steps_done(cut) >= 2, signal.SIGINT)
    stopped = oven.end()
    assert stopped.code == 130, stopped.err
    assert "The same command continues." in stopped.err and "Traceback" not in stopped.err
    (state,) = (cut / "state").iterdir()
    done = steps_done(cut)
    assert 2 <= done < 10 and state.name.startswith(f"step{done:08d}-")
    continued = oven.run("train", dataset, "--into", cut, *words)
    assert continued.code == 0 and f"Continuing {cut} at step {done} of 10." in continued.err
    uninterrupted(oven, dataset, tmp_path / "whole", words)
    assert result(cut).differences(result(tmp_path / "whole")) == []


@pytest.fixture(scope="module")
def finished_run(
    oven: Any, drawings: list, options: Options, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """A dataset, a whole run of six steps on it, and the words it was started with."""
    from lorabake.sampling.infotext import save_png

    folder = tmp_path_factory.mktemp("finished")
    for index, (image, caption) in enumerate(drawings):
        path = folder / "mira" / "1_mira" / f"{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(caption)
    words = options(train__length="6 steps", save__every="2 steps")
    done = oven.run("train", folder / "mira", "--into", folder / "run", *words)
    assert done.code == 0, done.err
    return folder / "mira", folder / "run", words


@pytest.fixture
def copies(finished_run: tuple[Path, Path, list[str]], tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """The same, to be spoiled."""
    dataset, run, words = finished_run
    shutil.copytree(run, tmp_path / "run")
    return dataset, tmp_path / "run", words


def unfinished(run: Path) -> None:
    """Take back what the last step left."""
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(line for line in lines if b'"finished"' not in line))


def flip_a_byte(path: Path, where: float = 0.6) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 16
    path.write_bytes(data)


def test_a_finished_run_is_left_alone(oven: Any, copies: Any) -> None:
    dataset, run, words = copies
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("where", [0.0, 0.01, 0.6, 0.999])
def test_a_damaged_state_falls_back_to_the_one_before(
    oven: Any, copies: Any, finished_run: Any, result: Any, where: float
) -> None:
    dataset, run, words = copies
    older, newest = sorted((run / "state").iterdir())
    unfinished(run)
    flip_a_byte(newest, where)
    (run / "checkpoints" / "mira.safetensors").unlink()
    done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 0, done.err
    step = int(older.name[4:12])
    assert f"at step {step} of 6" in done.err
    assert result(run).differences(result(finished_run[1])) == []


def test_with_every_state_damaged_it_starts_over(oven: Any, copies: Any, finished_run: Any, result: Any) -> None:
    dataset, run, words = copies
    unfinished(run)
    for path in (run / "state").iterdir():
        flip_a_byte(path)
    done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 0 and "Continuing" not in done.err
    assert "no whole state is left, so that training begins again" in done.err
    assert result(run).differences(result(finished_run[1])) == []


def test_states_beside_checkpoints_are_gone_back_to(
    oven: Any, copies: Any, finished_run: Any, result: Any, tmp_path: Path
) -> None:
    """Without a whole state of the usual ones, the newest of those that were kept is as good."""
    dataset, _, words = copies
    words = [*words, "--set", "save.keep_state=true"]
    for name in ("kept", "cut"):
        assert oven.run("train", dataset, "--into", tmp_path / name, *words).code == 0
    cut = tmp_path / "cut"
    unfinished(cut)
    shutil.rmtree(cut / "state")
    newest = max((cut / "states").iterdir())
    flip_a_byte(newest)
    done = oven.run("train", dataset, "--into", cut, *words)
    assert done.code == 0 and "at step 4 of 6" in done.err, done.err
    assert "the state of step 6 is damaged: training goes on from step 4" in done.err
    found = [name for name in result(cut).differences(result(tmp_path / "kept")) if newest.name not in name]
    assert found == []


def test_without_a_whole_state_other_settings_are_refused(oven: Any, copies: Any, result: Any) -> None:
    dataset, run, words = copies
    longer = [*words, "--set", "train.length=9 steps", "--continue-changed"]
    for path in (run / "state").iterdir():
        flip_a_byte(path)
    before = result(run)
    done = oven.run("train", dataset, "--into", run, *longer)
    assert done.code == 2 and "No whole state is left of" in done.err and "adapter.start_from" in done.err
    assert result(run) == before
    shutil.rmtree(run / "state")
    again = oven.run("train", dataset, "--into", run, *longer)
    assert (again.code, again.err) == (done.code, done.err)


def test_a_run_whose_manifest_is_gone_is_left_alone(oven: Any, copies: Any) -> None:
    dataset, run, words = copies
    (run / "run.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = oven.run("train", dataset, "--into", run, *words, "--set", "train.seed=7")
    assert done.code == 2 and "holds a run without its run.json" in done.err and "--into" in done.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_shortened_log_and_a_kill_before_the_next_state(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, kill_at: Any
) -> None:
    """What the log lacks is not counted on again: no step is told of twice, and no line is cut."""
    words = options(train__length="12 steps", save__every="6 steps", save__state_every=1e6)
    run = tmp_path / "run"
    pid = oven.start("train", dataset, "--into", run, *words)
    assert kill_at(pid, lambda: steps_done(run) >= 8)
    oven.end()
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9])
    pid = oven.start("train", dataset, "--into", run, *words)
    assert kill_at(pid, lambda: steps_done(run) >= 4)
    oven.end()
    done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 0 and "is damaged" not in done.err, done.err
    told = [event["step"] for event in Run(run).read_events("step")]
    assert told == sorted(set(told)) and told[-6:] == [7, 8, 9, 10, 11, 12]


def test_left_overs_of_a_crash_are_no_trouble(oven: Any, copies: Any, finished_run: Any, result: Any) -> None:
    dataset, run, words = copies
    unfinished(run)
    newest = max((run / "state").iterdir())
    newest.rename(newest.with_name(newest.name + ".part"))
    (run / "checkpoints" / "mira.safetensors").rename(run / "checkpoints" / "mira.safetensors.part")
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "st')
    done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 0, done.err
    assert [name for name in result(run).differences(result(finished_run[1])) if not name.endswith(".part")] == []


# ---- what is not the same run


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--set", "adapter.rank=4"], "adapter.rank: 2 there, 4 now"),
        (["--set", "optimizer.lr=0.001"], "optimizer.lr: 0.0015 there, 0.001 now"),
        (
            ["--set", 'schedule.name="linear"', "--set", "train.seed=7"],
            "schedule.name: cosine there, linear now\n  train.seed: 42 there, 7 now",
        ),
    ],
)
def test_another_recipe_is_refused_by_name(oven: Any, copies: Any, result: Any, change: list[str], named: str) -> None:
    dataset, run, words = copies
    unfinished(run)
    before = result(run)
    done = oven.run("train", dataset, "--into", run, *words, *change)
    assert done.code == 2 and "Traceback" not in done.err
    assert named in done.err and "holds another run" in done.err and "--into" in done.err
    assert result(run) == before


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("caption", "changed 1_mira/000.png"),
        ("pixels", "changed 1_mira/000.png"),
        ("one less", "gone 1_mira/000.png"),
        ("one more", "new 1_mira/new.png"),
        ("repeats", "new 2_mira/000.png, 2_mira/001.png, 2_mira/002.png, 2_mira/003.png, 2_mira/004.png and 1 more"),
    ],
)
def test_an_edited_dataset_is_refused_and_the_pictures_named(
    oven: Any, copies: Any, tmp_path: Path, edit: str, told: str
) -> None:
    dataset, run, words = copies
    changed = tmp_path / "mira"
    shutil.copytree(dataset, changed)
    folder = changed / "1_mira"
    if edit == "caption":
        (folder / "000.txt").write_text("something else")
    elif edit == "pixels":
        shutil.copy(folder / "001.png", folder / "000.png")
    elif edit == "one less":
        (folder / "000.png").unlink()
    elif edit == "one more":
        shutil.copy(folder / "000.png", folder / "new.png")
    else:
        folder.rename(changed / "2_mira")
    manifest = json.loads((run / "run.json").read_text())
    manifest["recipe"]["data"]["folder"] = str(changed)  # the same place
    (run / "run.json").write_text(json.dumps(manifest))
    done = oven.run("train", changed, "--into", run, *words)
    assert done.code == 2 and f"  dataset: {told}" in done.err
    assert " there, " not in done.err


def test_what_trains_nothing_may_change_on_the_way(oven: Any, copies: Any, result: Any, finished_run: Any) -> None:
    dataset, run, words = copies
    unfinished(run)
    max((run / "state").iterdir()).unlink()
    done = oven.run(
        "train",
        dataset,
        "--into",
        run,
        *words,
        "--set",
        'save.every="1 steps"',
        "--set",
        'sample.prompts=["sky --s 2"]',
    )
    assert done.code == 0, done.err
    final = Path("checkpoints", "mira.safetensors")
    assert load_file(run / final).keys() == load_file(finished_run[1] / final).keys()
    assert all(
        torch.equal(tensor, load_file(finished_run[1] / final)[name]) for name, tensor in load_file(run / final).items()
    )
    assert list((run / "samples").glob("step*.png"))
    assert 'prompts = ["sky --s 2"]' in (run / "recipe.toml").read_text()


def test_another_version_is_refused(oven: Any, copies: Any) -> None:
    dataset, run, words = copies
    manifest = json.loads((run / "run.json").read_text())
    manifest["lock"]["torch"] = "9.9"
    (run / "run.json").write_text(json.dumps(manifest))
    done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 2 and "torch: 9.9 there, " in done.err and "another version of PyTorch" in done.err


def test_a_second_process_in_one_folder_is_refused(oven: Any, copies: Any) -> None:
    from lorabake.base.lock import exclusive

    dataset, run, words = copies
    with exclusive(run / ".lock"):
        done = oven.run("train", dataset, "--into", run, *words)
    assert done.code == 2 and f"is in use by process {os.getpid()}." in done.err


def test_a_file_in_the_place_of_the_run_folder(oven: Any, finished_run: Any, tmp_path: Path) -> None:
    dataset, _, words = finished_run
    (tmp_path / "file").write_text("mine")
    done = oven.run("train", dataset, "--into", tmp_path / "file", *words)
    assert done.code == 2 and "Traceback" not in done.err
    assert (tmp_path / "file").read_text() == "mine"
