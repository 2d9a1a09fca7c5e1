"""Training on from a LoRA file: the first step finds exactly what the file does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorabake.adapters import adopt, graft, graft_file
from lorabake.adapters.lora import LoraSettings
from lorabake.base.errors import Problems, UserError
from lorabake.base.header import read_header
from lorabake.base.places import POCKET_MODEL
from lorabake.cli import main  # noqa: F401 - the room is loaded before the model
from lorabake.families import inspect_model, load_model
from lorabake.formats.kohya import read_lora
from lorabake.train.checkpoint import hashes_of
from lorabake.train.starting import _other_base

Options = Callable[..., list[str]]
PARTS = ("denoiser", "text_encoder")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return load_model(tiny)


def write_file(
    model: Any, path: Path, settings: LoraSettings, parts: Any = PARTS, dtype: torch.dtype = torch.float16
) -> Path:
    """A LoRA file whose change is not nothing."""
    born = graft(model, "lora", settings, seed=3, parts=parts)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (tensor if name.endswith("alpha") else torch.randn(tensor.shape, generator=generator) * 0.05)
        .to(dtype)
        .contiguous()
        for name, tensor in born.tensors().items()
    }
    born.remove()
    save_file(tensors, path, {"ss_sd_model_name": "base"})
    return path


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, model.facts.latent_channels, 8, 8, generator=generator)
    conditioning = model.encode_text(model.tokenize(["a hat", "night"]))
    return model.predict(latents, torch.tensor([100, 700]), conditioning)


def deltas(graft: Any) -> dict[str, torch.Tensor]:
    return {
        change.layer.key: graft.layer_type.delta(change.layer.module, {**change.weights, **change.constants})
        for change in graft.changes
    }


@pytest.mark.parametrize("alpha", [8.0, 4.0, 2.0, 3.0])
@pytest.mark.parametrize("conv", [None, 2])
def test_it_does_what_the_file_does_whatever_the_alpha(
    model: Any, tmp_path: Path, alpha: float, conv: int | None
) -> None:
    path = write_file(model, tmp_path / "a.safetensors", LoraSettings(rank=4, alpha=2.0, conv_rank=conv))
    layers = read_lora(path).layers
    with_file = graft_file(model, "lora", layers)
    expected, expected_deltas = answers(model), deltas(with_file)
    with_file.remove()
    born = graft(model, "lora", LoraSettings(rank=4, alpha=alpha, conv_rank=conv), seed=9, parts=PARTS)
    assert adopt(born, layers) == 0
    found, found_deltas = answers(model), deltas(born)
    tensors = born.tensors()
    born.remove()
    assert found_deltas.keys() == expected_deltas.keys()
    exact = alpha in (2.0, 4.0, 8.0)  # a ratio that is a power of two rounds nothing
    for key, delta in found_deltas.items():
        if exact:
            assert torch.equal(delta, expected_deltas[key])
        else:
            torch.testing.assert_close(delta, expected_deltas[key], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - answers(model)).abs().max() > 1e-3, "the file does something"
    name = next(name for name in tensors if name.endswith("to_q.lora_up.weight"))
    theirs = load_file(path)[name].float()
    assert torch.equal(tensors[name], theirs) == (alpha == 2.0)
    assert float(tensors[name.replace("lora_up.weight", "alpha")]) == alpha


def test_a_file_without_alpha_means_its_rank(model: Any, tmp_path: Path) -> None:
    path = write_file(model, tmp_path / "a.safetensors", LoraSettings(rank=4))
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith("alpha")}, path)
    born = graft(model, "lora", LoraSettings(rank=4, alpha=2.0), seed=9, parts=PARTS)
    adopt(born, read_lora(path).layers)
    tensors = born.tensors()
    born.remove()
    assert all(torch.equal(tensors[name], 2 * up.float()) for name, up in load_file(path).items() if "lora_up" in name)


@pytest.mark.parametrize(
    ("file", "recipe", "parts", "told"),
    [
        ({"rank": 8}, {"rank": 4}, PARTS, ["rank 8 in the file, 4 in the recipe", "layers, such as lora_"]),
        ({"rank": 4, "conv_rank": 2}, {"rank": 4}, PARTS, ["layers of the file are not trained", "conv_rank"]),
        ({"rank": 4}, {"rank": 4}, ("denoiser",), ["layers of the file are not trained", "text_encoder_lr"]),
        ({"rank": 4, "conv_rank": 2}, {"rank": 4, "conv_rank": 4}, PARTS, ["rank 2 in the file, 4 in the recipe"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    model: Any, tmp_path: Path, file: dict[str, Any], recipe: dict[str, Any], parts: Any, told: list[str]
) -> None:
    path = write_file(model, tmp_path / "a.safetensors", LoraSettings(**file))
    born = graft(model, "lora", LoraSettings(**recipe), seed=9, parts=parts)
    before = {name: tensor.clone() for name, tensor in born.tensors().items()}
    with pytest.raises(Problems) as caught:
        adopt(born, read_lora(path).layers)
    assert [text for text in told if text not in str(caught.value)] == [], caught.value
    assert all(torch.equal(tensor, before[name]) for name, tensor in born.tensors().items())
    born.remove()


def test_layers_the_file_leaves_alone_stay_newborn(model: Any, tmp_path: Path) -> None:
    path = write_file(model, tmp_path / "a.safetensors", LoraSettings(rank=4), parts=("denoiser",))
    born = graft(model, "lora", LoraSettings(rank=4), seed=9, parts=PARTS)
    texts = [change for change in born.changes if change.layer.part == "text_encoder"]  # pyright: ignore[reportAttributeAccessIssue]
    assert adopt(born, read_lora(path).layers) == len(texts) > 0
    assert all(not change.weights["lora_up.weight"].any() for change in texts)
    born.remove()


def test_whole_models_begin_with_models(model: Any, tmp_path: Path) -> None:
    whole = graft(model, "full", LoraSettings(), seed=1, parts=("denoiser",))
    with pytest.raises(UserError, match="begin with a model"):
        adopt(whole, {})
    whole.remove()


# ---- runs


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    return write_file(model, tmp_path / "first.safetensors", LoraSettings(rank=2, alpha=1.0))


@pytest.mark.parametrize("name", ["lora", "dylora", "lora-fa"])
def test_a_step_of_rate_zero_gives_the_file_back(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, file: Path, name: str
) -> None:
    """Also where the network type is one that saves LoRA files."""
    words = options(adapter__name=name, train__length="1 steps", schedule__warmup=0.9, save__dtype="fp32", adapter__start_from="first.safetensors",
                    adapter__alpha=1.0, sample__prompts=["1girl --s 2"])  # fmt: skip
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    theirs, ours = load_file(file), load_file(tmp_path / "run" / "checkpoints" / "mira.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name].float()) for name in theirs)
    with safe_open(tmp_path / "run" / "checkpoints" / "mira.safetensors", framework="pt") as saved:
        assert saved.metadata()["lorabake_start_from"] == f"first.safetensors {read_header(file).payload_sha256[:12]}"
    before, after = (Image.open(path).tobytes() for path in sorted((tmp_path / "run" / "samples").iterdir()))
    assert before == after, "drawn before the step and after"
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    assert f'start_from = "{file}"' in recipe


def test_a_killed_run_goes_on_and_another_file_is_refused(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, file: Path, result: Any, model: Any
) -> None:
    words = options(train__length="5 steps", adapter__start_from=str(file))
    assert oven.run("train", dataset, "--into", tmp_path / "whole", *words).code == 0
    die = """
