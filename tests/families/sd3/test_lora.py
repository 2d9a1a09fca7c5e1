"""A LoRA on Stable Diffusion 3: the loss, every gradient and the file against diffusers' own model, and a whole run of training.

diffusers does not know kohya's names of these layers. So what it loads is our file under diffusers' own names: products that are one
layer here and three there share their down projection.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorabake.adapters import graft
from lorabake.adapters.lora import LoraSettings
from lorabake.base.events import Events
from lorabake.families import load_model
from lorabake.families.sd3.model import SD3Model
from lorabake.formats.kohya import read_lora, write_lora
from lorabake.objectives.flow import FlowSettings, flow_for
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Alias, Layer, Model, Part
from lorabake.recipe import check_values
from lorabake.sampling.apply import apply_lora

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

SETTINGS = LoraSettings(rank=3, alpha=1.5)
PARTS: tuple[Part, ...] = ("denoiser", "text_encoder", "text_encoder_2")
FOLDERS: dict[Part, str] = {
    "denoiser": "transformer",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}
CAPTIONS = ["a girl, red hair, beach", "red girls!"]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture
def grafted(model: Model) -> Iterator[Graft]:
    """A LoRA on every layer, as training might have left it."""
    adapter = graft(model, "lora", SETTINGS, seed=1, parts=PARTS)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for named in adapter.parameters().values():
            for parameter in named.values():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    yield adapter
    adapter.remove()


class LowRank(nn.Module):
    """W + s·B·A on some of a layer's rows, by its definition."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = down, up

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight + self.scale * (self.up @ self.down), self.base.bias)


def places(model: Model, layer: Layer) -> list[tuple[str, Alias]]:
    """Where a layer is in diffusers': module paths, and which rows of ours are which of its."""
    from lorabake.families.sd3.card import sd3_pieces

    assert isinstance(model, SD3Model)
    if layer.part != "denoiser":
        return [(layer.path, Alias(""))]
    pieces = [piece for piece in sd3_pieces(model.transformer.config) if piece.ours == layer.path]
    return [(piece.theirs, Alias("", piece.our_rows, piece.their_rows)) for piece in pieces]


def rows_of(up: Tensor, found: list[tuple[str, Alias]], path: str) -> Tensor:
    """The rows of ``up`` that belong to one of diffusers' layers, in its order."""
    parts = [(alias.its_rows or (0, 0), alias.rows) for other, alias in found if other == path]
    return torch.cat([up[slice(*rows)] if rows else up for _, rows in sorted(parts, key=lambda part: part[0])])


def changed(theirs: Any, model: Model, tensors: dict[str, Tensor]) -> Any:
    """``theirs`` with every layer as ``tensors`` change it."""
    reference = copy.copy(theirs)
    for part, name in FOLDERS.items():
        root = copy.deepcopy(getattr(theirs, name))
        setattr(reference, name, root)
        for layer in model.layers():
            if layer.part != part or f"{layer.key}.lora_up.weight" not in tensors:
                continue
            found = places(model, layer)
            for path in dict.fromkeys(path for path, _ in found):
                parent, _, child = path.rpartition(".")
                holder = root.get_submodule(parent)
                up = rows_of(tensors[f"{layer.key}.lora_up.weight"], found, path)
                low = LowRank(holder.get_submodule(child), tensors[f"{layer.key}.lora_down.weight"], up, 0.5)
                setattr(holder, child, low)
    return reference


def encoded(theirs: Any, model: Model) -> tuple[Tensor, Tensor]:
    """What the pipeline's text encoders say, with gradients."""
    ids = model.tokenize(CAPTIONS)
    first, second = (
        getattr(theirs, part)(ids[part], output_hidden_states=True) for part in ("text_encoder", "text_encoder_2")
    )
    t5 = theirs.text_encoder_3(ids["text_encoder_3"])[0]
    both = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    padded = nn.functional.pad(both, (0, t5.shape[-1] - both.shape[-1]))
    return torch.cat([padded, t5], dim=1), torch.cat([first[0], second[0]], dim=-1)


