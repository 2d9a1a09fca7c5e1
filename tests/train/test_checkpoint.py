"""What a run's files say of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorabake.base.files import sha256_file
from lorabake.base.header import read_header
from lorabake.base.places import POCKET_MODEL
from lorabake.families import inspect_model
from lorabake.train.checkpoint import hashes_of

Options = Callable[..., list[str]]


def said(oven: Any, dataset: Path, into: Path, words: list[str]) -> dict[str, str]:
    """Metadata of the last file of a run."""
    done = oven.run("train", dataset, "--into", into, *words, cwd=dataset.parent)
    assert done.code == 0, done.err
    return read_header(into / "checkpoints" / "mira.safetensors").metadata


def test_an_epoch_has_the_batches_it_has(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    """Six pictures one by one are six batches, though the second step of an epoch then has two instead of four."""
    words = options(train__length="1 epochs", train__batch_size=1, train__gradient_accumulation=4)
    metadata = said(oven, dataset, tmp_path / "run", words)
    assert metadata["ss_num_batches_per_epoch"] == "6" and metadata["ss_steps"] == "2"


def test_what_was_trained_on_is_named_without_its_place(
    oven: Any, dataset: Path, tmp_path: Path, options: Options
) -> None:
    """Folders have no hashes."""
    vae = Path(shutil.copytree(dataset.with_name("base") / "vae", tmp_path / "vaes" / "other"))
    ranges = {"objective__min_timestep": 250, "objective__max_timestep": 960}
    metadata = said(oven, dataset, tmp_path / "run", options(train__length="1 steps", model__vae=str(vae), **ranges))
    assert metadata["ss_vae_name"] == "other" and metadata["modelspec.timestep_range"] == "250,960"
    assert not {"ss_sd_model_hash", "ss_new_sd_model_hash", "ss_vae_hash", "ss_new_vae_hash"} & metadata.keys()
    assert not [value for value in metadata.values() if str(tmp_path) in value or "vaes" in value]
    plain = said(oven, dataset, tmp_path / "plain", options(train__length="1 steps"))
    assert not {"ss_vae_name", "modelspec.timestep_range"} & plain.keys()


def test_a_run_asks_for_the_hashes_and_writes_them(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    file = POCKET_MODEL / "vae" / "diffusion_pytorch_model.safetensors"
    given = f"""
import dataclasses
from pathlib import Path
import lorabake.train.prepare as m
real = m.hashes_of
m.hashes_of = lambda facts: real(dataclasses.replace(facts, path=Path({str(file)!r}), vae=Path({str(file)!r})))
"""
    done = oven.run("train", dataset, "--into", tmp_path / "run", *options(train__length="1 steps"), before=given)
    assert done.code == 0, done.err
    metadata, whole = read_header(tmp_path / "run" / "checkpoints" / "mira.safetensors").metadata, file.read_bytes()
    assert metadata["ss_vae_name"] == file.name
    assert metadata["ss_new_vae_hash"] == metadata["ss_new_sd_model_hash"] == hashlib.sha256(whole).hexdigest()
    window = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert metadata["ss_vae_hash"] == metadata["ss_sd_model_hash"] == window


def test_a_base_file_is_hashed_by_its_window_and_as_a_whole(tmp_path: Path) -> None:
    facts = inspect_model(POCKET_MODEL)
    base = tmp_path / "base.safetensors"
    with base.open("wb") as file:
        file.seek(0x100000)
        file.write(b"window" * 20_000)
    found = hashes_of(dataclasses.replace(facts, path=base))
    assert found["sd_model_hash"] == hashlib.sha256((b"window" * 20_000)[:0x10000]).hexdigest()[:8]
    assert found["new_sd_model_hash"] == sha256_file(base) and found.keys() == {"sd_model_hash", "new_sd_model_hash"}


def test_the_file_has_each_layers_own_alpha(oven: Any, dataset: Path, tmp_path: Path, options: Options) -> None:
    from safetensors.numpy import load_file

    words = options(train__length="1 steps", adapter__rank=4, adapter__alpha=2.0)
    words += ["--set", "adapter.block_rank={mid_block=8}", "--set", "adapter.block_alpha={mid_block=3.0, attn2=1.0}"]
    assert json.loads(said(oven, dataset, tmp_path / "run", words)["ss_network_args"])["block_alpha"]
    tensors = load_file(tmp_path / "run" / "checkpoints" / "mira.safetensors")
    alphas = {name: float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}
    for name, alpha in alphas.items():
        rank = tensors[name.replace(".alpha", ".lora_down.weight")].shape[0]
        expected = (3.0, 8) if "mid_block" in name else (1.0, 4) if "attn2" in name else (2.0, 4)
        assert (alpha, rank) == expected, name
    assert set(alphas.values()) == {3.0, 1.0, 2.0}
