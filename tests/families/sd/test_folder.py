"""Reading a model folder: the same weights, one copy, and a clear word about everything that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabake.base.errors import Problems, UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families import inspect_model, load_model
from lorabake.families.sd.model import SDModel

UNET, TEXT, VAE = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


def folder_model(folder: Path, dtype: torch.dtype = torch.float32) -> SDModel:
    model = load_model(folder, dtype=dtype)
    assert isinstance(model, SDModel)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(POCKET_MODEL, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def first_bias(model: SDModel) -> float:
    return float(model.unet.state_dict()["conv_in.bias"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_of_the_files(dtype: torch.dtype) -> None:
    model = folder_model(POCKET_MODEL, dtype=dtype)
    for network, file in ((model.unet, UNET), (model.text_encoder, TEXT), (model.vae, VAE)):
        stored = load_file(POCKET_MODEL / file)
        state = network.state_dict()
        assert len(state) == len(stored)
        for key, tensor in stored.items():
            loaded = state[key if key in state else f"text_model.{key}"]
            assert loaded.dtype == dtype and torch.equal(loaded, tensor.to(dtype)), key
        assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training
    assert model.sampler["beta_end"] == 0.012


def test_the_pocket_model_predicts_what_diffusers_predicts() -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(POCKET_MODEL / "unet", torch_dtype=torch.float32)
    ours = folder_model(POCKET_MODEL)
    with torch.no_grad():
        text = ours.text_encoder(torch.tensor(ours.tokenizer.encode(["1girl, red hair, beach"])))
        latents = torch.randn(1, ours.unet.config.in_channels, 16, 16)
        given, expected = (model(latents, torch.tensor([700]), text) for model in (ours.unet, theirs))
    torch.testing.assert_close(given, expected.sample, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near(folder: Path) -> None:
    exact, near = folder_model(folder), folder_model(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        ids = torch.tensor(exact.tokenizer.encode(["1girl, red hair, beach"]))
        latents, timesteps = torch.randn(1, exact.unet.config.in_channels, 16, 16), torch.tensor([400])
        expected = exact.unet(latents, timesteps, exact.text_encoder(ids))
        given = near.unet(latents.bfloat16(), timesteps, near.text_encoder(ids)).float()
    assert (given - expected).norm() < 0.05 * expected.norm()


def test_training_the_weights_leaves_the_file(folder: Path) -> None:
    edit(folder / UNET, lambda tensors: tensors.update({key: tensor.float() for key, tensor in tensors.items()}))
    before = (folder / UNET).read_bytes()
    model = folder_model(folder)
    for parameter in model.unet.parameters():
        parameter.zero_()
    assert (folder / UNET).read_bytes() == before


def test_prefix_positions_and_old_names_are_accepted(folder: Path) -> None:
    def the_other_way(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "text_model."
        for key in list(tensors):
            other = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
            tensors[other] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def old(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if ".attentions." in key:
                was = key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
                tensors[was.replace("to_out.0", "proj_attn")] = tensors.pop(key)

    expected = folder_model(folder)
    edit(folder / TEXT, the_other_way)
    edit(folder / VAE, old)
    given = folder_model(folder)
    for ours, theirs in ((given.text_encoder, expected.text_encoder), (given.vae, expected.vae)):
        for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, other)


def test_a_variant_is_read_when_it_is_alone_or_asked_for(folder: Path) -> None:
    variant = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(folder / UNET, variant)
    edit(variant, lambda tensors: tensors["conv_in.bias"].fill_(7))
    assert first_bias(folder_model(folder)) != 7
    assert first_bias(folder_model(folder, dtype=torch.float16)) == 7
    (folder / UNET).unlink()
    assert first_bias(folder_model(folder)) == 7


def test_loading_does_not_import_the_compiler() -> None:
    code = (
        "import sys; from lorabake.families import inspect_model, load_model; load_model('pocket');"
        "print(*{'torch._dynamo', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def spoil_shape(folder: Path) -> None:
    edit(folder / UNET, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}))


def spoil_missing(folder: Path) -> None:
    edit(folder / UNET, lambda tensors: tensors.pop("mid_block.resnets.0.conv1.weight"))


def spoil_extra(folder: Path) -> None:
    edit(folder / VAE, lambda tensors: tensors.update({"loss.logvar": torch.zeros(1)}))


def spoil_twice(folder: Path) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> None:
        spellings = ("final_layer_norm.bias", "text_model.final_layer_norm.bias")
        (known,) = (name for name in spellings if name in tensors)
        tensors.update({name: tensors[known].clone() for name in spellings})

    edit(folder / TEXT, twice)


def spoil_quantised(folder: Path) -> None:
    edit(folder / UNET, lambda t: t.update({"conv_in.bias": t["conv_in.bias"].to(torch.int8)}))


def spoil_cut_short(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])


def spoil_empty(folder: Path) -> None:
    (folder / UNET).write_bytes(b"")


def spoil_huge_header(folder: Path) -> None:
    (folder / UNET).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def spoil_pickle(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def spoil_shards(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")


def spoil_json(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{")


def spoil_widths(folder: Path) -> None:
    edit_json(folder / "unet/config.json", cross_attention_dim=64)


def spoil_vocabulary(folder: Path) -> None:
    edit_json(folder / "text_encoder/config.json", vocab_size=100)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_shape, ["conv_in.bias", "(3,)", "(32,)"]),
        (spoil_missing, ["mid_block.resnets.0.conv1.weight", "missing"]),
        (spoil_extra, ["loss.logvar", "not in the network"]),
        (spoil_twice, ["final_layer_norm.bias", "twice"]),
        (spoil_quantised, ["conv_in.bias", "I8"]),
        (spoil_cut_short, ["diffusion_pytorch_model.safetensors", "cut short", "download it again"]),
        (spoil_empty, ["diffusion_pytorch_model.safetensors", "only 0 bytes"]),
        (spoil_huge_header, ["diffusion_pytorch_model.safetensors", "header claims"]),
        (spoil_pickle, ["diffusion_pytorch_model.bin", "runs whatever code", "convert"]),
        (spoil_shards, ["shards"]),
        (spoil_json, ["vae", "config.json", "JSON"]),
        (spoil_widths, ["cross_attention_dim", "64", "128"]),
        (spoil_vocabulary, ["2048", "100"]),
    ],
)
def test_what_is_wrong_is_said(folder: Path, spoil: Callable[[Path], None], words: list[str]) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        folder_model(folder)
    for word in words:
        assert word in str(caught.value)


def test_everything_missing_is_told_at_once(folder: Path) -> None:
    for part in ("text_encoder", "vae", "tokenizer", "scheduler"):
        shutil.rmtree(folder / part)
    with pytest.raises(Problems) as caught:
        folder_model(folder)
    text = str(caught.value)
    for part in ("text_encoder", "vae", "tokenizer", "scheduler"):
        assert f"{part}/" in text


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unet/.*tokenizer/"):
        folder_model(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        folder_model(tmp_path / "nothing")


def test_a_whole_set_of_shards_is_one_network(folder: Path) -> None:
    tensors = sorted(load_file(folder / UNET).items())
    expected = folder_model(folder).unet.state_dict()
    (folder / UNET).unlink()
    for number, part in enumerate((tensors[:100], tensors[100:]), start=1):
        save_file(dict(part), folder / f"unet/diffusion_pytorch_model-{number:05d}-of-00002.safetensors")
    given = folder_model(folder).unet.state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_a_folder_goes_by_what_is_read_of_it(folder: Path, tmp_path: Path) -> None:
    was = inspect_model(folder).digest
    for name in ("notes.txt", "settings.json", "unet/training.json", "samples/config.json", "vae/README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    moved = folder.rename(tmp_path / "elsewhere")
    assert inspect_model(moved).digest == was
    edit(moved / VAE, lambda tensors: tensors["decoder.conv_in.bias"].add_(1))
    assert inspect_model(moved).digest != was


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_another_vocabulary_is_another_model(folder: Path, file: str) -> None:
    was = inspect_model(folder).digest
    with (folder / "tokenizer" / file).open("a") as written:
        written.write(" ")
    assert inspect_model(folder).digest != was


def test_a_vae_given_apart_goes_by_what_is_read_of_it(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    was = inspect_model(folder, vae=other).digest
    assert was != inspect_model(folder).digest
    edit(other / UNET, lambda tensors: tensors["conv_in.bias"].add_(1))
    assert inspect_model(folder, vae=other).digest == was
    assert inspect_model(folder, vae=other / "vae").digest == was
    edit(other / VAE, lambda tensors: tensors["decoder.conv_in.bias"].add_(1))
    assert inspect_model(folder, vae=other).digest != was


def test_only_the_embedded_model_is_called_pocket(tmp_path: Path) -> None:
    """Whatever the folder around a model is called."""
    mine = Path(shutil.copytree(POCKET_MODEL, tmp_path / "pocket" / "model"))
    assert inspect_model(mine).name == "model" and inspect_model(POCKET_MODEL).name == "pocket"
    (tmp_path / "link").symlink_to(POCKET_MODEL)
    assert inspect_model(tmp_path / "link").name == "pocket"


@pytest.mark.parametrize("side", [0, -1, 4097, True, "64", 64.0])
def test_a_size_that_is_none_is_refused(folder: Path, side: object) -> None:
    edit_json(folder / "unet" / "config.json", sample_size=side)
    with pytest.raises(UserError, match="a whole number of latent cells was expected"):
        inspect_model(folder)


def test_a_size_that_is_not_said_is_the_usual_one(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", sample_size=None)
    assert inspect_model(folder).resolution == 64 * inspect_model(folder).latent_scale
