"""What is refused in the configuration files, and that all of it is named at once."""

from __future__ import annotations

from typing import Any

import pytest

from lorabake.base.errors import Problems, UserError
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig


def test_sd15_is_the_default() -> None:
    assert UNetConfig.from_json({"cross_attention_dim": 768}) == UNetConfig(cross_attention_dim=768)


def test_heads_are_what_the_file_calls_head_dim() -> None:
    config = UNetConfig.from_json({"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024})
    assert config.heads == (5, 10, 20, 20)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "FluxTransformer2DModel"),
        ("act_fn", "gelu"),
        ("addition_embed_type", "text_image"),
        ("attention_head_dim", [8, 8]),
        ("block_out_channels", [320, "640"]),
        ("block_out_channels", []),
        ("block_out_channels", [321, 640, 1280, 1280]),
        ("center_input_sample", 0),
        ("class_embed_type", "timestep"),
        ("cross_attention_dim", 0),
        ("cross_attention_dim", True),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        ("dual_cross_attention", True),
        ("layers_per_block", 10**9),
        ("norm_eps", float("nan")),
        ("num_attention_heads", 8),
        ("only_cross_attention", [True, False, False, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("some_new_trick", "yes"),
        ("use_linear_projection", "no"),
    ],
)
def test_other_arithmetic_is_refused(key: str, value: Any) -> None:
    with pytest.raises(Problems) as caught:
        UNetConfig.from_json({key: value}, "model/unet/config.json")
    assert key in {problem.where for problem in caught.value.problems}
    assert "model/unet/config.json" in str(caught.value)


SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}


def test_sdxl() -> None:
    config = UNetConfig.from_json(SDXL)
    assert config.transformer_depth == (1, 2, 10) and config.heads == (5, 10, 20)
    assert config.attends_down == config.attends_up == (False, True, True)
    assert (config.micro_channels, config.size_channels, config.pooled_channels) == (2816, 256, 1280)
    assert config.exact_attention is False


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ({"projection_class_embeddings_input_dim": None}, "projection_class_embeddings_input_dim"),
        ({"projection_class_embeddings_input_dim": 6 * 256}, "projection_class_embeddings_input_dim"),
        ({"transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]]}, "transformer_layers_per_block"),
        ({"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}, "reverse_transformer_layers_per_block"),
    ],
)
def test_what_sdxl_lacks_is_named_once(values: dict[str, Any], where: str) -> None:
    with pytest.raises(Problems) as caught:
        UNetConfig.from_json({**SDXL, **values})
    assert [problem.where for problem in caught.value.problems] == [where]


@pytest.mark.parametrize(("given", "end"), [({"eos_token_id": 2}, None), ({"eos_token_id": 49407}, 49407), ({}, 49407)])
def test_an_end_token_of_2_means_the_highest_id(given: dict[str, Any], end: int | None) -> None:
    assert ClipConfig.from_json(given).end_id == end


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(Problems, match=r"multiples of attention_head_dim \(7\)"):
        UNetConfig.from_json({"attention_head_dim": 7})


def test_settings_that_are_off_or_private_do_no_harm() -> None:
    extra = {"some_new_trick": False, "another": None, "_name_or_path": "x", "decay": 0.999, "sample_size": 64}
    assert UNetConfig.from_json(extra) == UNetConfig.from_json({})


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(Problems) as caught:
        UNetConfig.from_json({"act_fn": "relu", "norm_num_groups": 0, "in_channels": "four", "class_embed_type": "x"})
    assert {p.where for p in caught.value.problems} == {"act_fn", "norm_num_groups", "in_channels", "class_embed_type"}


@pytest.mark.parametrize(
    "values", [{"hidden_act": "relu"}, {"attention_dropout": 0.1}, {"hidden_size": 10, "num_attention_heads": 3}]
)
def test_other_text_encoders_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Problems):
        ClipConfig.from_json(values)


@pytest.mark.parametrize(
    "values", [{"latents_mean": [0.1]}, {"scaling_factor": 0}, {"up_block_types": ["AttnUpDecoderBlock2D"]}]
)
def test_other_autoencoders_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Problems):
        VaeConfig.from_json({"block_out_channels": [32], **values})


def test_a_list_is_no_configuration() -> None:
    with pytest.raises(UserError, match="list"):
        VaeConfig.from_json([], "vae/config.json")  # type: ignore[arg-type]
