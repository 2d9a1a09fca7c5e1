"""LoRA's own rules: which layers, what scale, what is dropped, and agreement with W + s·B·A worked out elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.adapters import graft, graft_file
from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families import load_model
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.config import ClipConfig, UNetConfig
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.sd.model import _layers
from lorabake.protocols.family import Layer, LayerGroup, Prediction

TYPE = Lora()


def layer(module: nn.Module, group: LayerGroup = "transformer") -> Layer:
    return Layer("denoiser", "x", module, group, "lora_unet_x")


def born(
    module: nn.Module, group: LayerGroup = "transformer", **settings: Any
) -> tuple[dict[str, Tensor], LoraSettings]:
    """Weights and constants of a newborn LoRA on one layer."""
    chosen = LoraSettings(**settings)
    weights, constants = TYPE.create(layer(module, group), chosen, torch.Generator().manual_seed(4))
    return {**weights, **constants}, chosen


# ---- which layers


@pytest.fixture(scope="module")
def sd15() -> list[Layer]:
    """Every layer of an SD1.5 model, without its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig(cross_attention_dim=768))
        text = CLIPTextModel(ClipConfig())
    return [*_layers("denoiser", unet), *_layers("text_encoder", text)]


def test_targets_on_sd15_are_those_of_other_tools(sd15: list[Layer]) -> None:
    chosen = [found for found in sd15 if TYPE.fits(found, LoraSettings())]
    assert sum(found.part == "denoiser" for found in chosen) == 192
    assert sum(found.part == "text_encoder" for found in chosen) == 72
    assert {found.group for found in chosen} == {"transformer", "text"}
    pinned = (Path(__file__).parent.parent / "formats" / "sd15_keys.txt").read_text().split()
    assert {found.key for found in chosen} == set(pinned)


def test_with_a_conv_rank_residual_blocks_follow(sd15: list[Layer]) -> None:
    settings = LoraSettings(rank=8, conv_rank=4)
    extra = [found for found in sd15 if TYPE.fits(found, settings) and not TYPE.fits(found, LoraSettings())]
    assert {found.group for found in extra} == {"resnet"}
    ranks = {name: {settings.rank_for(found) for found in extra if found.path.endswith(name)}
             for name in ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")}  # fmt: skip
    assert ranks == {"conv1": {4}, "conv2": {4}, "conv_shortcut": {8}, "time_emb_proj": {8},
                     "downsamplers.0.conv": {4}, "upsamplers.0.conv": {4}}  # fmt: skip
    counts = {name: sum(found.path.endswith(name) for found in extra) for name in ranks}
    assert counts == {"conv1": 22, "conv2": 22, "conv_shortcut": 14, "time_emb_proj": 22,
                      "downsamplers.0.conv": 3, "upsamplers.0.conv": 3}  # fmt: skip


@pytest.mark.parametrize("path", ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"])
def test_the_ends_of_the_network_are_never_changed(sd15: list[Layer], path: str) -> None:
    (found,) = [found for found in sd15 if found.path == path]
    assert not TYPE.fits(found, LoraSettings(rank=4, conv_rank=4))


def test_no_layer_at_all_is_an_error() -> None:
    model = load_model("pocket")
    with pytest.raises(UserError, match="finds no layer to train"):
        graft(model, "lora", LoraSettings(), seed=1, parts=())


# ---- scale and shapes


@pytest.mark.parametrize(
    ("given", "linear", "conv"),
    [
        (dict(rank=8), 8, None),
        (dict(rank=8, alpha=4), 4, None),
        (dict(rank=8, conv_rank=4), 8, 4),
        (dict(rank=8, alpha=2, conv_rank=4, conv_alpha=1), 2, 1),
        (dict(rank=8, alpha=2, conv_rank=4), 2, 4),
    ],
)
def test_alpha(given: dict[str, Any], linear: float, conv: float | None) -> None:
    settings = LoraSettings(**given)
    assert settings.alpha_for(layer(nn.Linear(4, 4))) == linear
    assert settings.alpha_for(layer(nn.Conv2d(4, 4, 1))) == linear
    if conv is not None:
        assert settings.alpha_for(layer(nn.Conv2d(4, 4, 3), "resnet")) == conv


def test_a_conv_alpha_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="does nothing without conv_rank"):
        LoraSettings(conv_alpha=1)


def test_shapes_of_the_file() -> None:
    weights, _ = born(nn.Conv2d(6, 8, 3), rank=5, conv_rank=2)
    assert weights["lora_down.weight"].shape == (2, 6, 3, 3) and weights["lora_up.weight"].shape == (8, 2, 1, 1)
    weights, _ = born(nn.Conv2d(6, 8, 1), rank=5, conv_rank=2)
    assert weights["lora_down.weight"].shape == (5, 6, 1, 1) and weights["lora_up.weight"].shape == (8, 5, 1, 1)
    weights, _ = born(nn.Linear(6, 8), rank=5)
    assert weights["lora_down.weight"].shape == (5, 6) and weights["lora_up.weight"].shape == (8, 5)
    assert weights["alpha"].shape == () and float(weights["alpha"]) == 5


@pytest.mark.parametrize("module", [nn.Linear(600, 8), nn.Conv2d(60, 8, 3)])
def test_birth_is_kaiming_uniform(module: nn.Module) -> None:
    down = born(module, rank=64, conv_rank=64)[0]["lora_down.weight"]
    reference = torch.empty_like(down)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(9))
    assert float(down.abs().max()) == pytest.approx(float(reference.abs().max()), rel=1e-3)
    assert float(down.std()) == pytest.approx(float(reference.std()), rel=0.02)