import os, signal
import lorabake.train.run as m
real = m.save_state
def save(folder, progress, *more, **options):
    if progress.step == 3: os.kill(os.getpid(), signal.SIGKILL)
    return real(folder, progress, *more, **options)
m.save_state = save
"""
    assert oven.run("train", dataset, "--into", tmp_path / "cut", *words, before=die).code == -9
    assert oven.run("train", dataset, "--into", tmp_path / "cut", *words).code == 0
    assert result(tmp_path / "cut").differences(result(tmp_path / "whole")) == []
    plain = oven.run("train", dataset, "--into", tmp_path / "plain", *options(train__length="5 steps"))
    assert plain.code == 0 and result(tmp_path / "plain").differences(result(tmp_path / "whole"))
    write_file(model, file, LoraSettings(rank=2, alpha=2.0))
    done = oven.run(
        "train", dataset, "--into", tmp_path / "cut", *words, "--set", "train.length=9 steps", "--continue-changed"
    )
    assert done.code == 2 and "start_from: " in done.err and "began with another file" in done.err


def test_another_base_is_told(oven: Any, dataset: Path, tmp_path: Path, options: Options, file: Path) -> None:
    save_file(load_file(file), file, {"ss_sd_model_name": "anything-v5.safetensors"})
    words = options(train__length="1 steps", adapter__start_from=str(file))
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, "--json")
    assert done.code == 0, done.err
    notes = [event["text"] for event in map(json.loads, done.out.splitlines()) if event["kind"] == "note"]
    assert any("was trained on 'anything-v5.safetensors' (this one is 'base')" in note for note in notes), notes


def test_a_base_file_is_told_by_its_hash(tmp_path: Path) -> None:
    """Whatever the file is called; below 1 MiB hashes say nothing, and names count."""
    base = tmp_path / "renamed.safetensors"
    base.write_bytes(b"x" * 0x110000)
    facts = dataclasses.replace(inspect_model(POCKET_MODEL), path=base, name="renamed")
    own = {"ss_sd_model_name": "mine", **{f"ss_{key}": value for key, value in hashes_of(facts).items()}}
    assert _other_base(own, facts) == ""
    assert _other_base({**own, "ss_sd_model_hash": "0" * 8}, facts).startswith(
        "mine (hash 00000000; this one is renamed"
    )
    base.write_bytes(b"small")
    small = {**own, "ss_sd_model_hash": hashes_of(facts)["sd_model_hash"]}
    assert _other_base(small, facts) == "'mine' (this one is 'renamed')"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"adapter__start_from": "nowhere.safetensors"}, "adapter.start_from"),
        ({"adapter__rank": 4}, "rank 2 in the file, 4 in the recipe"),
        ({"adapter__start_from": "mira/1_mira/000.png"}, "adapter.start_from"),
        ({"adapter__name": "full"}, "give the model as model.base"),
        ({"adapter__start_fom": "x"}, "Did you mean 'start_from'?"),
    ],
    ids=str,
)
def test_refused_before_anything_starts(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, file: Path, change: dict[str, Any], told: str
) -> None:
    words = options(**{"adapter__start_from": str(file), **change})
    if "adapter__name" in change:
        at = words.index("adapter.rank=2")
        del words[at - 1 : at + 1]
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words, cwd=tmp_path)
    assert done.code == 2 and told in done.err and "Nothing was started." in done.err, done.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_network_type_is_refused(
    oven: Any, dataset: Path, tmp_path: Path, options: Options, model: Any
) -> None:
    key = next(layer.key for layer in model.layers() if layer.key.endswith("to_q"))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    save_file({f"{key}.{name}": torch.ones(2, 2) for name in names}, tmp_path / "loha.safetensors")
    words = options(adapter__start_from=str(tmp_path / "loha.safetensors"))
    done = oven.run("train", dataset, "--into", tmp_path / "run", *words)
    assert done.code == 2 and "loha" in done.err
