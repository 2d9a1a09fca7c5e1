"""Our files in the hands of diffusers: the names are its modules', and the effect is W + alpha / rank · up · down."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lorabake.base.places import POCKET_MODEL
from lorabake.formats.kohya import read_lora, write_lora

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

RANK, ALPHA = 4, 2.0
PINNED = Path(__file__).with_name("sd15_keys.txt")


def targets(unet: nn.Module, text_encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that kohya's LoRA changes by default: linear and 1x1 convolution layers in transformers."""
    for block, module in unet.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            for path, layer in module.named_modules():
                if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
                    yield f"lora_unet_{block}_{path}".replace(".", "_"), layer
    for block, module in text_encoder.named_modules():
        if type(module).__name__ in ("CLIPAttention", "CLIPMLP"):
            block = block if block.startswith("text_model.") else f"text_model.{block}"
            for path, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    yield f"lora_te_{block}_{path}".replace(".", "_"), layer


def test_the_264_names_of_stable_diffusion_1_5() -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the defaults are SD1.5's, but for this
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
    keys = sorted(key for key, _ in targets(unet, text_encoder))
    assert keys == PINNED.read_text().split()
    assert sum(key.startswith("lora_unet_") for key in keys) == 192
    assert sum(key.startswith("lora_te_") for key in keys) == 72


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        POCKET_MODEL, local_files_only=True, safety_checker=None, dtype=torch.float32
    )


def random_lora(pipeline: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for key, layer in targets(pipeline.unet, pipeline.text_encoder):
        out, into, *kernel = layer.get_parameter("weight").shape
        tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, into, *kernel, generator=generator) * 0.05
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, RANK, *kernel, generator=generator) * 0.05
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


@torch.no_grad()
def merged(pipeline: Any, tensors: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    """Copies of both models with W + s·BA written into their weights."""
    unet, text_encoder = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.text_encoder)
    for key, layer in targets(unet, text_encoder):
        weight = layer.get_parameter("weight")
        change = tensors[f"{key}.lora_up.weight"].flatten(1) @ tensors[f"{key}.lora_down.weight"].flatten(1)
        weight += ALPHA / RANK * change.reshape(weight.shape)
    return unet, text_encoder


@torch.no_grad()
def outputs(unet: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
    ids_BL = torch.arange(77).reshape(1, 77)
    hidden_BLD = text_encoder(ids_BL)[0]
    latents_BCHW = torch.randn(1, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(2))
    return hidden_BLD, unet(latents_BCHW, torch.tensor([500]), hidden_BLD).sample


def test_diffusers_computes_what_the_file_means(pipeline: Any, tmp_path: Path) -> None:
    tensors = random_lora(pipeline)
    write_lora(tmp_path / "mira.safetensors", tensors, {"ss_network_dim": str(RANK)}, "fp32")
    plain = outputs(pipeline.unet, pipeline.text_encoder)
    expected = outputs(*merged(pipeline, tensors))
    pipeline.load_lora_weights(tmp_path, weight_name="mira.safetensors")
    try:
        loaded = outputs(pipeline.unet, pipeline.text_encoder)
    finally:
        pipeline.unload_lora_weights()
    for before, wanted, got in zip(plain, expected, loaded, strict=True):
        assert (before - wanted).abs().max() > 0.02, "the LoRA is large enough to be seen"
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_files_that_diffusers_saves_are_read(pipeline: Any, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet, text_encoder = copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.text_encoder)
    config = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False}
    unet.add_adapter(LoraConfig(target_modules=["to_q", "to_out.0"], **config))
    text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"], **config))
    weights = {"unet": get_peft_model_state_dict(unet), "text_encoder": get_peft_model_state_dict(text_encoder)}
    type(pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(weights["unet"]),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(weights["text_encoder"]),
        weight_name="theirs.safetensors",
        **_collate_lora_metadata({"unet": unet, "text_encoder": text_encoder}),
    )
    layers = read_lora(tmp_path / "theirs.safetensors").layers
    known = {key for key, _ in targets(pipeline.unet, pipeline.text_encoder)}
    assert set(layers) == {key for key in known if key.endswith(("_to_q", "_to_out_0", "_q_proj"))}
    assert all(tensors["alpha"] == ALPHA for tensors in layers.values())
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    module = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert torch.equal(layers[key]["lora_down.weight"], module.lora_A["default"].weight)
    assert torch.equal(layers[key]["lora_up.weight"], module.lora_B["default"].weight)


def test_dora_is_the_same_in_peft(pipeline: Any) -> None:
    """Not through a file: diffusers leaves kohya's ``dora_scale`` out when it reads one, and says so."""
    from peft import LoraConfig

    from lorabake.adapters import graft
    from lorabake.adapters.lora import LoraSettings
    from lorabake.families import load_model

    model: Any = load_model("pocket")
    ours = graft(model, "lora", LoraSettings(rank=RANK, alpha=ALPHA, dora=True), seed=1, parts=("denoiser",))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ours.parameters()["denoiser"].values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    unet, hidden_BLD = copy.deepcopy(pipeline.unet), outputs(pipeline.unet, pipeline.text_encoder)[0]
    changed: list[Any] = [layer.change for layer in cast(Any, ours).layers]
    paths = [change.layer.path for change in changed]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=int(ALPHA), use_dora=True, target_modules=paths))
    for change, path in zip(changed, paths, strict=True):
        theirs = unet.get_submodule(path)
        magnitudes = theirs.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitudes.flatten(), weight_norms(theirs), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            theirs.lora_A["default"].weight.copy_(change.weights["lora_down.weight"])
            theirs.lora_B["default"].weight.copy_(change.weights["lora_up.weight"])
            magnitudes.copy_(change.weights["dora_scale"].view(magnitudes.shape))
    latents_BCHW = torch.randn(1, model.facts.latent_channels, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = unet(latents_BCHW, torch.tensor([500]), hidden_BLD).sample
        drawn = model.parts["denoiser"](latents_BCHW, torch.tensor([500]), hidden_BLD)
        plain = pipeline.unet(latents_BCHW, torch.tensor([500]), hidden_BLD).sample
    assert (plain - expected).abs().max() > 0.02, "the change is large enough to be seen"
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def weight_norms(layer: Any) -> Tensor:
    """Of what makes each output of PEFT's layer's base."""
    return layer.base_layer.weight.detach().flatten(1).norm(dim=1)