def test_a_file_may_hold_what_we_would_not_train() -> None:
    settings = TYPE.settings_of({"lora_up.weight": torch.zeros(8, 2000), "alpha": torch.tensor(0.0)})
    assert settings.rank == 2000
    assert TYPE.settings_of({"lora_up.weight": torch.zeros(8, 4)}).alpha == 4


def test_each_layer_of_a_file_has_its_own_rank() -> None:
    model = load_model("pocket")
    adapter = graft(model, "lora", LoraSettings(rank=2), seed=1, parts=("denoiser",))
    keys = sorted({name.partition(".")[0] for name in adapter.tensors()})[:2]
    tensors = adapter.tensors()
    adapter.remove()
    file = {
        key: {
            "lora_down.weight": tensors[f"{key}.lora_down.weight"][:1].repeat(
                rank, *[1] * (tensors[f"{key}.lora_down.weight"].dim() - 1)
            ),
            "lora_up.weight": tensors[f"{key}.lora_up.weight"][:, :1].repeat(
                1, rank, *[1] * (tensors[f"{key}.lora_up.weight"].dim() - 2)
            ),
        }
        for key, rank in zip(keys, (1, 7), strict=True)
    }
    applied = graft_file(model, "lora", file, 0.5)
    found = {name: float(tensor) for name, tensor in applied.tensors().items() if name.endswith("alpha")}
    applied.remove()
    assert found == {f"{keys[0]}.alpha": 1.0, f"{keys[1]}.alpha": 7.0}


# ---- dropout


def run(module: nn.Module, x: Tensor, training: bool = True, seed: int = 3, **settings: Any) -> Tensor:
    """What the change alone makes of ``x``, with an ``up`` of ones."""
    weights, chosen = born(module, **settings)
    weights["lora_up.weight"].fill_(1.0)
    torch.manual_seed(seed)
    with torch.no_grad():
        return TYPE.forward(module, x, weights, 1.0, chosen, training) - module(x)


MODULES = [
    (nn.Linear(6, 8), (400, 6)),
    (nn.Linear(6, 8), (50, 4, 6)),
    (nn.Conv2d(6, 8, 1), (100, 6, 2, 2)),
    (nn.Conv2d(6, 8, 3), (100, 6, 4, 4)),
]
KINDS = ["dropout", "rank_dropout", "module_dropout"]


