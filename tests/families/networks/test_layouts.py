"""The key tables at the real sizes of SD1.5, SD2.1 and SDXL: what published files contain, and sizes read back from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from lorabake.base.errors import UserError
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.components import clip_in, ldm_unet_in, vae_in
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.layouts import Paths, ldm_unet, ldm_vae
from lorabake.families.networks.load import fill
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.networks.vae import AutoencoderKL
from lorabake.families.networks.weights import open_weights
from lorabake.families.sd.model import _layers

SD15 = UNetConfig(cross_attention_dim=768)
SD21 = UNetConfig(cross_attention_dim=1024, heads=(5, 10, 20, 20), use_linear_projection=True)
SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    layers_per_block=(2, 2, 2),
    heads=(5, 10, 20),
    transformer_depth=(1, 2, 10),
    attends_down=(False, True, True),
    attends_up=(False, True, True),
    cross_attention_dim=2048,
    use_linear_projection=True,
    micro_channels=2816,
)
KNOWN = {
    "time_embed.2.bias": (1280,),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.8.1.proj_in.weight": (1280, 1280, 1, 1),
    "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "middle_block.2.emb_layers.1.weight": (1280, 1280),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.8.0.in_layers.2.weight": (640, 960, 3, 3),
    "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
    "output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
    "out.0.weight": (320,),
    "out.2.weight": (4, 320, 3, 3),
}
"""Some of what every SD1.x file holds below ``model.diffusion_model.``."""
KNOWN_VAE = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "decoder.mid.attn_1.proj_out.bias": (512,),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.norm_out.weight": (128,),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.bias": (4,),
}


def stored(network: nn.Module, paths: Paths) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network in the layout of single files."""
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in network.state_dict().items():
        theirs = paths.theirs(name)
        assert theirs is not None, name
        convolution = ".mid.attn_1." in theirs and tensor.dim() == 2
        found[theirs] = (*tensor.shape, 1, 1) if convolution else tuple(tensor.shape)
    return found


