"""What text encoders say of captions is kept on disk, by all that it depends on; the cache is never more than a saving of time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import Interrupted
from lorabake.base.events import Events
from lorabake.base.places import POCKET_MODEL
from lorabake.families import load_model
from lorabake.recipe import check_values
from lorabake.train.prepare import TEXT_CACHE, prepare
from lorabake.train.text import TextSource

CAPTIONS = ["1girl, red hair, smile, beach", "night", "", "1boy, blue eyes, forest"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("pocket")


def source(model: Any, **options: Any) -> TextSource:
    return TextSource(model, **{"trained": False, "repeating": True, **options})


def packs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


class Counted:
    """Counts the captions that the text encoders are asked for."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, model.encode_text

        def encode(tokens: Any) -> Any:
            self.count += len(next(iter(tokens.values())))
            return real(tokens)

        monkeypatch.setattr(model, "encode_text", encode)


def test_the_second_time_nothing_is_encoded(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = source(model)(CAPTIONS)
    counted, told = Counted(model, monkeypatch), list[Any]()
    first = source(model)
    first.keep([*CAPTIONS, *CAPTIONS], tmp_path, lambda done, total: told.append((done, total)), pytest.fail)
    assert counted.count == 4 and told == [(1, 4), (2, 4), (3, 4), (4, 4)] and len(packs(tmp_path)) == 1
    second = source(model)
    second.keep(CAPTIONS, tmp_path, lambda done, total: pytest.fail("encoded again"), pytest.fail)
    for kept in (first(CAPTIONS), second(CAPTIONS)):
        assert kept.keys() == plain.keys()
        assert all(torch.equal(kept[name], plain[name]) for name in plain)
    assert counted.count == 4
    third = source(model)
    third.keep(["night", "a new one"], tmp_path)
    assert counted.count == 5 and len(packs(tmp_path)) == 2


def test_flipped_bytes_are_seen_and_made_good(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = source(model)(CAPTIONS)
    source(model).keep(CAPTIONS, tmp_path)
    (pack,) = packs(tmp_path)
    data = bytearray(pack.read_bytes())
    data[-100] ^= 4
    pack.write_bytes(data)
    counted, again = Counted(model, monkeypatch), source(model)
    again.keep(CAPTIONS, tmp_path)
    assert counted.count == 4 and packs(tmp_path) == [pack]
    assert pack.read_bytes() != data
    assert torch.equal(again(CAPTIONS)["text_BLD"], plain["text_BLD"])


def test_deleted_under_a_run_it_is_not_missed(model: Any, tmp_path: Path) -> None:
    kept = source(model)
    kept.keep(CAPTIONS, tmp_path)
    before = kept(CAPTIONS)["text_BLD"]
    shutil.rmtree(tmp_path)
    assert torch.equal(kept(CAPTIONS)["text_BLD"], before)


def test_a_folder_that_cannot_be_written_costs_memory_only(model: Any, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a file stands in the way")
    told, kept = list[str](), source(model)
    kept.keep(CAPTIONS, tmp_path / "text", not_kept=told.append)
    assert len(told) == 1 and not packs(tmp_path)
    assert torch.equal(kept(CAPTIONS)["text_BLD"], source(model)(CAPTIONS)["text_BLD"])


def test_a_disk_without_room_is_not_filled(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorabake.train.text.free_space", lambda folder: 1000)
    told, kept = list[str](), source(model)
    kept.keep(CAPTIONS, tmp_path, not_kept=told.append)
    assert len(told) == 1 and "1 kB are free" in told[0] and not packs(tmp_path)


def test_what_is_done_when_it_is_stopped_stays(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        source(model).keep(CAPTIONS, tmp_path, stop)
    counted = Counted(model, monkeypatch)
    source(model).keep(CAPTIONS, tmp_path)
    assert counted.count == 1


def test_many_are_written_as_they_come(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorabake.train.text._PACK_BYTES", 1)
    kept = source(model)
    kept.keep(CAPTIONS, tmp_path)
    assert len(packs(tmp_path)) == 4
    assert torch.equal(kept(CAPTIONS)["text_BLD"], source(model)(CAPTIONS)["text_BLD"])


@pytest.mark.parametrize("options", [{"trained": True}, {"repeating": False}])
def test_captions_that_vary_or_are_learnt_from_are_not_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    counted, kept = Counted(model, monkeypatch), source(model, **options)
    kept.keep(CAPTIONS, tmp_path)
    assert not kept.keeps and counted.count == 0 and not packs(tmp_path)


def test_all_that_it_depends_on_is_in_the_key(tmp_path: Path) -> None:
    """The text encoder's weights, its settings, the type of numbers, and the tokens."""
    shutil.copytree(POCKET_MODEL, tmp_path / "other")
    (file,) = (tmp_path / "other" / "text_encoder").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    made = [
        source(load_model("pocket")),
        source(load_model("pocket", dtype=torch.bfloat16)),
        source(load_model("pocket", max_tokens=150)),
        source(load_model("pocket", clip_skip=2), reading={"clip_skip": 2}),
        source(load_model(tmp_path / "other")),
    ]
    for number, one in enumerate(made, 1):
        one.keep(["night"], tmp_path / "text")
        assert len(packs(tmp_path / "text")) == number
    again = source(load_model("pocket"))
    again.keep(["  night"], tmp_path / "text")  # the same tokens: the same words to the model
    assert len(packs(tmp_path / "text")) == len(made)


def raw(dataset: Path, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "optimizer": {"text_encoder_lr": 0.0},
        "train": {"batch_size": 2, "device": "cpu", "length": "3 steps"},
        **sections,
    }


def test_a_run_on_a_cached_dataset_reads_neither_text_encoder_nor_vae(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    first = prepare(check_values(raw(dataset)), Events(told.append))
    assert [event["done"] for event in told if event["kind"] == "encoding_text"] == [1, 2, 3, 4, 5, 6]
    read: list[str] = []
    from lorabake.families.networks.residence import Residence

    real = Residence.wake
    monkeypatch.setattr(Residence, "wake", lambda self: read.append(type(self._modules[0]).__name__) or real(self))
    second = prepare(check_values(raw(dataset)), Events())
    assert read == ["UNet2DConditionModel"]
    captions = [sample.caption for sample in first.samples]
    assert torch.equal(first.text(captions)["text_BLD"], second.text(captions)["text_BLD"])
    latents = ([view for own in baked.latents for view in own] for baked in (first, second))
    assert all(torch.equal(*pair) for pair in zip(*latents, strict=True))


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may write anywhere")
def test_a_dataset_that_nobody_may_write_to_can_be_trained_on(dataset: Path) -> None:
    told: list[Any] = []
    dataset.chmod(0o555)
    try:
        prepare(check_values(raw(dataset)), Events(told.append))
    finally:
        dataset.chmod(0o755)
    assert [event["kind"] for event in told if "kept" in event["kind"]] == ["latents_not_kept", "text_not_kept"]


def test_every_caption_of_a_run_is_encoded_before_it(dataset: Path, tmp_path: Path) -> None:
    """Of regularisation pictures without the prefix, of held-out ones, of epochs without captions, and those kept as the base answers."""
    shutil.copytree(dataset / "1_mira", tmp_path / "reg" / "1_girl")
    shutil.copytree(dataset / "1_mira", tmp_path / "others" / "1_girl")
    for index, folder in enumerate(("reg", "others")):
        for path in (tmp_path / folder).rglob("*.png"):
            path.write_bytes(path.read_bytes() + bytes([index]))
            path.with_suffix(".txt").write_text(f"{folder} {path.stem}")
    config = raw(
        dataset,
        data={
            "folder": str(dataset), "regularisation": str(tmp_path / "reg"),
            "captions": {"prefix": "mira, ", "caption_dropout_every_n_epochs": 2},
        },
        validation={"folder": str(tmp_path / "others")},
        preservation={"weight": 1.0, "trigger": "mira"},
    )  # fmt: skip
    prepare(check_values(config), Events())
    read: list[Any] = []
    baked = prepare(check_values(config), Events(read.append))
    from lorabake.train.loop import batch_inputs

    for step in (0, 1):
        for batch in ((0, 1), (6, 7), (10, 11)):
            batch_inputs(baked, step * baked.steps_per_epoch, 0, batch)
    assert "text_encoder" in baked.model.resting()
    assert {event["kind"] for event in read}.isdisjoint({"encoding_text", "encoding"})
    assert (dataset / TEXT_CACHE).is_dir()
