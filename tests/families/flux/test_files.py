"""Flux.1 on disk: folders and single files give the same model, what is saved opens in diffusers, what is wrong is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.families import inspect_model, load_model
from lorabake.families.flux.model import FluxModel
from lorabake.families.networks.layouts import ldm_vae
from lorabake.protocols.family import Model

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

FILE = "diffusion_pytorch_model.safetensors"


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
    for part, network in one.parts.items():
        state = other.parts[part].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items()), part
    for given, expected in zip(answers(one), answers(other), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def copied(dev_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dev_folder, tmp_path / "copied"))


class Files(NamedTuple):
    """A model as single files, in the layouts they are published in."""

    base: Path
    prefixed: Path
    vae: Path
    clip: Path
    t5: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def files(dev_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    model, home = load_model(dev_folder), tmp_path_factory.mktemp("files")
    assert isinstance(model, FluxModel)
    own = {
        f"{name.removesuffix('.weight')}.scale" if "_norm." in name else name: tensor
        for name, tensor in model.transformer.state_dict().items()
    }
    paths = ldm_vae(model.vae.config)
    vae = {paths.theirs(name): tensor.contiguous() for name, tensor in model.vae.state_dict().items()}
    save_file(own, home / "flux.safetensors")
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in own.items()}, home / "prefixed.safetensors")
    save_file({str(name): tensor for name, tensor in vae.items()}, home / "ae.safetensors")
    save_file(model.text_encoder.state_dict(), home / "clip_l.safetensors")
    save_file(model.text_encoder_2.state_dict(), home / "t5xxl.safetensors")
    flux, prefixed, ae, clip, t5 = (
        home / f"{name}.safetensors" for name in ("flux", "prefixed", "ae", "clip_l", "t5xxl")
    )
    return Files(flux, prefixed, ae, clip, t5, dev_folder / "tokenizer_2")


def test_saving_and_loading_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    model.save(tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    assert_same(saved, model)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (before,), (after,) = (list((home / part).glob("*.safetensors")) for home in (folder, tmp_path / "saved"))
        one, other = load_file(before), load_file(after)
        classic = {name.removeprefix("text_model."): tensor for name, tensor in other.items()}
        assert all(torch.equal(tensor, classic[name.removeprefix("text_model.")]) for name, tensor in one.items()), part


def test_what_is_saved_opens_in_diffusers(folder: Path, theirs: Any, tmp_path: Path) -> None:
    model = load_model(folder)
    assert isinstance(model, FluxModel)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(1.25)
    model.save(tmp_path / "saved")
    opened = type(theirs).from_pretrained(tmp_path / "saved", local_files_only=True, dtype=torch.float32)
    state = theirs.transformer.state_dict()
    assert all(torch.equal(tensor, 1.25 * state[name]) for name, tensor in opened.transformer.state_dict().items())
    with torch.no_grad():
        one, other = (
            pipeline.encode_prompt(["a red girl"], ["a red girl"], max_sequence_length=20)
            for pipeline in (theirs, opened)
        )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("prefixed", [False, True])
def test_single_files_are_the_same_model(dev_folder: Path, files: Files, tmp_path: Path, prefixed: bool) -> None:
    base, encoders = files.prefixed if prefixed else files.base, [files.tokenizer, files.t5, files.clip]
    facts, folder_facts = inspect_model(base, files.vae, encoders), inspect_model(dev_folder)
    assert (facts.architecture, facts.prediction, facts.pixel_step) == ("flux-1-dev", "flow", folder_facts.pixel_step)
    model, folder = load_model(facts), load_model(folder_facts)
    assert model.latent_space == folder.latent_space
    assert_same(model, folder)
    model.save(tmp_path / "saved")
    assert_same(load_model(tmp_path / "saved"), model)


def test_an_all_in_one_file_may_have_a_tokenizer_of_another_size(
    files: Files, dev_folder: Path, tmp_path: Path
) -> None:
    places = {
        "vae.": files.vae,
        "text_encoders.clip_l.transformer.": files.clip,
        "text_encoders.t5xxl.transformer.": files.t5,
    }
    inside = {prefix + name: tensor for prefix, file in places.items() for name, tensor in load_file(file).items()}
    save_file({**load_file(files.prefixed), **inside}, tmp_path / "all.safetensors")
    assert_same(
        load_model(inspect_model(tmp_path / "all.safetensors", text_encoders=[files.tokenizer])), load_model(dev_folder)
    )


def test_without_a_tokenizer_it_is_t5s_own(files: Files, tmp_path: Path) -> None:
    """As all but diffusers' folders come: the vocabulary is the same for every published T5."""
    tensors = load_file(files.t5)
    tensors["shared.weight"] = torch.randn(32_128, tensors["shared.weight"].shape[1])
    save_file(tensors, tmp_path / "t5.safetensors")
    model = load_model(inspect_model(files.base, files.vae, [files.clip, tmp_path / "t5.safetensors"]))
    ids_BL = model.tokenize(["a cat"])["text_encoder_2"]
    assert ids_BL[0, :5].tolist() == [3, 9, 1712, 1, 0]
    with pytest.raises(UserError, match="the tokenizer has 32100 tokens, the text encoder only 128"):
        load_model(inspect_model(files.base, files.vae, [files.clip, files.t5]))