def unet_of(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return stored(UNet2DConditionModel(config), ldm_unet(config))


def hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros that takes no room on the disk."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def prefixed(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def test_the_unet_of_sd15_has_the_names_of_published_files() -> None:
    shapes = unet_of(SD15)
    assert len(shapes) == 686
    assert {name: shapes.get(name) for name in KNOWN} == KNOWN
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 859_520_964


def test_the_autoencoder_has_the_names_of_published_files() -> None:
    with torch.device("meta"):
        shapes = stored(AutoencoderKL(VaeConfig()), ldm_vae(VaeConfig()))
    assert len(shapes) == 248
    assert {name: shapes.get(name) for name in KNOWN_VAE} == KNOWN_VAE
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_653_863


@pytest.mark.parametrize(("config", "heads"), [(SD15, 8), (SD21, None), (SDXL, None)], ids=["sd15", "sd21", "sdxl"])
def test_sizes_are_read_back_from_shapes(tmp_path: Path, config: UNetConfig, heads: int | None) -> None:
    file = hollow(tmp_path / "model.safetensors", prefixed("model.diffusion_model.", unet_of(config)))
    assert ldm_unet_in(open_weights(file), heads).config == config


def test_sizes_of_the_autoencoder_in_both_layouts(tmp_path: Path) -> None:
    for config in (VaeConfig(), VaeConfig(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)):
        with torch.device("meta"):
            network = AutoencoderKL(config)
        own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for shapes in (prefixed("first_stage_model.", stored(network, ldm_vae(config))), own):
            found = vae_in(open_weights(hollow(tmp_path / "vae.safetensors", shapes)), config.scaling_factor)
            assert found is not None and found.config == config


def test_sizes_of_the_text_encoders(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = CLIPTextModel(ClipConfig())
    classic = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    bare = {name.removeprefix("text_model."): shape for name, shape in classic.items()}
    for shapes in (prefixed("cond_stage_model.transformer.", classic), classic, bare):
        found = clip_in(open_weights(hollow(tmp_path / "clip.safetensors", shapes)))
        assert found is not None and found.config == ClipConfig()


def test_text_encoders_of_open_clip(tmp_path: Path) -> None:
    """As SD2 (ViT-H, the last layer left out) and SDXL (ViT-bigG) hold them."""
    for width, layers, projection, skipped in ((1024, 24, 1024, 1), (1280, 32, 1280, 0)):
        shapes: dict[str, tuple[int, ...]] = {
            "positional_embedding": (77, width),
            "token_embedding.weight": (49408, width),
            "text_projection": (width, projection),
            "ln_final.weight": (width,),
            "ln_final.bias": (width,),
        }
        for number in range(layers):
            to = f"transformer.resblocks.{number}"
            shapes |= {f"{to}.attn.in_proj_weight": (3 * width, width), f"{to}.attn.in_proj_bias": (3 * width,)}
            linears = {
                "attn.out_proj": (width, width),
                "mlp.c_fc": (4 * width, width),
                "mlp.c_proj": (width, 4 * width),
            }
            for name, shape in linears.items():
                shapes |= {f"{to}.{name}.weight": shape, f"{to}.{name}.bias": shape[:1]}
            for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
                shapes[f"{to}.{name}"] = (width,)
        found = clip_in(open_weights(hollow(tmp_path / "clip.safetensors", shapes)), skipped=skipped)
        assert found is not None
        assert found.config == ClipConfig(
            hidden_size=width, intermediate_size=4 * width, layers=layers - skipped, heads=width // 64, quick_gelu=False,
            projection_dim=projection,
        )  # fmt: skip
        with torch.device("meta"):
            wanted = set(CLIPTextModel(found.config).state_dict())
        named = [target.name for name in found.weights for target in found.rename(name)]
        assert sorted(named) == sorted(wanted)


def test_one_tensor_of_three_and_one_turned(tmp_path: Path) -> None:
    """Queries, keys and values are rows of one tensor, and the projection is stored turned."""
    from safetensors.torch import save_file

    from lorabake.families.networks.clip import CLIPTextModelWithProjection

    width, base = 64, "transformer.resblocks.0."
    tensors = {
        "positional_embedding": torch.randn(77, width),
        "token_embedding.weight": torch.randn(99, width),
        "text_projection": torch.randn(width, 48),
        f"{base}attn.in_proj_weight": torch.randn(3 * width, width),
        f"{base}attn.in_proj_bias": torch.randn(3 * width),
        **{f"{base}{name}.weight": torch.randn(width, width) for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")},
        **{f"{base}{name}.bias": torch.randn(width) for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")},
        **{
            f"{name}.{kind}": torch.randn(width)
            for name in (f"{base}ln_1", f"{base}ln_2", "ln_final")
            for kind in ("weight", "bias")
        },
    }
    save_file(tensors, tmp_path / "clip.safetensors")
    found = clip_in(open_weights(tmp_path / "clip.safetensors"), projection=True)
    assert found is not None
    state = fill(lambda: CLIPTextModelWithProjection(found.config), found.weights, found.rename).state_dict()
    layer = "text_model.encoder.layers.0.self_attn."
    for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
        for kind in ("weight", "bias"):
            rows = tensors[f"{base}attn.in_proj_{kind}"][index * width : (index + 1) * width]
            assert torch.equal(state[f"{layer}{part}.{kind}"], rows)
    assert torch.equal(state["text_projection.weight"], tensors["text_projection"].T)


def lora_names_of_sd15() -> Iterable[str]:
    """What kohya's scripts adapt in SD1.5, by rule: six places with two transformers or three, one in the middle, twelve text layers."""
    attentions = [f"down_blocks_{level}_attentions_{number}" for level in (0, 1, 2) for number in (0, 1)]
    attentions += ["mid_block_attentions_0"]
    attentions += [f"up_blocks_{level}_attentions_{number}" for level in (1, 2, 3) for number in (0, 1, 2)]
    inside = [f"attn{which}_to_{part}" for which in (1, 2) for part in ("q", "k", "v", "out_0")] + [
        "ff_net_0_proj",
        "ff_net_2",
    ]
    for place in attentions:
        yield f"lora_unet_{place}_proj_in"
        yield f"lora_unet_{place}_proj_out"
        yield from (f"lora_unet_{place}_transformer_blocks_0_{name}" for name in inside)
    for number in range(12):
        for name in (
            "self_attn_q_proj",
            "self_attn_k_proj",
            "self_attn_v_proj",
            "self_attn_out_proj",
            "mlp_fc1",
            "mlp_fc2",
        ):
            yield f"lora_te_text_model_encoder_layers_{number}_{name}"


def test_names_of_lora_layers_on_sd15() -> None:
    with torch.device("meta"):
        unet, text = UNet2DConditionModel(SD15), CLIPTextModel(ClipConfig())
    layers = [*_layers("denoiser", unet), *_layers("text_encoder", text)]
    names = [layer.key for layer in layers if layer.group in ("transformer", "text")]
    assert set(names) == set(lora_names_of_sd15()) and len(names) == 264
    assert sum(name.startswith("lora_unet_") for name in names) == 192
    assert names[0] == "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert names[-1] == "lora_te_text_model_encoder_layers_11_mlp_fc2"


def test_channels_that_cannot_be_split(tmp_path: Path) -> None:
    shapes = unet_of(UNetConfig(block_out_channels=(40, 80, 80, 80), norm_num_groups=8))
    file = hollow(tmp_path / "model.safetensors", prefixed("model.diffusion_model.", shapes))
    with pytest.raises(UserError, match=r"40 channels .* 8 heads and 32 groups"):
        ldm_unet_in(open_weights(file), 8)
