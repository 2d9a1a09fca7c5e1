"""LoRA files of SDXL as diffusers' training scripts write them: drawn with here, they say what they say there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.families import load_model
from lorabake.families.sdxl.model import layers_of
from lorabake.protocols.family import Model
from lorabake.sampling.apply import apply_lora

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

CAPTIONS = ["1girl, red hair, smile, beach", "night"]
TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


@pytest.fixture
def changed(pipeline: Any) -> Any:
    """A copy of diffusers' pipeline with adapters of every part, as training might have left them."""
    from peft import LoraConfig

    changed = copy.deepcopy(pipeline)
    torch.manual_seed(4)
    for part, targets in TARGETS.items():
        module: Any = getattr(changed, part)
        module.add_adapter(LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=targets))
    return changed


def save(changed: Any, folder: Path, parts: list[str], *, old_names: bool) -> Path:
    """``pytorch_lora_weights.safetensors``, with PEFT's names of late scripts or with ``lora.down`` of earlier ones."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = {f"{part}_lora_layers": get_peft_model_state_dict(getattr(changed, part)) for part in parts}
    if old_names:
        layers = {
            part: {
                name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
                for name, tensor in (state if part == "unet_lora_layers" else convert_state_dict_to_diffusers(state)).items()
            }
            for part, state in layers.items()
        }  # fmt: skip
    metadata = _collate_lora_metadata({part: getattr(changed, part) for part in parts})
    type(changed).save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def answers(pipeline: Any) -> tuple[Tensor, Tensor, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 2)}
    return text, pooled, pipeline.unet(latents(), torch.tensor([500, 20]), text, added_cond_kwargs=told).sample


@torch.no_grad()
def our_answers(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    told = model.encode_text(model.tokenize(CAPTIONS))
    sizes = {"time_ids_B6": torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 2)}
    return told["text_BLD"], told["pooled_BD"], model.predict(latents(), torch.tensor([500, 20]), told | sizes)


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("old_names", [False, True])
def test_every_part(folder: Path, pipeline: Any, changed: Any, tmp_path: Path, old_names: bool) -> None:
    file = save(changed, tmp_path, list(TARGETS), old_names=old_names)
    model = load_model(folder)
    plain, expected = answers(pipeline), answers(changed)
    applied = apply_lora(model, file)
    for given, wanted, before in zip(our_answers(model), expected, plain, strict=True):
        assert (before - wanted).abs().max() > 0.02, "the LoRA shows"
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    applied.remove()


def test_the_first_text_encoder_alone(folder: Path, pipeline: Any, changed: Any, tmp_path: Path) -> None:
    """Such a file could be one of SD1.x: nothing in it says that there is a second."""
    file = save(changed, tmp_path, ["text_encoder"], old_names=False)
    model = load_model(folder)
    apply_lora(model, file)
    expected = changed.text_encoder(model.tokenize(CAPTIONS)["text_encoder"], output_hidden_states=True)
    given, _, _ = our_answers(model)
    torch.testing.assert_close(given[..., :64], expected.hidden_states[-2].detach(), rtol=1e-4, atol=1e-5)


def test_no_other_name_is_the_key_of_another_layer(folder: Path) -> None:
    layers = list(layers_of(load_model(folder).parts))
    keys, aliases = {layer.key for layer in layers}, [alias.key for layer in layers for alias in layer.aliases]
    assert len(aliases) == len(set(aliases)) and not keys & set(aliases)
