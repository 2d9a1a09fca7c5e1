"""Stable Diffusion 3 on disk: folders and single files give the same model, what is saved opens in diffusers, what is wrong is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabake.base.errors import Problems, UserError
from lorabake.families import caption_readers, inspect_model, load_model
from lorabake.families.sd3.card import recognise
from lorabake.families.sd3.model import SD3Model
from lorabake.protocols.family import Model, ModelSource

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

FILE = "diffusion_pytorch_model.safetensors"
PROJECTION = "text_projection.weight"


def answers(model: Model) -> list[Tensor]:
    """What a model makes of fixed inputs: text, pooled text, prediction, latents."""
    generator = torch.Generator().manual_seed(6)
    latents = torch.randn(1, 4, 4, 6, generator=generator)
    images = torch.rand(1, 3, 8, 12, generator=generator)
    with torch.no_grad():
        text = model.encode_text(model.tokenize(["a red girl, beach"]))
        return [*text.values(), model.predict(latents, torch.tensor([400.0]), text), model.encode_images(images)]


def assert_same(one: Model, other: Model) -> None:
    """Weights to the last bit; outputs but for the order of sums, which depends on where tensors lie in memory."""
    assert one.parts.keys() == other.parts.keys()
    for part, network in one.parts.items():
        state = other.parts[part].state_dict()
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items()), part
    for given, expected in zip(answers(one), answers(other), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def unprojected(folder: Path, path: Path) -> Path:
    """A copy of a folder whose first CLIP has a projection that changes nothing, as single files mean it."""
    shutil.copytree(folder, path)
    edit(path / "text_encoder" / "model.safetensors", lambda t: t.update({PROJECTION: torch.eye(32)}))
    return path


@pytest.fixture
def copied(medium: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(medium, tmp_path / "copied"))


# ---- there and back


def test_saving_and_loading_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    model.save(tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    assert_same(saved, model)
    assert dataclasses.replace(saved.facts, path=folder, name="tiny-3", digest="") == dataclasses.replace(
        model.facts, digest=""
    )
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        before, after = (load_file(next((home / part).glob("*.safetensors"))) for home in (folder, tmp_path / "saved"))
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), part


@torch.no_grad()
def test_what_is_saved_opens_in_diffusers_and_predicts_the_same(folder: Path, theirs: Any, tmp_path: Path) -> None:
    model = load_model(folder)
    for part in model.parts.values():
        for parameter in part.parameters():
            parameter.mul_(1.25)
    model.save(tmp_path / "saved")
    opened: Any = type(theirs).from_pretrained(tmp_path / "saved", local_files_only=True, dtype=torch.float32)
    state = theirs.transformer.state_dict()
    for name, tensor in opened.transformer.state_dict().items():
        assert torch.equal(tensor, state[name] * (1 if name == "pos_embed.pos_embed" else 1.25)), name
    captions = ["a red girl", "beach"]
    text, _, pooled, _ = opened.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
    told = model.encode_text(model.tokenize(captions))
    torch.testing.assert_close(told["text_BMD"], text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told["pooled_BP"], pooled, rtol=1e-5, atol=1e-5)
    latents, timesteps = torch.randn(2, 4, 8, 6), torch.tensor([3.0, 800.0])
    expected = opened.transformer(
        latents, timestep=timesteps, encoder_hidden_states=text, pooled_projections=pooled
    ).sample
    given = model.predict(latents, timesteps, told)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# ---- single files


@pytest.mark.parametrize("name", ["base", "bare", "whole"])
def test_single_files_are_the_same_model(folder: Path, files: Any, tmp_path: Path, name: str) -> None:
    apart = [files.tokenizer, files.t5, files.clip_g, files.clip_l]
    vae, encoders = (None, [files.tokenizer]) if name == "whole" else (files.vae, apart)
    facts = inspect_model(getattr(files, name), vae, encoders)
    whole = load_model(unprojected(folder, tmp_path / "folder"))
    alike = dict(path=folder, name="", digest="", vae=None, text_encoders=())
    assert dataclasses.replace(facts, **alike) == dataclasses.replace(whole.facts, **alike)
    model = load_model(facts)
    assert model.latent_space == whole.latent_space
    assert model.sampler["shift"] == whole.sampler["shift"] == 3.0
    assert_same(model, whole)
    model.save(tmp_path / "saved")
    assert_same(load_model(tmp_path / "saved"), model)


def test_diffusers_reads_the_denoiser_of_a_single_file_as_we_do(files: Any, theirs: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    found = convert_sd3_transformer_checkpoint_to_diffusers(load_file(files.base))
    state = theirs.transformer.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_shards_are_joined(copied: Path) -> None:
    before = load_model(copied)
    tensors = load_file(copied / "transformer" / FILE)
    (copied / "transformer" / FILE).unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):  # a fused layer's parts end up in both
        save_file(
            {name: tensors[name] for name in part},
            copied / "transformer" / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors",
        )
    assert_same(load_model(copied), before)


def test_text_encoders_can_be_replaced_one_by_one(copied: Path, medium: Path, tmp_path: Path) -> None:
    before = answers(load_model(medium))
    for part, kept in (("text_encoder_2", slice(0, 0)), ("text_encoder_3", slice(1, 2))):
        tensors = load_file(copied / part / "model.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, tmp_path / f"{part}.safetensors")
        after = answers(load_model(inspect_model(copied, text_encoders=[tmp_path / f"{part}.safetensors"])))
        assert not torch.equal(before[0], after[0])
        assert all(torch.equal(*pair) for pair in zip(before[kept], after[kept], strict=True)), part
    shutil.copytree(copied / "text_encoder", tmp_path / "narrow")
    edit(tmp_path / "narrow" / "model.safetensors", lambda t: t[PROJECTION].zero_())
    after = answers(load_model(inspect_model(copied, text_encoders=[tmp_path / "narrow"])))
    assert torch.equal(before[0], after[0]) and not after[1][:, :32].any() and after[1][:, 32:].equal(before[1][:, 32:])


# ---- without T5


@torch.no_grad()
def test_a_file_without_t5_is_told_zeros_in_its_place(files: Any, theirs: Any, tmp_path: Path) -> None:
    facts = inspect_model(files.without_t5)
    (note,) = facts.notes
    assert "has no T5" in note and "text_encoders = [" in note and facts.usual_t5_tokens is None
    assert list(caption_readers(facts, {})) == ["text_encoder", "text_encoder_2"]
    model = load_model(facts)
    assert list(model.parts) == ["denoiser", "text_encoder", "text_encoder_2"]
    text = model.encode_text(model.tokenize(["a red girl"]))["text_BMD"]
    assert text.shape == (1, 77 + 256, 88) and not text[:, 77:].any()
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert_same(again, model)
    assert "has no T5" in again.facts.notes[0]
    none: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants to be told, even so
    opened: Any = type(theirs).from_pretrained(tmp_path / "saved", local_files_only=True, dtype=torch.float32, **none)
    expected, _, pooled, _ = opened.encode_prompt(
        "a red girl", "a red girl", "a red girl", do_classifier_free_guidance=False
    )
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-5)
    assert pooled.shape == (1, 80)


def test_a_tokenizer_without_its_t5_is_refused(files: Any, medium: Path) -> None:
    with pytest.raises(Problems, match=r"T5.*Give T5 too, or leave its tokenizer out"):
        inspect_model(files.without_t5, text_encoders=[files.tokenizer])
    given = inspect_model(files.without_t5, text_encoders=[medium / "text_encoder_3", files.tokenizer])
    assert not given.notes and "text_encoder_3" in load_model(given).parts


# ---- what is wrong


def spoil_t5(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")


KEY = "transformer_blocks.0.attn.to_k.weight"
SPOILS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "part of a fused layer": (lambda f: edit(f / "transformer" / FILE, lambda t: t.pop(KEY)), ["x_block.attn.qkv.weight", "in part"]),
    "no table of positions": (lambda f: edit(f / "transformer" / FILE, lambda t: t.pop("pos_embed.pos_embed")), ["pos_embed", "missing"]),
    "shape": (lambda f: edit(f / "transformer" / FILE, lambda t: t.update({KEY: torch.zeros(3, 3)})), [KEY, "(3, 3)", "(32, 32)"]),
    "unknown": (lambda f: edit(f / "transformer" / FILE, lambda t: t.update({"odd": torch.zeros(3)})), ["odd", "not in the network"]),
    "t5 of another width": (lambda f: edit_json(f / "transformer" / "config.json", joint_attention_dim=96), ["joint_attention_dim", "88"]),
    "clips too wide": (lambda f: edit_json(f / "transformer" / "config.json", joint_attention_dim=72), ["joint_attention_dim", "80", "88"]),
    "clips of other widths": (lambda f: edit_json(f / "transformer" / "config.json", pooled_projection_dim=64), ["pooled_projection_dim", "80"]),
    "another vae": (lambda f: edit_json(f / "transformer" / "config.json", in_channels=16, out_channels=16), ["in_channels", "16", "4"]),
    "no second clip and no tokenizers": (
        lambda f: [shutil.rmtree(f / name) for name in ("text_encoder_2", "tokenizer_2", "tokenizer_3")],
        ["text_encoder_2/config.json", "tokenizer_2/", "tokenizer_3/", "missing"],
    ),
    "t5 is named but not there": (spoil_t5, ["text_encoder_3/config.json", "tokenizer_3/"]),
    "small vocabulary": (lambda f: edit_json(f / "text_encoder_3" / "config.json", vocab_size=20), ["20"]),
    "sizes": (
        lambda f: edit_json(f / "transformer" / "config.json", dual_attention_layers=[0, 7], qk_norm="layer_norm", patch_size=4, caption_projection_dim=48),
        ["dual_attention_layers", "0 to 2", "layer_norm", "patch_size", "caption_projection_dim", "32"],
    ),
    "8 bit": (
        lambda f: edit(f / "transformer" / FILE, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)})),
        ["F8_E4M3", KEY],
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_wrong_is_said(copied: Path, spoil: str) -> None:
    change, words = SPOILS[spoil]
    change(copied)
    with pytest.raises(UserError) as caught:
        load_model(copied)
    for word in words:
        assert word in str(caught.value)


def test_all_that_a_single_file_lacks_is_said_at_once(files: Any) -> None:
    with pytest.raises(Problems) as caught:
        inspect_model(files.base, text_encoders=[files.t5])
    assert [problem.where for problem in caught.value.problems] == ["CLIP-L", "CLIP-G", "VAE"]
    for word in ("text_encoders = [", "vae =", "text_encoders.clip_l.transformer."):
        assert word in str(caught.value)


def test_text_encoders_that_are_none_or_three_of_a_kind(files: Any) -> None:
    with pytest.raises(UserError, match="three of a kind"):
        inspect_model(files.base, files.vae, [files.clip_l, files.clip_g, files.clip_l])
    with pytest.raises(UserError, match="none of what Stable Diffusion 3"):
        inspect_model(files.base, files.vae, [files.clip_l, files.clip_g, files.vae])
    with pytest.raises(UserError, match=r"pooled_projection_dim.*64"):
        inspect_model(files.base, files.vae, [files.clip_l, files.clip_l])


def test_another_prediction_is_refused(medium: Path) -> None:
    with pytest.raises(UserError, match="predicts 'flow'"):
        inspect_model(medium, prediction="epsilon")


def test_other_models_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert recognise(ModelSource(tmp_path)) is None
    save_file({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    assert recognise(ModelSource(tmp_path / "part.safetensors")) is None


def test_a_file_whose_heads_cannot_be_told(files: Any, tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(96, *tensor.shape[1:]) if name == "x_embedder.proj.weight" else tensor
        for name, tensor in load_file(files.bare).items()
        if ".ln_" not in name
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="96 channels make no whole number of heads of 64"):
        inspect_model(tmp_path / "odd.safetensors", files.vae, [files.clip_l, files.clip_g])


def test_it_is_the_family_that_loads(medium: Path) -> None:
    assert isinstance(load_model(medium), SD3Model)