def rate(kind: str, value: float) -> dict[str, Any]:
    """One kind of dropout."""
    return {kind: value}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_dropout_is_of_training_alone(module: nn.Module, shape: tuple[int, ...], kind: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    undropped = run(module, x, rank=16, conv_rank=16)
    assert torch.equal(run(module, x, training=False, rank=16, conv_rank=16, **rate(kind, 0.5)), undropped)
    changed = [
        not torch.allclose(run(module, x, seed=seed, rank=16, conv_rank=16, **rate(kind, 0.5)), undropped)
        for seed in range(8)
    ]
    assert any(changed)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_dropout_keeps_the_mean(module: nn.Module, shape: tuple[int, ...], kind: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(0.1).add(1.0)
    undropped = run(module, x, rank=16, conv_rank=16)
    drawn = torch.stack([run(module, x, seed=seed, rank=16, conv_rank=16, **rate(kind, 0.3)) for seed in range(200)])
    spread = float(undropped.abs().mean())
    assert float((drawn.mean(0) - undropped).abs().mean()) < 0.15 * spread


def test_rank_dropout_takes_whole_ranks_of_a_sample() -> None:
    module, x = nn.Linear(6, 1, bias=False), torch.randn(200, 5, 6, generator=torch.Generator().manual_seed(1))
    weights, chosen = born(module, rank=1, rank_dropout=0.4)
    weights["lora_up.weight"].fill_(1.0)
    with torch.no_grad():
        change = TYPE.forward(module, x, weights, 1.0, chosen, True) - module(x)
        whole = F.linear(x, weights["lora_down.weight"]) / 0.6
    dropped = change.abs().amax((1, 2)) < 1e-6
    assert 0.25 < float(dropped.float().mean()) < 0.55
    torch.testing.assert_close(change[~dropped], whole[~dropped], rtol=1e-4, atol=1e-5)


def test_module_dropout_takes_the_whole_change() -> None:
    module, x = nn.Linear(6, 8), torch.randn(3, 6)
    gone = sum(not run(module, x, seed=seed, rank=4, module_dropout=0.3).any() for seed in range(200))
    assert 35 <= gone <= 85


# ---- the loss and every gradient, worked out with diffusers' own networks


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_and_gradients_are_those_of_merged_weights_in_diffusers(prediction: Prediction) -> None:
    """W + s·B·A, put into diffusers' UNet and transformers' text encoder, differentiated by plain autograd."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as TheirUNet
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel as TheirText

    from lorabake.objectives.diffusion import Diffusion, DiffusionSettings

    model = load_model("pocket")
    settings = LoraSettings(rank=3, alpha=1.5, conv_rank=2, conv_alpha=3)
    adapter = graft(model, "lora", settings, seed=1, parts=("denoiser", "text_encoder"))
    generator = torch.Generator().manual_seed(7)
    parameters = {name: p for named in adapter.parameters().values() for name, p in named.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    latents, noise = (torch.randn(2, model.facts.latent_channels, 16, 16, generator=generator) for _ in range(2))
    timesteps = torch.tensor([37, 810])
    tokens = model.tokenize(["1girl, red hair, smile, beach", "night"])

    assert model.betas_T is not None
    objective = Diffusion(DiffusionSettings(weighting="none"), model.betas_T, prediction, model.device)
    noisy = objective.corrupt(latents, noise, timesteps)
    output = model.predict(noisy, timesteps, model.encode_text(tokens))
    error = objective.error(output, objective.target(latents, noise, timesteps), timesteps).mean((1, 2, 3))
    loss = objective.weigh(error, timesteps).mean()
    loss.backward()
    layers = {found.key: found for found in model.layers()}
    adapter.remove()

    unet = TheirUNet.from_pretrained(POCKET_MODEL / "unet").requires_grad_(False)
    text = TheirText.from_pretrained(POCKET_MODEL / "text_encoder").requires_grad_(False)
    theirs = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    merged: dict[str, dict[str, Tensor]] = {"denoiser": {}, "text_encoder": {}}
    originals: dict[str, dict[str, Tensor]] = {
        "denoiser": dict(unet.state_dict()),
        "text_encoder": dict(text.state_dict()),
    }
    for key in {name.partition(".")[0] for name in theirs}:
        found = layers[key]
        path = f"{found.path}.weight"
        if path not in originals[found.part]:  # transformers 5 leaves the outer name out
            path = path.removeprefix("text_model.")
        weight = originals[found.part][path]
        down, up = theirs[f"{key}.lora_down.weight"], theirs[f"{key}.lora_up.weight"]
        spatial = weight.dim() == 4 and weight.shape[2] > 1
        scale = 3 / 2 if spatial else 1.5 / 3
        merged[found.part][path] = weight + scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)

    scheduler: Any = DDPMScheduler.from_pretrained(POCKET_MODEL / "scheduler", clip_sample=False)
    steps: Any = timesteps
    hidden = torch.func.functional_call(text, merged["text_encoder"], (tokens["text_encoder"],)).last_hidden_state
    prediction_theirs = torch.func.functional_call(
        unet, merged["denoiser"], (scheduler.add_noise(latents, noise, steps), timesteps, hidden)
    ).sample
    target: Any = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    expected = F.mse_loss(prediction_theirs, target)
    expected.backward()

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    size = torch.cat([t.grad.flatten() for t in theirs.values() if t.grad is not None]).norm()
    worst: dict[str, float] = {}
    for name, parameter in parameters.items():
        ours, reference = parameter.grad, theirs[name].grad
        assert ours is not None and reference is not None, name
        # Where attention is sure of itself, queries and keys get gradients that nearly cancel: what is left has float32's noise of the whole.
        worst[name] = float((ours - reference).norm() / (reference.norm() + 0.01 * size))
    assert len(worst) == 2 * len({name.partition(".")[0] for name in worst}) > 300
    assert max(worst.values()) < 1e-4, max(worst, key=lambda name: worst[name])
    differences = [p.grad - theirs[name].grad for name, p in parameters.items()]  # pyright: ignore[reportOperatorIssue]
    total = torch.cat([difference.flatten() for difference in differences]).norm()
    assert float(total / size) < 1e-5
