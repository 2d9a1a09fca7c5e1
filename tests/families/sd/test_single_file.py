"""Single files against diffusers' modules of the same weights, and a clear word about every file that is something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.families import inspect_model, load_model
from lorabake.families.sd.model import SDModel

Write = Callable[..., Path]
CAPTIONS = ["a photo of a cat!", "red dress, 1girl"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def loaded(path: Path, dtype: torch.dtype = torch.float32, **source: Any) -> SDModel:
    model = load_model(inspect_model(path, **source), dtype=dtype)
    assert isinstance(model, SDModel)
    return model


def close(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def states(model: SDModel) -> dict[str, Tensor]:
    parts = (("unet", model.unet), ("text_encoder", model.text_encoder), ("vae", model.vae))
    return {f"{part}.{name}": tensor for part, network in parts for name, tensor in network.state_dict().items()}


def same(given: SDModel, expected: SDModel) -> None:
    first, second = states(given), states(expected)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@torch.no_grad()
def test_every_network_answers_as_diffusers_does(either: Any, written: Write) -> None:
    model = loaded(written(either.checkpoint))
    ids = model.tokenize(CAPTIONS)
    text = model.encode_text(ids)["text_BLD"]
    close(text, either.text_encoder(ids["text_encoder"]).last_hidden_state)
    latents, timesteps = torch.randn(2, 4, 16, 24), torch.tensor([7, 801])
    close(model.predict(latents, timesteps, {"text_BLD": text}), either.unet(latents, timesteps, text).sample)
    images = torch.rand(1, 3, 64, 32) * 2 - 1
    encoded = model.encode_images(images)
    close(encoded, either.vae.encode(images).latent_dist.mean * 0.18215)
    close(model.decode_latents(encoded), either.vae.decode(encoded / 0.18215).sample)


def test_diffusers_reads_the_same_file_alike(either: Any, written: Write, tmp_path: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    path = written(either.checkpoint)
    model = loaded(path)
    for kind, theirs, ours in ((UNet2DConditionModel, either.unet, model.unet), (AutoencoderKL, either.vae, model.vae)):
        theirs.save_config(tmp_path / kind.__name__)
        read = kind.from_single_file(
            str(path), config=str(tmp_path / kind.__name__), local_files_only=True
        ).state_dict()
        state = ours.state_dict()
        assert state.keys() == read.keys()
        assert all(torch.equal(state[name], read[name]) for name in read)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_files_with_averages_beside_are_read_exactly(either: Any, written: Write, dtype: torch.dtype) -> None:
    tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in either.checkpoint.items()}
    averages = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": t * 0.5
        for key, t in tensors.items()
        if key.startswith(UNET)
    }
    model = loaded(written({**tensors, **averages, "model_ema.decay": torch.tensor(0.9999)}))
    exact = loaded(
        written({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}, "exact.safetensors")
    )
    same(model, exact)
    assert {tensor.dtype for tensor in states(model).values()} == {torch.float32}


def test_facts(sd1: Any, sd2: Any, written: Write) -> None:
    first = inspect_model(written(sd1.checkpoint, "first.safetensors"))
    assert (first.family, first.name, first.prediction, first.base_version) == ("sd", "first", "epsilon", "sd_v1")
    assert (first.resolution, first.pixel_step, first.latent_scale, first.latent_channels) == (64 * 4, 32, 4, 4)
    assert first.architecture == "stable-diffusion-v1" and first.small and not first.notes
    second = inspect_model(written(sd2.checkpoint, "second.safetensors"), prediction="v")
    assert (second.prediction, second.base_version, second.resolution) == ("v", "sd_v2_v", 96 * 4)
    assert second.architecture == "stable-diffusion-v2-768-v" and not second.notes
    assert first.digest != second.digest
    renamed = first.path.rename(first.path.with_name("renamed.safetensors"))
    assert inspect_model(renamed).digest == first.digest


def test_an_sd2_file_that_says_nothing_is_not_guessed_silently(sd2: Any, written: Write) -> None:
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    narrow, wide = (sd2.checkpoint | {name: spread * torch.tensor([1.0, -1.0] * 32)} for spread in (0.05, 0.2))
    for tensors, prediction in ((narrow, "epsilon"), (wide, "v"), ({**wide, name: wide[name].bfloat16()}, "v")):
        facts = inspect_model(written(tensors))
        assert facts.prediction == prediction
        assert (
            len(facts.notes) == 1
            and f"'{prediction}' is assumed" in facts.notes[0]
            and "model.prediction" in facts.notes[0]
        )
    declared = inspect_model(written(wide, modelspec__prediction_type="epsilon"))
    assert declared.prediction == "epsilon" and not declared.notes


def test_markers_set_v_and_zero_terminal_snr(sd1: Any, written: Write) -> None:
    path = written({**sd1.checkpoint, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    model = loaded(path)
    assert model.facts.prediction == "v" and model.facts.base_version == "sd_v1_v"
    assert model.betas_T is not None and float((1 - model.betas_T).prod()) == 0.0
    plain = loaded(written(sd1.checkpoint, "plain.safetensors"))
    assert plain.betas_T is not None
    assert float(plain.betas_T[0]) == pytest.approx(0.00085) and float(plain.betas_T[-1]) == pytest.approx(0.012)
    assert len(plain.betas_T) == 1000


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(VAE): tensor for key, tensor in tensors.items() if key.startswith(VAE)}


def test_a_vae_from_elsewhere_in_any_layout(sd1: Any, sd2: Any, written: Write, tmp_path: Path) -> None:
    base = written(sd1.checkpoint, without=(VAE,))
    own = bare(sd2.checkpoint)
    sd2.vae.save_pretrained(tmp_path / "folder")
    places = [
        written(own, "bare.safetensors"),
        written(
            {f"{VAE}{key}": t for key, t in own.items()} | {f"{VAE}loss.logvar": torch.zeros(1)}, "prefixed.safetensors"
        ),
        written(sd2.vae.state_dict(), "diffusers.safetensors"),
        tmp_path / "folder",
    ]
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = sd2.vae.encode(images).latent_dist.mean * 0.18215
    spaces, digests = set(), set()
    for place in places:
        model = loaded(base, vae=place)
        close(model.encode_images(images), expected)
        spaces.add(model.latent_space)
        digests.add(model.facts.digest)
    assert len(spaces) == 1, "the same VAE makes the same latents, wherever it lies"
    assert len(digests) == len(places), "other files, another base model"
    assert loaded(written(sd1.checkpoint, "whole.safetensors")).latent_space not in spaces


def test_a_text_encoder_from_elsewhere(either: Any, written: Write, tmp_path: Path) -> None:
    base = written(either.checkpoint, without=(TEXT,))
    whole = loaded(written(either.checkpoint, "whole.safetensors"))
    inner = f"{TEXT}{'model' if either.version == 2 else 'transformer'}."
    alone = {key.removeprefix(inner): t for key, t in either.checkpoint.items() if key.startswith(inner)}
    either.text_encoder.save_pretrained(tmp_path / "folder")
    for place in (written(alone, "alone.safetensors"), tmp_path / "folder"):
        same(loaded(base, text_encoders=[place]), whole)


def test_a_unet_whose_names_have_nothing_before_them(either: Any, written: Write, tmp_path: Path) -> None:
    bare = {key.removeprefix(UNET): t for key, t in either.checkpoint.items() if key.startswith(UNET)}
    unet = written({**bare, "ztsnr": torch.zeros(0)}, "unet.safetensors")
    refused(unet, "text encoder", "text_encoders =", "VAE", "vae =", "2 problems")
    either.text_encoder.save_pretrained(tmp_path / "text")
    either.vae.save_pretrained(tmp_path / "vae")
    whole = written(either.checkpoint, "whole.safetensors")
    joined = loaded(unet, text_encoders=[tmp_path / "text"], vae=tmp_path / "vae")
    same(joined, loaded(whole))
    assert joined.facts.notes == inspect_model(whole).notes, "its norms tell as much"


def test_a_unet_without_its_end_is_none(sd1: Any, written: Write) -> None:
    """As a ControlNet is, whose names are like these."""
    bare = {key.removeprefix(UNET): t for key, t in sd1.checkpoint.items() if key.startswith(UNET)}
    refused(
        written({key: t for key, t in bare.items() if not key.startswith("out.")}), "of a kind that is not supported"
    )


def test_saved_as_a_folder_it_is_the_same_model(either: Any, written: Write, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    model = loaded(written(either.checkpoint), prediction="v")
    model.save(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    same(again, model)
    assert again.facts.prediction == "v" and again.facts.resolution == model.facts.resolution
    assert again.latent_space == model.latent_space
    assert torch.equal(again.tokenize(CAPTIONS)["text_encoder"], model.tokenize(CAPTIONS)["text_encoder"])
    again.save(tmp_path / "twice")
    same(loaded(tmp_path / "twice"), model)

    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    ids = theirs.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, model.tokenize(CAPTIONS)["text_encoder"])
    with torch.no_grad():
        text = theirs.text_encoder(ids).last_hidden_state
        latents, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([7, 801])
        close(text, model.encode_text({"text_encoder": ids})["text_BLD"])
        close(theirs.unet(latents, timesteps, text).sample, model.predict(latents, timesteps, {"text_BLD": text}))
    assert theirs.scheduler.config["prediction_type"] == "v_prediction"


def test_on_a_cpu_weights_in_the_right_type_stay_pages_of_the_file(sd1: Any, written: Write) -> None:
    path = written(sd1.checkpoint)
    before = path.read_bytes()
    model = loaded(path)
    for parameter in model.unet.parameters():
        parameter.zero_()
    assert path.read_bytes() == before


def refused(path: Path, *words: str, **source: Any) -> None:
    with pytest.raises(UserError) as caught:
        inspect_model(path, **source)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_parts_that_are_not_there_are_named_at_once(sd1: Any, written: Write) -> None:
    unet_only = written(sd1.checkpoint, without=(TEXT, VAE))
    refused(unet_only, "text encoder", "text_encoders =", "VAE", "vae =", "2 problems")
    refused(written(sd1.checkpoint, without=(VAE,)), "VAE", "vae =", "1 problem")
    refused(written(sd1.checkpoint), "one text encoder", "2 were given", text_encoders=[unet_only, unet_only])
    refused(written(sd1.checkpoint), "holds no VAE", vae=written({"a": torch.zeros(1)}, "no_vae.safetensors"))
    refused(written(sd1.checkpoint), "'vae.safetensors' does not exist", vae="vae.safetensors")


@pytest.mark.parametrize(("channels", "word"), [(9, "inpainting"), (5, "depth"), (8, "instruct-pix2pix")])
def test_other_kinds_of_unet(sd1: Any, written: Write, channels: int, word: str) -> None:
    refused(
        written(sd1.checkpoint | {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3)}),
        word,
        "in_channels",
    )


def test_parts_of_different_models(sd1: Any, sd2: Any, written: Write) -> None:
    text = written({key: t for key, t in sd2.checkpoint.items() if key.startswith(TEXT)}, "text.safetensors")
    refused(written(sd1.checkpoint), "cross_attention_dim", "64", "128", text_encoders=[text])


def test_a_tensor_too_few_or_of_another_shape(sd1: Any, written: Write) -> None:
    name = f"{UNET}middle_block.1.norm.weight"
    with pytest.raises(UserError, match=r"mid_block\.attentions\.0\.norm\.weight .*is missing"):
        loaded(written(sd1.checkpoint, without=(name,)))
    with pytest.raises(UserError, match=rf"{name} .*\(7,\).*\(64,\)"):
        loaded(written(sd1.checkpoint | {name: torch.zeros(7)}))
    with pytest.raises(UserError, match=r"not in the network"):
        loaded(written(sd1.checkpoint | {f"{UNET}middle_block.1.more.weight": torch.zeros(7)}))
    refused(written(sd1.checkpoint, without=(f"{UNET}input_blocks.4",)), "not whole")
    refused(written(sd1.checkpoint, without=(f"{UNET}output_blocks.5.2",)), "not whole")


_TENSOR = '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def _file(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


def test_files_that_are_no_model(sd1: Any, written: Write, tmp_path: Path) -> None:
    whole = written(sd1.checkpoint)
    data = whole.read_bytes()
    for name, content, words in (
        ("model.ckpt", b"\x80\x02}q\x00.", ["pickle", "weights_only=True", "save_file"]),
        ("renamed.safetensors", b"PK\x03\x04" + bytes(64), ["pickle"]),
        ("short.safetensors", data[: len(data) // 2], ["cut short", "download it again"]),
        ("empty.safetensors", b"", ["only 0 bytes", "download it again"]),
        ("nonsense.safetensors", (2**62).to_bytes(8, "little") + b"{}", ["header claims"]),
        ("twice.safetensors", _file(f"{{{_TENSOR},{_TENSOR}}}"), ["holds 'a' twice"]),
        (
            "texts.safetensors",
            _file(json.dumps({"__metadata__": dict.fromkeys(map(str, range(20_000)), "")})),
            ["20,000 metadata"],
        ),
        ("nested.safetensors", _file("[" * 1000 + "]" * 1000), ["not JSON"]),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", ["web page"]),
        ("model.gguf", b"GGUF" + bytes(64), ["quantised"]),
        ("model-00001-of-00003.safetensors", data, ["one of 3 shards"]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        refused(path, *words)


def test_weights_of_eight_bits(sd1: Any, written: Write) -> None:
    small = {key: t.to(torch.float8_e4m3fn) if key.startswith(UNET) else t for key, t in sd1.checkpoint.items()}
    refused(written(small), "F8_E4M3", "fp16")


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "LoRA"),
        (["unet.mid_block.attn.to_q.lora_A.weight"], "LoRA"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["emb_params"], "embedding"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["model_ema.diffusion_modelinput_blocks00weight"], "averaged (EMA) weights only"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "vae ="),
        (["text_model.embeddings.token_embedding.weight"], "text_encoders ="),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "diffusers' names"),
        (["layer.weight"], "'layer.weight'"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, names: list[str], word: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", word, "other.safetensors")
