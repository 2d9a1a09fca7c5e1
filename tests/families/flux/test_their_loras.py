"""LoRA files of Flux.1 as diffusers and ai-toolkit write them: queries, keys and values apart, which are one product here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.protocols.family import Model
from lorabake.sampling.apply import apply_lora

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

CAPTIONS = ["a girl, red hair, beach", "red girls!"]
USUAL = [
    "to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
]  # fmt: skip
"""What diffusers' training script trains."""


@pytest.fixture(params=["usual", "all"])
def changed(request: pytest.FixtureRequest, dev_folder: Path) -> Any:
    """diffusers' pipeline with adapters on what its script trains, or on every linear layer, of different ranks and alphas."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from peft import LoraConfig

    changed: Any = FluxPipeline.from_pretrained(dev_folder)
    torch.manual_seed(4)
    names = USUAL if request.param == "usual" else "all-linear"
    special: dict[str, Any] = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 3, "ff.net.2": 5}}
    changed.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=names, **special)
    )
    changed.text_encoder.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "fc1"]))
    return changed


def saved(changed: Any, folder: Path) -> Path:
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    parts = {"transformer": changed.transformer, "text_encoder": changed.text_encoder}
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(module) for part, module in parts.items()}
    type(changed).save_lora_weights(folder, **layers, **_collate_lora_metadata(parts))
    return folder / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def their_answers(theirs: Any, length: int) -> tuple[Tensor, Tensor]:
    text, pooled, ids = theirs.encode_prompt(CAPTIONS, CAPTIONS, max_sequence_length=length)
    output = theirs.transformer(
        hidden_states=theirs._pack_latents(latents(), 2, 4, 8, 12),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([0.7, 0.02]),
        img_ids=theirs._prepare_latent_image_ids(2, 4, 6, latents().device, torch.float32),
        txt_ids=ids,
        guidance=torch.tensor([1.0, 3.5]),
    ).sample
    return pooled, theirs._unpack_latents(output, 16, 24, vae_scale_factor=2)


@torch.no_grad()
def our_answers(model: Model) -> tuple[Tensor, Tensor]:
    told = model.encode_text(model.tokenize(CAPTIONS))
    answer = model.predict(latents(), torch.tensor([700.0, 20.0]), told | {"guidance_B": torch.tensor([1.0, 3.5])})
    return told["pooled_BD"], answer


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))


def close(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_what_diffusers_saves(dev_folder: Path, changed: Any, tmp_path: Path) -> None:
    model = load_model(dev_folder)
    plain = our_answers(model)
    expected = their_answers(changed, 512)
    for before, wanted in zip(plain, expected, strict=True):
        assert (before - wanted).abs().max() > 0.02, "the LoRA shows"
    applied = apply_lora(model, saved(changed, tmp_path))
    close(our_answers(model), expected)
    applied.remove()
    assert all(torch.equal(one, other) for one, other in zip(our_answers(model), plain, strict=True))


def test_other_tools_names_of_the_same(dev_folder: Path, changed: Any, tmp_path: Path) -> None:
    """In kohya's manner (``lora_transformer_…``), the alpha beside the weights; in halves of rank that have no alpha at all."""
    theirs = load_file(saved(changed, tmp_path))
    model = load_model(dev_folder)
    apply_lora(model, tmp_path / "pytorch_lora_weights.safetensors")
    expected = our_answers(model)
    tensors: dict[str, Tensor] = {}
    configs = {"transformer": changed.transformer, "text_encoder": changed.text_encoder}
    for name, tensor in theirs.items():
        part, _, path = name.partition(".")
        path, kind = path.replace(".weight", "").rsplit(".", 1)
        module = configs[part].get_submodule(path.removeprefix("text_model."))
        prefix = {"transformer": "lora_transformer", "text_encoder": "lora_te1"}[part]
        full = path if part == "transformer" or path.startswith("text_model.") else f"text_model.{path}"
        key = f"{prefix}_{full.replace('.', '_')}"
        tensors[f"{key}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(module.scaling["default"] * module.r["default"])
    save_file(tensors, tmp_path / "other.safetensors")
    model = load_model(dev_folder)
    apply_lora(model, tmp_path / "other.safetensors")
    close(our_answers(model), expected)


def test_dora_of_a_piece_is_refused(dev_folder: Path, tmp_path: Path) -> None:
    path = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{path}.lora_A.weight": torch.ones(2, 64), f"{path}.lora_B.weight": torch.ones(64, 2)}
    save_file(pair | {f"{path}.lora_magnitude_vector": torch.ones(64)}, tmp_path / "dora.safetensors")
    with pytest.raises(UserError, match=r"dora_scale.*part of 'lora_unet_double_blocks_0_img_attn_qkv'"):
        apply_lora(load_model(dev_folder), tmp_path / "dora.safetensors")


def test_no_other_name_is_the_key_of_another_layer(dev_folder: Path) -> None:
    layers = load_model(dev_folder).layers()
    keys = {layer.key for layer in layers}
    owners = {(alias.key, layer.key) for layer in layers for alias in layer.aliases}
    assert len({alias for alias, _ in owners}) == len(owners) and not keys & {alias for alias, _ in owners}
    for layer in layers:
        rows = [row for alias in layer.aliases for row in range(*(alias.rows or (0, 0)))]
        assert not rows or sorted(rows) == list(range(len(layer.module.get_parameter("weight")))), layer.key