def test_loss_and_every_gradient_are_those_of_diffusers(model: Model, grafted: Graft, theirs: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    latents, noise = (torch.randn(2, 4, 8, 12, generator=generator) for _ in range(2))
    timesteps = torch.tensor([730.5, 21.0])
    objective = flow_for(FlowSettings(), model)
    noisy = objective.corrupt(latents, noise, timesteps)
    output = model.predict(noisy, timesteps, model.encode_text(model.tokenize(CAPTIONS)))
    error = objective.error(output, objective.target(latents, noise, timesteps), timesteps).mean((1, 2, 3))
    loss = objective.weigh(error, timesteps).mean()
    loss.backward()
    parameters = {name: p for named in grafted.parameters().values() for name, p in named.items()}

    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    reference = changed(theirs, model, leaves)
    text, pooled = encoded(reference, model)
    prediction = reference.transformer(
        noisy, timestep=timesteps, encoder_hidden_states=text, pooled_projections=pooled
    ).sample
    expected = (prediction - (noise - latents)).square().mean()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    blocks = 10 * 3 - 3 + 2 * len(theirs.transformer.config.dual_attention_layers)
    assert len(parameters) == 2 * (blocks + 6 * 2 + 6 * 3)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    size = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    difference = torch.zeros(())
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        # What is left of terms that nearly cancel has float32's noise of the terms.
        apart = (parameter.grad - gradients[name]).norm()
        assert apart <= 1e-4 * gradients[name].norm() + 1e-6 * size, name
        difference += apart.square()
    assert difference.sqrt() <= 1e-5 * size


def their_file(model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's tensors under diffusers' names; its files have no alpha beside the weights, so the scale goes into them."""
    found: dict[str, Tensor] = {}
    for layer in model.layers():
        if f"{layer.key}.lora_up.weight" not in tensors:
            continue
        pairs = places(model, layer)
        for path in dict.fromkeys(path for path, _ in pairs):
            name = f"{FOLDERS[layer.part]}.{path}"
            found[f"{name}.lora_A.weight"] = tensors[f"{layer.key}.lora_down.weight"].clone()
            found[f"{name}.lora_B.weight"] = 0.5 * rows_of(tensors[f"{layer.key}.lora_up.weight"], pairs, path)
    return found


@torch.no_grad()
def our_answer(model: Model) -> tuple[Tensor, Tensor]:
    told = model.encode_text(model.tokenize(CAPTIONS))
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    return told["pooled_BP"], model.predict(latents, torch.tensor([500.0, 20.0]), told)


@torch.no_grad()
def their_answer(theirs: Any) -> tuple[Tensor, Tensor]:
    text, _, pooled, _ = theirs.encode_prompt(CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    told = {"encoder_hidden_states": text, "pooled_projections": pooled}
    return pooled, theirs.transformer(latents, timestep=torch.tensor([500.0, 20.0]), **told).sample


def assert_close(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_lora_file_means_the_same_everywhere(model: Model, grafted: Graft, theirs: Any, tmp_path: Path) -> None:
    """The live adapter, its file, the same in diffusers, and diffusers' file here."""
    live, plain = our_answer(model), their_answer(theirs)
    write_lora(tmp_path / "mira.safetensors", grafted.tensors(), {"ss_network_dim": "3"}, "fp32")
    grafted.remove()
    own = our_answer(model)
    assert_close(own, plain)
    assert all((one - other).abs().max() > 0.02 for one, other in zip(live, plain, strict=True)), "the LoRA shows"

    ours = apply_lora(model, tmp_path / "mira.safetensors")
    assert_close(our_answer(model), live)
    ours.remove()
    tensors = load_file(tmp_path / "mira.safetensors")
    assert "lora_unet_joint_blocks_2_context_block_attn_qkv.lora_up.weight" in tensors
    assert set(read_lora(tmp_path / "mira.safetensors").layers) == {name.partition(".")[0] for name in tensors}

    named = their_file(model, tensors)
    save_file(named, tmp_path / "theirs.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    try:
        modules = [name for part in FOLDERS.values() for name, _ in getattr(theirs, part).named_modules()]
        assert sum(name.endswith("lora_A.default_0") for name in modules) == len(named) // 2
        assert_close(their_answer(theirs), live)
    finally:
        theirs.unload_lora_weights()

    read = apply_lora(model, tmp_path / "theirs.safetensors")
    assert_close(our_answer(model), live)
    read.remove()
    assert all(torch.equal(*pair) for pair in zip(our_answer(model), own, strict=True)), "nothing is left behind"


def test_a_recipe_trains_it(folder: Path, tmp_path: Path) -> None:
    from lorabake.pocket.world import draw, sample
    from lorabake.sampling.infotext import save_png
    from lorabake.train.run import train

    rng = random.Random(1)
    for index in range(3):
        drawing = draw(sample(rng), index, 64)
        save_png(drawing.image, tmp_path / "pictures" / "1_mira" / f"{index}.png")
        (tmp_path / "pictures" / "1_mira" / f"{index}.txt").write_text(", ".join(drawing.tags))
    recipe = {
        "model": {"base": str(folder)},
        "data": {"folder": str(tmp_path / "pictures"), "buckets": {"resolution": 32}},
        "adapter": {"rank": 2},
        "optimizer": {"lr": 1e-2, "text_encoder_lr": 1e-3},
        "train": {"length": "4 steps", "batch_size": 2, "device": "cpu", "gradient_checkpointing": True},
        "save": {"dtype": "fp32"},
        "sample": {"prompts": ["a red girl --s 2 --d 1 --w 32 --h 32"]},
        "output": {"name": "mira"},
    }
    checked = check_values(recipe)
    assert checked.recipe.objective.name == "flow" and checked.facts.family == "sd3"
    outcome = train(checked, tmp_path / "run", Events())
    assert outcome.finished and outcome.steps == 4
    assert list((tmp_path / "run" / "samples").rglob("*.png"))
    file = read_lora(next((tmp_path / "run" / "checkpoints").glob("mira.safetensors")))
    assert file.metadata["ss_base_model_version"] == "sd3"
    assert file.metadata["modelspec.architecture"].startswith("stable-diffusion-v3")
    model = load_model(folder)
    assert len(file.layers) == sum(layer.group != "other" for layer in model.layers())
    assert all(bool(tensors["lora_up.weight"].any()) for tensors in file.layers.values()), "every layer learned"
    before = our_answer(model)
    apply_lora(model, tmp_path / "run" / "checkpoints" / "mira.safetensors")
    assert all((one - other).abs().max() > 1e-5 for one, other in zip(our_answer(model), before, strict=True))
