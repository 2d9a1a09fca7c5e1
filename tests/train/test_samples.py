"""Samples show the file that is saved, when they are wanted, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lorabake
from lorabake.sampling.infotext import infotext_of

Options = Callable[..., list[str]]
PROMPTS = ["1girl, smile --s 3 --d 4", "night, forest --s 2 --d 5 --n smile --l 4"]


def run(oven: Any, dataset: Path, into: Path, words: list[str]) -> list[dict[str, Any]]:
    done = oven.run("train", dataset, "--into", into, *words, cwd=dataset.parent)
    assert done.code == 0, done.err
    return [json.loads(line) for line in (into / "events.jsonl").read_text().splitlines()]


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_sample_is_what_generate_draws_with_the_checkpoint(
    oven: Any, dataset: Path, tmp_path: Path, tiny: Path, options: Options, dtype: str
) -> None:
    words = options(train__length="4 steps", save__every="2 steps", save__dtype=dtype, optimizer__lr=0.02, sample__prompts=PROMPTS,
                    model__clip_skip=2, adapter__conv_rank=2, adapter__alpha=3.0, adapter__dropout=0.2)  # fmt: skip
    run(oven, dataset, tmp_path / "run", words)
    for step, name in ((2, "mira-step00000002"), (4, "mira")):
        file = tmp_path / "run" / "checkpoints" / f"{name}.safetensors"
        drawn = lorabake.generate(PROMPTS, base=tiny, loras=[file])
        samples = [tmp_path / "run" / "samples" / f"step{step:08d}_{index:02d}.png" for index in range(2)]
        assert [image.tobytes() for image in drawn] == [pixels(path) for path in samples]
        assert [image.info["parameters"] for image in drawn] == [
            Image.open(path).info["parameters"] for path in samples
        ]
    base = [image.tobytes() for image in lorabake.generate(PROMPTS, base=tiny, clip_skip=2)]
    assert base == [pixels(tmp_path / "run" / "samples" / f"step00000000_{index:02d}.png") for index in range(2)]
    assert base[0] != pixels(tmp_path / "run" / "samples" / "step00000004_00.png")


def test_between_checkpoints_they_show_what_would_be_saved(
    oven: Any, dataset: Path, tmp_path: Path, options: Options
) -> None:
    words = {"train__length": "5 steps", "optimizer__lr": 0.02, "sample__prompts": PROMPTS}
    told = run(oven, dataset, tmp_path / "often", options(**words, save__every="100 steps", sample__every="2 steps"))
    run(oven, dataset, tmp_path / "saved", options(**words, save__every="1 steps"))
    assert [event["step"] for event in told if event["kind"] == "samples"] == [0, 2, 4, 5]
    for path in (tmp_path / "often" / "samples").iterdir():
        assert pixels(path) == pixels(tmp_path / "saved" / "samples" / path.name)
    assert len(list((tmp_path / "often" / "checkpoints").iterdir())) == 1
    final = Path("checkpoints", "mira.safetensors")
    assert (tmp_path / "often" / final).read_bytes() == (tmp_path / "saved" / final).read_bytes()


def test_less_often_than_checkpoints(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    words = options(
        train__length="5 steps", save__every="1 steps", sample__every="1 epochs", sample__prompts=PROMPTS[:1]
    )
    told = run(oven, dataset, tmp_path / "run", words)
    assert [event["step"] for event in told if event["kind"] == "samples"] == [0, 3, 5]


def test_prompts_of_a_file(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    (tmp_path / "prompts.txt").write_text(
        "# what to look at\n\nsea --s 1 --d 9 --w 64 --h 96 --n rain --l 3\n  # and\nnight --s 1\n"
    )
    words = options(train__length="1 steps", sample__prompts=["hat --s 1"], sample__prompts_file="prompts.txt")
    run(oven, dataset, tmp_path / "run", words)
    texts = [infotext_of(path) for path in sorted((tmp_path / "run" / "samples").glob("step00000001*"))]
    assert [text.split("\n")[0] for text in texts] == [f"{text} <lora:mira:1>" for text in ("hat", "sea", "night")]
    assert "Size: 64x96" in texts[1] and "Negative prompt: rain" in texts[1] and "Seed: 9" in texts[1]
    assert f'prompts_file = "{tmp_path / "prompts.txt"}"' in (tmp_path / "run" / "recipe.toml").read_text()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sea --s many", "line 2: --s"),
        ("sea --cn pose.png", "line 2: --cn"),
        ("sea --q 3", "line 2: --q"),
        ("", "holds no prompt"),
    ],
)
def test_a_line_that_is_not_understood_is_named(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, line: str, told: str
) -> None:
    (tmp_path / "prompts.txt").write_text(f"# first\n{line}\n")
    words = options(train__length="1 steps", sample__prompts_file=str(tmp_path / "prompts.txt"))
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words)
    assert done.code == 2 and told in done.err and not (tmp_path / "run").exists(), done.err


def test_a_rhythm_without_prompts_is_told(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    done = oven.run("validate", dataset, *options(sample__every="2 steps"))
    assert done.code == 0 and "sample.every does nothing without" in done.out + done.err


def test_killed_between_samples_it_ends_the_same(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any
) -> None:
    words = options(
        train__length="5 steps",
        sample__every="1 steps",
        save__every="3 steps",
        sample__prompts=PROMPTS[:1],
        save__state_every=1e6,
    )
    run(oven, dataset, tmp_path / "whole", words)
    die = """
import os, signal
import lorabake.train.samples as m
real = m.save_png
def save(image, path, text):
    if "step00000004" in path.name: os.kill(os.getpid(), signal.SIGKILL)
    return real(image, path, text)
m.save_png = save
"""
    assert oven.run("train", dataset, "--into", tmp_path / "cut", *words, before=die).code == -9
    run(oven, dataset, tmp_path / "cut", words)
    assert result(tmp_path / "cut").differences(result(tmp_path / "whole")) == []


def test_no_room_for_a_temporary_file_ends_nothing(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    words = options(
        train__length="3 steps", save__every="100 steps", sample__every="2 steps", sample__prompts=PROMPTS[:1]
    )
    gone = f"import tempfile; tempfile.tempdir = {str(tmp_path / 'gone')!r}"
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, before=gone)
    assert done.code == 0 and "No such file or directory" in done.err, done.err
    assert (tmp_path / "run" / "checkpoints" / "mira.safetensors").exists()
