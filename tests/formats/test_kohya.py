import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.header import read_header
from lorabake.formats.hashes import model_hash
from lorabake.formats.kohya import SUFFIXES, LoraFile, from_diffusers, network_type, read_lora, write_lora
from lorabake.formats.safetensors_file import read_tensors, write

KEY = "lora_unet_mid_block_attentions_0_proj_in"


def lora(key: str = KEY) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{key}.lora_down.weight": torch.randn(4, 8, generator=generator),
        f"{key}.lora_up.weight": torch.randn(8, 4, generator=generator),
        f"{key}.alpha": torch.tensor(2.0),
    }


def flat(file: LoraFile) -> dict[str, Tensor]:
    return {f"{layer}.{suffix}": tensor for layer, tensors in file.layers.items() for suffix, tensor in tensors.items()}


def test_round_trip(tmp_path: Path) -> None:
    tensors = lora() | lora("lora_te_text_model_encoder_layers_0_mlp_fc1")
    digest = write_lora(tmp_path / "a.safetensors", tensors, {"ss_seed": "1"}, "fp32")
    file = read_lora(tmp_path / "a.safetensors")
    assert set(file.layers) == {KEY, "lora_te_text_model_encoder_layers_0_mlp_fc1"}
    assert set(file.layers[KEY]) == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in flat(file).items())
    assert file.metadata["ss_seed"] == "1"
    assert digest == write_lora(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"ss_seed": "1"}, "fp32")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_hashes_are_of_what_is_stored(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    stale = {"sshs_model_hash": model_hash(lora())}
    write_lora(path, lora(), stale, precision)  # pyright: ignore[reportArgumentType]
    header = read_header(path)
    assert header.metadata["sshs_model_hash"] == header.payload_sha256 != stale["sshs_model_hash"]
    assert {tensor.dtype for tensor in read_tensors(path).values()} == {dtype}


def test_flags_keep_their_type(tmp_path: Path) -> None:
    tensors = {f"{KEY}.weight": torch.ones(8, 1), f"{KEY}.on_input": torch.tensor(True)}
    write_lora(tmp_path / "a.safetensors", tensors, {}, "fp16")
    assert read_lora(tmp_path / "a.safetensors").layers[KEY]["on_input"].dtype == torch.bool


def test_infinite_weights_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    large = lora() | {f"{KEY}.lora_up.weight": torch.full((8, 4), 70_000.0)}
    with pytest.raises(UserError, match=r"1 of 3 tensors are not finite as fp16.*lora_up.*Save it as bf16 or fp32"):
        write_lora(path, large, {}, "fp16")
    write_lora(path, large, {}, "bf16")
    kept = path.read_bytes()
    with pytest.raises(UserError, match="go back to an earlier checkpoint"):
        write_lora(path, large | {f"{KEY}.alpha": torch.tensor(torch.nan)}, {}, "bf16")
    assert path.read_bytes() == kept


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wrong = {"model.diffusion_model.out.2.bias": torch.ones(1), f"{KEY}.lora_side.weight": torch.ones(1)}
    write(path, {**lora(), **wrong, "x.weight": torch.ones(1)}, {})
    with pytest.raises(UserError, match="3 of 6 names are not known") as caught:
        read_lora(path)
    assert all(f"'{name}'" in str(caught.value) for name in wrong)
    write(path, {}, {})
    with pytest.raises(UserError, match="holds no tensors"):
        read_lora(path)


def layer(kind: str) -> dict[str, Tensor]:
    return {suffix: torch.ones(2, 2) for suffix in SUFFIXES[kind] | {"alpha"}}


@pytest.mark.parametrize("kind", sorted(SUFFIXES.keys() - {"lora"}))
def test_network_types(kind: str) -> None:
    assert network_type({"a": layer(kind), "b": layer(kind)}) == kind


def test_network_types_told_apart_by_shape() -> None:
    plain = {"lora_down.weight": torch.ones(4, 8, 1, 1), "lora_up.weight": torch.ones(8, 4, 1, 1)}
    three = {"lora_down.weight": torch.ones(4, 8, 3, 3), "lora_up.weight": torch.ones(8, 4, 1, 1)}
    assert network_type({"a": plain}) == "lora"
    assert network_type({"a": plain, "b": plain, "c": three}) == "locon"
    assert network_type({"a": layer("lora")}) == "locon", "Tucker decomposition"
    assert network_type({"a": {"oft_blocks": torch.ones(2, 4, 4)}}) == "oft"
    assert network_type({"a": {"oft_blocks": torch.ones(2, 2, 4, 4)}}) == "boft"


def test_mixed_files_are_what_most_layers_are() -> None:
    norms = {f"n{i}": layer("norm") for i in range(5)}
    assert network_type({**norms, "a": layer("lokr"), "b": layer("lokr"), "c": layer("full")}) == "lokr"
    assert network_type(norms) == "norm"


DOWN, UP = torch.ones(4, 8), torch.ones(8, 4)


@pytest.mark.parametrize(
    ("down", "up", "layer_key"),
    [
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_B.weight", KEY),
        (
            "unet.mid_block.attentions.0.proj_in.lora.down.weight",
            "unet.mid_block.attentions.0.proj_in.lora.up.weight",
            KEY,
        ),
        (
            "unet.base_model.model.mid_block.attentions.0.proj_in.lora_A.default.weight",
            "unet.base_model.model.mid_block.attentions.0.proj_in.lora_B.default.weight",
            KEY,
        ),
        (
            "unet.up_blocks.1.attn1.processor.to_out_lora.down.weight",
            "unet.up_blocks.1.attn1.processor.to_out_lora.up.weight",
            "lora_unet_up_blocks_1_attn1_to_out_0",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
            "lora_transformer_transformer_blocks_0_attn_to_q",
        ),
        (
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
            "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight",
            "lora_unet_double_blocks_0_img_attn_qkv",
        ),
        (
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        ),
    ],
)
def test_diffusers_names(down: str, up: str, layer_key: str) -> None:
    named = from_diffusers({down: DOWN, up: UP}, {})
    assert set(named) == {f"{layer_key}.{suffix}" for suffix in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert named[f"{layer_key}.lora_down.weight"] is DOWN
    assert named[f"{layer_key}.alpha"] == 4, "without one, alpha is the rank"


def test_diffusers_alpha_comes_from_the_file_or_its_metadata() -> None:
    path = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{path}.lora_A.weight": DOWN, f"{path}.lora_B.weight": UP}

    def alpha(config: object, more: dict[str, Tensor] | None = None) -> float:
        named = from_diffusers(tensors | (more or {}), {"lora_adapter_metadata": json.dumps(config)})
        return named[f"{KEY}.alpha"].item()

    assert alpha({"unet.lora_alpha": 8}) == 8
    assert alpha({"unet.lora_alpha": 8, "unet.use_rslora": True}) == 16  # 16 / 4 = 8 / √4
    assert alpha({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attentions.0.proj_in": 2}}) == 2
    assert alpha({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attentions.0.proj_out": 2}}) == 8
    assert alpha({"text_encoder.lora_alpha": 8}) == 4
    assert alpha({"unet.lora_alpha": 8}, {f"{path}.alpha": torch.tensor(3.0)}) == 3
    assert alpha({"unet.lora_alpha": "x", "unet.alpha_pattern": 3}) == alpha([]) == 4


def test_diffusers_dora_and_second_encoder() -> None:
    named = from_diffusers(
        {
            "unet.conv.lora_A.weight": torch.ones(4, 8, 1, 1),
            "unet.conv.lora_magnitude_vector": torch.ones(6),
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": DOWN,
            "text_encoder.encoder.layers.0.mlp.fc1.lora_magnitude_vector.weight": torch.ones(6),
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": DOWN,
            "unet.stranger": torch.ones(1),
        },
        {},
    )
    assert named["lora_unet_conv.dora_scale"].shape == (6, 1, 1, 1)
    assert named["lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale"].shape == (6, 1)
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in named
    assert "unet.stranger" in named
