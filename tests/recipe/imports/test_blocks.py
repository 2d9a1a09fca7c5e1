"""Ranks and learning rates by block: for every layer of the real networks as sd-scripts decides from the layer's key."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.patterns import decide, idle
from lorabake.families.flux.model import flux_layers as layers_of_flux
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.config import ClipConfig, UNetConfig
from lorabake.families.networks.dit_config import FluxConfig, SD3Config
from lorabake.families.networks.flux import FluxTransformer
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.sd3.model import SD3Transformer, sd3_layers
from lorabake.families.sdxl.model import layers_of
from lorabake.protocols.family import Layer
from lorabake.recipe.exports import export_recipe
from lorabake.recipe.imports import Imported
from lorabake.recipe.imports._layer_names import Named, flux_layers, unet_layers

LEAST = 'network_module = "networks.lora"\ntrain_data_dir = "pictures"\nlearning_rate = 1e-4\n'
BASES = {"sd": "base.safetensors", "sdxl": "sd_xl_base.safetensors"}
SIDES = {"sd": (12, 1, 12), "sdxl": (9, 3, 9)}
COUNTS = {"sd": 25, "sdxl": 23}
XL = UNetConfig(
    block_out_channels=(320, 640, 1280), layers_per_block=(2, 2, 2), heads=(5, 10, 20), transformer_depth=(1, 2, 10),
    attends_down=(False, True, True), attends_up=(False, True, True), cross_attention_dim=2048, use_linear_projection=True,
    micro_channels=2816,
)  # fmt: skip


@cache
def real(name: str) -> tuple[Layer, ...]:
    """The layers of a U-Net and its text encoders as they are in full size, and without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig() if name == "sd" else XL)
        clip = CLIPTextModel(ClipConfig())
        second = CLIPTextModel(ClipConfig(hidden_size=1280, intermediate_size=5120, layers=32, heads=20))
    every = layers_of({"denoiser": unet, "text_encoder": clip, "text_encoder_2": second})
    found = [layer for layer in every if layer.group != "norm"]  # of which a LoRA trains none
    if name == "sdxl":
        return tuple(found)
    return tuple(_as_sd(layer) for layer in found if layer.part != "text_encoder_2")


def _as_sd(layer: Layer) -> Layer:
    """SD's files have the names of diffusers' modules."""
    prefix = "lora_unet" if layer.part == "denoiser" else "lora_te"
    return Layer(layer.part, layer.path, layer.module, layer.group, f"{prefix}_{layer.path.replace('.', '_')}")