def test_a_t5_folder_may_hold_its_tokenizer(files: Files, dev_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dev_folder / "text_encoder_2", tmp_path / "t5")
    shutil.copy(dev_folder / "tokenizer_2" / "tokenizer.json", tmp_path / "t5")
    given = load_model(inspect_model(files.base, files.vae, [tmp_path / "t5", files.clip]))
    assert given.tokenize(["a girl"])["text_encoder_2"][0, :4].tolist() == [3, 4, 1, 0]


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


def test_text_encoders_can_be_replaced_one_by_one(copied: Path, dev_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "text_encoder_2" / "model.safetensors")
    changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "t5.safetensors")
    before = answers(load_model(dev_folder))
    after = answers(load_model(inspect_model(copied, text_encoders=[tmp_path / "t5.safetensors"])))
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


KEY = "transformer_blocks.0.attn.to_k.weight"
SPOILS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "part of a fused layer": (lambda f: edit(f / "transformer" / FILE, lambda t: t.pop(KEY)), ["img_attn.qkv.weight", "in part"]),
    "shape": (lambda f: edit(f / "transformer" / FILE, lambda t: t.update({KEY: torch.zeros(3, 3)})), [KEY, "(3, 3)", "(64, 64)"]),
    "unknown": (lambda f: edit(f / "transformer" / FILE, lambda t: t.update({"odd": torch.zeros(3)})), ["odd", "not in the network"]),
    "t5 of another width": (lambda f: edit_json(f / "transformer" / "config.json", joint_attention_dim=32), ["joint_attention_dim", "24"]),
    "clip of another width": (lambda f: edit_json(f / "transformer" / "config.json", pooled_projection_dim=48), ["pooled_projection_dim", "32"]),
    "fill model": (lambda f: edit_json(f / "transformer" / "config.json", in_channels=32), ["in_channels", "fill"]),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), ["tokenizer_2/", "missing"]),
    "no t5": (lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), ["text_encoder_2", "missing"]),
    "small vocabulary": (lambda f: edit_json(f / "text_encoder_2" / "config.json", vocab_size=20), ["20"]),
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


def test_all_that_a_single_file_lacks_is_said_at_once(files: Files) -> None:
    with pytest.raises(UserError) as caught:
        inspect_model(files.base)
    for word in ("CLIP", "T5", "VAE", "text_encoders = [", "vae ="):
        assert word in str(caught.value)


def test_text_encoders_that_are_none_or_two_of_a_kind(files: Files) -> None:
    with pytest.raises(UserError, match="two of a kind"):
        inspect_model(files.base, files.vae, [files.clip, files.clip, files.t5, files.tokenizer])
    with pytest.raises(UserError, match="none of what"):
        inspect_model(files.base, files.vae, [files.clip, files.t5, files.vae])


def test_another_prediction_is_refused(dev_folder: Path) -> None:
    with pytest.raises(UserError, match="predicts 'flow'"):
        inspect_model(dev_folder, prediction="epsilon")
