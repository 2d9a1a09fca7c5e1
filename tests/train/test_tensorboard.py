"""TensorBoard itself reads what is written for it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorabake.base.files import write_json
from lorabake.base.runs import Run
from lorabake.formats.tfevents import EventFile, Picture, _checksum
from lorabake.train.tensorboard import TensorBoard, write_from_log

Options = Callable[..., list[str]]


def read(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 7), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_checksums_are_those_of_the_specification() -> None:
    """RFC 3720 B.4: CRC-32C of 32 zeros is 8A9136AA; masked by turning 15 bits and adding a constant."""
    crc = 0x8A9136AA
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert _checksum(bytes(32)) == masked.to_bytes(4, "little")


def test_numbers_and_pictures_are_read_back(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.out.tfevents.1.x", 100.5, 1)
    for step in (1, 2, 300):
        file.add(
            step,
            100.5 + step,
            {"loss": step / 3, "lr/すず": 1e-9},
            {"samples/00": Picture(png("red"), 12, 7)} if step == 2 else None,
        )
    found = read(tmp_path)
    assert sorted(found.Tags()["scalars"]) == ["loss", "lr/すず"] and found.Tags()["images"] == ["samples/00"]
    assert [(value.step, value.wall_time) for value in found.Scalars("loss")] == [(1, 101.5), (2, 102.5), (300, 400.5)]
    assert [value.value for value in found.Scalars("loss")] == pytest.approx([1 / 3, 2 / 3, 100])
    (picture,) = found.Images("samples/00")
    assert (picture.width, picture.height, picture.step) == (12, 7, 2) and picture.encoded_image_string == png("red")


def test_a_new_start_takes_back_what_did_not_happen(tmp_path: Path) -> None:
    first = EventFile(tmp_path / "events.out.tfevents.1.x", 1.0, 1)
    for step in (1, 2, 3):
        first.add(step, step, {"loss": 1.0})
    second = EventFile(tmp_path / "events.out.tfevents.2.x", 10.0, 3)
    for step in (3, 4):
        second.add(step, 10 + step, {"loss": 2.0})
    assert [(value.step, value.value) for value in read(tmp_path).Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "step"]


def test_a_run_writes_what_it_did(oven: Any, dataset: Path, tmp_path: Path, options: Options, result: Any) -> None:
    words = options(train__length="5 steps", save__every="3 steps", sample__prompts=["1girl --s 1", "sea --s 1"])
    board = ["--set", "save.tensorboard=true"]
    assert oven.run("train", dataset, "--into", tmp_path / "plain", *words).code == 0
    stop = "import lorabake.train.run as m; real = m.run_loop; m.run_loop = lambda b, s, e, after: real(b, s, e, lambda step: after(step) or step == 4)"
    assert oven.run("train", dataset, "--into", tmp_path / "run", *words, *board, before=stop).code == 130
    assert oven.run("train", dataset, "--into", tmp_path / "run", *words, *board).code == 0
    assert result(tmp_path / "run").differences(result(tmp_path / "plain")) == []
    found, logged = read(tmp_path / "run" / "tb"), steps_of(tmp_path / "run")
    for name, of in (
        ("loss", lambda e: e["loss"]),
        ("grad_norm", lambda e: e["grad_norm"]),
        ("lr/denoiser", lambda e: e["lr"]["denoiser"]),
    ):
        values = found.Scalars(name)
        assert [value.step for value in values] == [1, 2, 3, 4, 5]
        assert [value.value for value in values] == pytest.approx([of(event) for event in logged], rel=1e-6)
    assert "loss/smoothed" in found.Tags()["scalars"] and found.Scalars("images_per_second")[0].value > 0
    assert [picture.step for picture in found.Images("samples/01")] == [0, 3, 5]
    last = found.Images("samples/01")[-1].encoded_image_string
    assert last == (tmp_path / "run" / "samples" / "step00000005_01.png").read_bytes()


def test_afterwards_from_the_log(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    run = tmp_path / "run"
    words = options(train__length="3 steps", sample__prompts=["1girl --s 1"])
    assert oven.run("train", dataset, "--into", run, *words).code == 0
    assert not (run / "tb").exists()
    for _ in range(2):
        done = oven.run("tensorboard", run, "--json")
        assert done.code == 0 and json.loads(done.out) == [str(run / "tb")], done.err
    found = read(run / "tb")
    assert [value.step for value in found.Scalars("loss")] == [1, 2, 3]
    assert len(found.Images("samples/00")) == 2 and len(list((run / "tb").iterdir())) == 1
    wrong = oven.run("tensorboard", tmp_path)
    assert wrong.code == 2 and "is not a run folder" in wrong.err


def test_what_was_written_while_training_goes_before_the_log(tmp_path: Path) -> None:
    run = Run(tmp_path)
    write_json(run.manifest, {"recipe": {}, "lock": {}})
    step = {"kind": "step", "step": 1, "loss": 1.0, "grad_norm": 1.0, "images": 2, "lr": {}}
    run.events.write_text(json.dumps(step) + "\n")
    times = iter([10.0, 11.0, 11.5])
    board = TensorBoard(run, lambda: next(times))
    for event in ({"kind": "started", "step": 0}, step, {**step, "step": 2}):
        board(event)
    found = read(write_from_log(run))
    assert [(value.step, value.wall_time) for value in found.Scalars("loss")] == [(1, 11.0), (2, 11.5)]
    assert found.Scalars("images_per_second")[0].value == 4.0


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file in the way")
    told: list[str] = []
    board = TensorBoard(Run(tmp_path), refused=told.append)
    for event in ({"kind": "started", "step": 0}, {"kind": "step", "step": 1}):
        board(event)
    assert len(told) == 1 and "not written any more" in told[0]