def their_block(name: str, key: str) -> int:
    """The place of a layer in sd-scripts' lists, by its key; -1 for text encoders."""
    if name == "sd":
        found = re.search(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_", key)
        if found:
            inner = int(found[4]) if found[3] in ("resnets", "attentions") else 2
            return (1 if found[1] == "down" else 13) + 3 * int(found[2]) + inner
        return 12 if "mid_block_" in key else -1
    for prefix, first in (("input_blocks_", 1), ("middle_block_", 10), ("output_blocks_", 13)):
        if key.startswith(f"lora_unet_{prefix}"):
            return first + int(key.removeprefix(f"lora_unet_{prefix}").split("_")[0])
    return -1


def is_spatial(layer: Layer) -> bool:
    """Whether it is a convolution of 3 × 3 cells."""
    return isinstance(layer.module, nn.Conv2d) and layer.module.kernel_size == (3, 3)


def settings(found: Imported) -> LoraSettings:
    """The imported adapter."""
    return LoraSettings(**{name: value for name, value in found.values["adapter"].items() if name != "name"})


def ranks(found: Imported, layers: Sequence[Layer]) -> dict[str, int]:
    """The rank of every layer that is trained."""
    adapter, lora = settings(found), Lora()
    assert idle(adapter.block_rank, (layer.names for layer in layers)) == [], "patterns without a layer stop the run"
    return {layer.key: adapter.rank_for(layer) or 0 for layer in layers if lora.fits(layer, adapter)}


def scales(found: Imported, layers: Sequence[Layer]) -> dict[str, float]:
    """What the change of every layer that is trained is multiplied by."""
    adapter = settings(found)
    return {
        layer.key: adapter.alpha_for(layer) / (adapter.rank_for(layer) or 1)
        for layer in layers
        if Lora().fits(layer, adapter)
    }


def factors(found: Imported, layers: Sequence[Layer]) -> dict[str, float]:
    """The factor on the learning rate of every layer that is trained."""
    table: Mapping[str, float] = found.values["optimizer"].get("block_lr") or {}
    keys = ranks(found, layers).keys()
    trained = [layer for layer in layers if layer.key in keys]
    assert idle(table, (layer.names for layer in trained)) == [], "patterns without a trained weight stop the run"
    return {layer.key: decide(table, layer.names) or 1.0 for layer in trained}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_names_are_those_of_the_networks(name: Any) -> None:
    told = {layer.names: layer for layer in unet_layers(name)}
    there = {layer.names: layer for layer in real(name) if layer.group != "other"}
    assert told.keys() == there.keys()
    for names, layer in there.items():
        assert told[names].block == their_block(name, layer.key)
        kind = "convolution" if is_spatial(layer) and layer.group == "resnet" else layer.group
        assert told[names].kind == {"transformer": "attention"}.get(kind, kind)


def test_names_are_those_of_flux() -> None:
    with torch.device("meta"):
        parts: Any = {"denoiser": FluxTransformer(FluxConfig()), "text_encoder": CLIPTextModel(ClipConfig())}
    there = [layer for part, root in parts.items() for layer in layers_of_flux(part, root) if layer.group != "other"]
    assert {layer.names for layer in there} == {layer.names for layer in flux_layers()}


def lists(rng: random.Random, name: str) -> tuple[dict[str, Sequence[float]], list[str]]:
    """Random lists, and a config's lines with them."""
    count, sides = COUNTS[name], SIDES[name]
    given: dict[str, Sequence[float]] = {}
    lines = ["network_dim = 8", "network_alpha = 4"]
    arguments = []
    convolutions = rng.random() < 0.6
    if convolutions:
        arguments += ["conv_dim=4", "conv_alpha=1"]
    if rng.random() < 0.7:
        dims = [rng.choice([8, 8, 16, 0]) for _ in range(count)]
        given["block_dims"] = dims
        given["block_alphas"] = [(rank or 8) / 2 for rank in dims]
    if convolutions and given and rng.random() < 0.5:
        conv = [rng.choice([4, 4, 8, 16, 0]) for _ in range(count)]
        given["conv_block_dims"] = conv
        given["conv_block_alphas"] = [(rank or 4) / 4 for rank in conv]
    if not given or rng.random() < 0.6:
        for part, side in zip(("down", "mid", "up"), sides, strict=True):
            given[f"{part}_lr_weight"] = [rng.choice([1, 1, 0.5, 2, 0]) for _ in range(side)]
    arguments += [f"{key}={','.join(map(str, values))}" for key, values in given.items()]
    if convolutions:
        given["conv_dim"] = [4]
    return given, [*lines, f"network_args = {arguments}"]


def theirs(name: str, given: Mapping[str, Sequence[float]]) -> tuple[dict[str, int], dict[str, float]]:
    """sd-scripts' ranks and factors of every layer, by key."""
    whole = [1.0] * (name == "sdxl")
    weights = [
        *whole,
        *(factor for part, side in zip(("down", "mid", "up"), SIDES[name], strict=True)
          for factor in given.get(f"{part}_lr_weight", [1.0] * side)),
        *whole,
    ]  # fmt: skip
    dims = given.get("block_dims", [8] * COUNTS[name])
    conv = given.get("conv_block_dims", [4] * COUNTS[name])
    rank: dict[str, int] = {}
    rate: dict[str, float] = {}
    for layer in real(name):
        block = their_block(name, layer.key)
        if layer.group == "other" or (layer.group == "resnet" and "conv_dim" not in given):
            continue
        own = 8 if block < 0 else int((conv if is_spatial(layer) else dims)[block])
        if own and (block < 0 or weights[block]):
            rank[layer.key], rate[layer.key] = own, 1.0 if block < 0 else weights[block]
    return rank, rate


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_layer_has_its_rank_its_scale_and_its_rate(imported: Any, name: str) -> None:
    rng = random.Random(5)
    for _ in range(6):
        given, lines = lists(rng, name)
        found = imported("\n".join([f'pretrained_model_name_or_path = "{BASES[name]}"', LEAST, *lines]))
        rank, rate = theirs(name, given)
        assert ranks(found, real(name)) == rank
        assert factors(found, real(name)) == rate
        spatial = {layer.key for layer in real(name) if is_spatial(layer)}
        for key, scale in scales(found, real(name)).items():
            assert math.isclose(scale, 0.25 if key in spatial else 0.5)
        assert not found.of("lost", "unknown")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lists_come_back_from_an_export(imported: Any, name: str) -> None:
    rng = random.Random(6)
    for _ in range(4):
        given, lines = lists(rng, name)
        first = imported("\n".join([f'pretrained_model_name_or_path = "{BASES[name]}"', LEAST, *lines]))
        exported = export_recipe(first.values)
        assert [line.key for line in exported.lines if line.kind == "lost"] == []
        written = dict(argument.split("=") for argument in exported.config.get("network_args", []))
        back = {key: [float(item) for item in text.split(",")] for key, text in written.items()}
        assert theirs(name, {**back, **({"conv_dim": [4]} if "conv_dim" in given else {})}) == theirs(name, given)
        (text,) = exported.texts(Path("kohya")).values()
        again = imported(text)
        assert again.values["adapter"] == first.values["adapter"]
        assert again.values["optimizer"] == first.values["optimizer"]


def with_alphas(rng: random.Random, name: str) -> tuple[dict[str, Sequence[float]], str]:
    """Random lists of ranks and alphas, 0 among both, and a config with them."""
    count = COUNTS[name]
    given: dict[str, Sequence[float]] = {"block_dims": [rng.choice([8, 8, 16, 0]) for _ in range(count)]}
    if rng.random() < 0.8:  # else network_alpha is that of every block, whatever its rank
        given["block_alphas"] = [rng.choice([4, 4, 1, 0, 2.5]) for _ in range(count)]
    arguments: list[str] = []
    if rng.random() < 0.6:
        arguments += ["conv_dim=4", "conv_alpha=1"]
        given["conv_dim"] = [4]
        if rng.random() < 0.7:
            given["conv_block_dims"] = [rng.choice([4, 4, 8, 0]) for _ in range(count)]
            given["conv_block_alphas"] = [rng.choice([1, 1, 3, 0]) for _ in range(count)]
    arguments += [f"{key}={','.join(map(str, values))}" for key, values in given.items() if key != "conv_dim"]
    lines = [
        f'pretrained_model_name_or_path = "{BASES[name]}"',
        LEAST,
        "network_dim = 8",
        "network_alpha = 4",
        f"network_args = {arguments}",
    ]
    return given, "\n".join(lines)


def their_alphas(name: str, given: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """sd-scripts' alpha of every layer, by key, as it is in the file: one of 0 is the layer's rank."""
    ranks_of, _ = theirs(name, given)
    found: dict[str, float] = {}
    for layer in real(name):
        if layer.key not in ranks_of:
            continue
        block, spatial = their_block(name, layer.key), is_spatial(layer)
        usual = [1.0 if spatial else 4.0] * COUNTS[name]
        alphas = given.get("conv_block_alphas" if spatial else "block_alphas", usual)
        found[layer.key] = (4.0 if block < 0 else float(alphas[block])) or ranks_of[layer.key]
    return found


def alphas(found: Imported, layers: Sequence[Layer]) -> dict[str, float]:
    """What the file has as alpha of every layer that is trained."""
    adapter = settings(found)
    assert idle(adapter.block_alpha, (layer.names for layer in layers)) == [], "patterns without a layer stop the run"
    return {layer.key: adapter.alpha_for(layer) for layer in layers if Lora().fits(layer, adapter)}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_every_layer_has_its_alpha_also_after_an_export(imported: Any, name: str) -> None:
    rng = random.Random(9)
    for _ in range(6):
        given, config = with_alphas(rng, name)
        found = imported(config)
        assert not found.of("lost", "unknown")
        assert alphas(found, real(name)) == pytest.approx(their_alphas(name, given))
        assert ranks(found, real(name)) == theirs(name, given)[0]
        exported = export_recipe(found.values)
        assert [line.key for line in exported.lines if line.kind == "lost"] == []
        (text,) = exported.texts(Path("kohya")).values()
        assert alphas(imported(text), real(name)) == pytest.approx(their_alphas(name, given))


def imported_rates(imported: Any, name: str, *arguments: str) -> tuple[Imported, list[float]]:
    """An import, and the factors by block, 0 for one that is left out."""
    base = f'pretrained_model_name_or_path = "{BASES[name]}"'
    found = imported("\n".join([base, LEAST, f"network_args = {['conv_dim=4', *arguments]}"]))
    by_block = dict.fromkeys(range(COUNTS[name]), 0.0)
    told = factors(found, real(name))
    for layer in real(name):
        if layer.key in told and (block := their_block(name, layer.key)) >= 0:
            by_block[block] = told[layer.key]
    return found, list(by_block.values())


def test_curves_and_lists_of_other_lengths(imported: Any) -> None:
    """Block 0 in of SD is a convolution that no LoRA has; curves of 12 go from 0 to 1 in steps of 1/11."""
    found, told = imported_rates(imported, "sd", "down_lr_weight=sine+.25", "up_lr_weight=reverse_linear")
    assert told[1:12] == pytest.approx([math.sin(math.pi * place / 22) + 0.25 for place in range(1, 12)])
    assert told[12] == 1.0 and told[13:] == pytest.approx([place / 11 for place in reversed(range(12))])
    assert not found.of("lost")
    found, told = imported_rates(imported, "sd", "down_lr_weight=zeros", "mid_lr_weight=0.5", "up_lr_weight=cosine")
    assert told[:13] == [*[0.0] * 12, 0.5] and told[13] == 1.0 and told[24] == 0.0
    found, told = imported_rates(imported, "sdxl", "down_lr_weight=1,0.5", "up_lr_weight=1,,2", "mid_lr_weight=2,3,4,5")
    assert told == [0.0, 0.0, 0.5, *[1.0] * 7, 2.0, 3.0, 4.0, 1.0, 0.0, 2.0, *[1.0] * 6, 0.0]
    assert sum("sd-scripts" in warning for warning in found.warnings) == 3
    found, told = imported_rates(imported, "sd", "mid_lr_weight=0.5", "up_lr_weight=0.3", "block_lr_zero_threshold=0.5")
    assert told[12] == 0.0 and told[13:] == [1.0] * 12
    assert [line.key for line in found.of("unused")] == ["network_args: up_lr_weight"]


def test_lists_that_change_nothing_are_told_too(imported: Any) -> None:
    found, told = imported_rates(imported, "sd", "mid_lr_weight=1", f"block_dims={','.join(['4'] * 25)}")
    assert told[1:] == [1.0] * 24
    assert [line.setting for line in found.of("same") if line.key.endswith(("mid_lr_weight", "block_dims"))] == [
        "adapter.block_rank",
        "optimizer.block_lr",
    ]


def test_the_middle_of_sdxl_is_told_by_the_base(imported: Any) -> None:
    _, told = imported_rates(imported, "sdxl", "mid_lr_weight=0.5")
    assert told[10:13] == [0.5, 1.0, 1.0]


def test_rates_of_all_blocks(imported: Any) -> None:
    """block_lr of sdxl_train.py: absolute rates, embeddings in front and the output behind."""
    rates = ["1e-4"] * 23
    rates[5], rates[11], rates[0] = "5e-5", "0", "9e-4"
    config = f'{LEAST.replace(LEAST.splitlines()[0], "")}block_lr = "{",".join(rates)}"\nno_half_vae = true\n'
    found = imported(f'pretrained_model_name_or_path = "b.safetensors"\n{config}')
    told = factors(found, real("sdxl"))
    assert {told[layer.key] for layer in real("sdxl") if layer.key in told and their_block("sdxl", layer.key) == 5} == {
        0.5
    }
    assert not any(their_block("sdxl", key) == 11 for key in told)
    assert {told[key] for key in told if their_block("sdxl", key) not in (5, 11)} == {1.0}
    assert any("trains all weights" in warning for warning in found.warnings)
    lora = imported(f'pretrained_model_name_or_path = "b.safetensors"\n{LEAST}block_lr = "{",".join(rates)}"\n')
    assert "block_lr" not in lora.values["optimizer"] and [line.key for line in lora.of("unused")] == ["block_lr"]
    short = imported(f'pretrained_model_name_or_path = "b.safetensors"\n{config.replace("9e-4,", "")}')
    assert [line.key for line in short.of("lost")] == ["block_lr"]


@pytest.mark.parametrize(
    ("more", "arguments", "kind"),
    [
        ('network_module = "lycoris.kohya"', ["mid_lr_weight=0.5"], "unused"),
        ('network_module = "networks.lora"\nnetwork_train_text_encoder_only = true', ["mid_lr_weight=0.5"], "unused"),
        ('network_module = "networks.lora"', ["block_alphas=1,2"], "unused"),
        ('network_module = "networks.lora"', ["block_dims=1,2"], "lost"),
        ('network_module = "networks.lora"', ["down_lr_weight=1,x"], "lost"),
        ('network_module = "networks.lora"', ["mid_lr_weight=cosine"], "lost"),
        ('network_module = "networks.lora_flux"\nae = "a"', ["train_double_block_indices=0-x"], "lost"),
        ('network_module = "networks.lora_flux"\nae = "a"', ["train_double_block_indices=0-999999999999"], "lost"),
    ],
)
def test_lists_that_do_nothing_or_stop_the_run(imported: Any, more: str, arguments: list[str], kind: Any) -> None:
    lines = [more, *LEAST.splitlines()[1:], 'pretrained_model_name_or_path = "b"', f"network_args = {arguments}"]
    found = imported("\n".join(lines))
    told = [line for line in found.of(kind) if line.key.startswith(f"network_args: {arguments[0].split('=')[0]}")]
    assert len(told) == 1
    assert "block_rank" not in found.values["adapter"] and "block_lr" not in found.values["optimizer"]


# ---- Flux and SD3 ----

FLUX = LEAST.replace("networks.lora", "networks.lora_flux") + (
    'pretrained_model_name_or_path = "flux.safetensors"\nae = "ae"\nclip_l = "clip_l"\nt5xxl = "t5"\nmodel_prediction_type = "raw"\n'
    'guidance_scale = 1.0\ntimestep_sampling = "sigmoid"\nnetwork_dim = 8\nnetwork_alpha = 0\n'
)


def flux(imported: Any, *arguments: str) -> tuple[Imported, dict[str, int]]:
    """An import, and the ranks by key."""
    found = imported(f"{FLUX}network_args = {list(arguments)}")
    adapter = settings(found)
    layers = flux_layers()
    assert idle(adapter.block_rank, (layer.names for layer in layers)) == []
    ranks_of: dict[str, int | None] = {
        layer.names[0]: decide(adapter.block_rank, layer.names) if adapter.block_rank else None for layer in layers
    }
    return found, {key: 8 if rank is None else rank for key, rank in ranks_of.items()}


def flux_rank(key: str, chosen: Mapping[str, set[int]], kinds: Mapping[str, int]) -> int:
    """sd-scripts' rank of a layer of the blocks."""
    stream = re.match(r"lora_unet_(double|single)_blocks_(\d+)_(.*)", key)
    if stream is None:
        return 8
    if stream[1] in chosen and int(stream[2]) not in chosen[stream[1]]:
        return 0
    return next((rank for kind, rank in kinds.items() if kind in stream[3]), 8)


def test_kinds_and_blocks_of_flux(imported: Any) -> None:
    found, told = flux(imported, "img_attn_dim=16", "txt_mlp_dim=0", "single_dim=4", "single_mod_dim=2", "train_double_block_indices=0-3,7", "train_single_block_indices=none")  # fmt: skip # noqa: E501
    kinds = {"img_attn": 16, "txt_mlp": 0, "linear": 4, "modulation": 2}
    assert told == {key: flux_rank(key, {"double": {0, 1, 2, 3, 7}, "single": set()}, kinds) for key in told}
    assert not found.of("lost", "unknown")
    _, told = flux(imported, "train_double_block_indices=5", "single_dim=4", "train_single_block_indices=0-37")
    assert told == {key: flux_rank(key, {"double": {5}}, {"linear": 4}) for key in told}
    _, told = flux(imported, "train_blocks=single", "img_mod_dim=8")
    assert told == {key: 0 if "double" in key else 8 for key in told}


def test_ranks_of_flux_have_scales_of_their_own_there(imported: Any) -> None:
    """network_alpha / rank of each layer: its alpha is the same for all."""
    for given, alpha in (("network_alpha = 4", 4.0), ("", 1.0)):
        found = imported(
            FLUX.replace("network_alpha = 0", given)
            + 'network_args = ["single_dim=4", "img_attn_dim=16", "txt_mlp_dim=0"]'
        )
        adapter = settings(found)
        assert not found.of("lost") and adapter.alpha == alpha
        for layer in flux_layers():
            rank = decide(adapter.block_rank, layer.names)
            assert rank is None or rank == 0 or decide(adapter.block_alpha, layer.names) == alpha
        exported = export_recipe(found.values)
        assert (
            not [line.key for line in exported.lines if line.kind == "lost"]
            and exported.config["network_alpha"] == alpha
        )
        again = imported(next(iter(exported.texts(Path("kohya")).values())))
        assert again.values["adapter"] == found.values["adapter"]
    none = imported(FLUX.replace("network_alpha = 0", "network_alpha = 4") + 'network_args = ["single_dim=0"]')
    assert not none.of("lost") and settings(none).block_alpha is None
    around = imported(FLUX + 'network_args = ["in_dims=[4,0,0,0,4]"]')
    assert [line.key for line in around.of("lost")] == ["network_args: in_dims"]


REGULAR = [r"network_reg_dims=double_blocks_[0-4]_img=16,single_blocks=4,nowhere=2", r"network_reg_lrs=double_blocks_0_=5e-5,lora_te1=1e-5,double_blocks=2e-4,single_blocks_3=0"]  # fmt: skip # noqa: E501


def flux_rates(found: Imported, layers: Sequence[Named]) -> dict[str, float]:
    """The learning rate of every layer that is trained."""
    optimizer = found.values["optimizer"]
    table = optimizer.get("block_lr") or {}
    usual = {"text": optimizer["text_encoder_lr"][0]}
    rank = settings(found).block_rank
    return {
        layer.names[0]: (1.0 if (factor := decide(table, layer.names)) is None else factor)
        * usual.get(layer.kind, optimizer["lr"])
        for layer in layers
        if decide(rank, layer.names) != 0
    }


def test_expressions_of_flux(imported: Any) -> None:
    found, told = flux(imported, *REGULAR)
    for key, rank in told.items():
        wanted = 16 if re.search("double_blocks_[0-4]_img", key) else 4 if "single_blocks" in key else 8
        assert rank == (0 if "single_blocks_3" in key else wanted)
    rates = flux_rates(found, flux_layers())
    for key, rate in rates.items():
        wanted = 5e-5 if "double_blocks_0_" in key else 1e-5 if "te1" in key else 2e-4 if "double" in key else 1e-4
        assert rate == pytest.approx(wanted)
    assert len(rates) == sum(rank != 0 for rank in told.values())
    assert [line.key for line in found.of("unused")] == ["network_args: network_reg_dims"] and not found.of("lost")


def test_expressions_come_back_from_an_export(imported: Any) -> None:
    arguments = [REGULAR[0].replace(",nowhere=2", "").replace("16", "0"), REGULAR[1].replace("lora_te1=1e-5,", "")]
    first = imported(f"{FLUX}network_args = {arguments}".replace("single_blocks=4", "single_blocks=0"))
    exported = export_recipe(first.values)
    assert not [line.key for line in exported.lines if line.kind == "lost"]
    again = imported(next(iter(exported.texts(Path("kohya")).values())))
    assert again.values["adapter"]["block_rank"] == first.values["adapter"]["block_rank"]
    assert flux_rates(again, flux_layers()) == pytest.approx(flux_rates(first, flux_layers()))


@pytest.mark.parametrize("blocks", [24, 38])
def test_kinds_and_blocks_of_sd3(imported: Any, blocks: int) -> None:
    base = "sd3.5_large.safetensors" if blocks == 38 else "sd3_medium.safetensors"
    lines = [
        LEAST.replace("networks.lora", "networks.lora_sd3"), f'pretrained_model_name_or_path = "{base}"', 'clip_g = "g"',
        'network_dim = 8\nnetwork_alpha = 0\nnetwork_args = ["x_attn_dim=16", "context_mod_dim=0", "train_block_indices=0-20,23"]',
    ]  # fmt: skip
    found = imported("\n".join(lines))
    with torch.device("meta"):
        layers = list(sd3_layers("denoiser", SD3Transformer(SD3Config(blocks=blocks))))
    told = ranks(found, layers)
    for layer in layers:
        place = re.match(r"lora_unet_joint_blocks_(\d+)_(.*)", layer.key)
        if place is None:
            continue
        kind = 16 if place[2].startswith("x_block_attn") else 0 if "context_block_adaLN" in place[2] else 8
        assert told.get(layer.key, 0) == (kind if int(place[1]) in (*range(21), 23) else 0)
    whole = imported("\n".join(lines).replace("0-20,23", f"0-{blocks - 1}"))
    assert not any("joint_blocks" in pattern for pattern in settings(whole).block_rank or {})


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["down_lr_weight=0,0,0,1,1,1,1,1,1"], "unused"),
        ([f"block_dims={','.join(['8'] * 23)}", "down_lr_weight=0,0,0,1,1,1,1,1,1"], "unused"),
        ([f"block_dims={','.join(['8'] * 23)}", "down_lr_weight=1,1,1,1,0,1,1,1,1"], "converted"),
    ],
)
def test_factors_of_0_are_told_also_where_they_do_nothing(imported: Any, arguments: list[str], kind: str) -> None:
    """The first blocks of SDXL have no attention."""
    base = f'pretrained_model_name_or_path = "{BASES["sdxl"]}"\nnetwork_dim = 8\n'
    found = imported(f"{LEAST}{base}network_args = {arguments}\n")
    assert [line.kind for line in found.lines if line.key == "network_args: down_lr_weight"] == [kind]
