"""Models that every adapter must be at home on: the pocket model, and single layers of every shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabake.families import load_model
from lorabake.protocols.family import Layer, LayerGroup, Model, Part

SHAPES: dict[str, tuple[LayerGroup, Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": ("transformer", lambda: nn.Linear(12, 18), (2, 5, 12)),
    "linear without bias": ("text", lambda: nn.Linear(12, 6, bias=False), (3, 12)),
    "conv 1x1": ("transformer", lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 7)),
    "conv 3x3": ("resnet", lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 5)),
    "conv 3x3 strided": ("resnet", lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1), (2, 6, 8, 6)),
    "conv grouped": ("resnet", lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 5, 5)),
    "conv dilated": ("resnet", lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False), (1, 4, 9, 9)),
    "layer norm": ("norm", lambda: nn.LayerNorm(12), (2, 5, 12)),
    "layer norm without bias": ("norm", lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "group norm": ("norm", lambda: nn.GroupNorm(4, 8), (2, 8, 5, 7)),
}
"""By name: group, the layer, the shape of an input."""


class LayersModel:
    """Independent layers side by side: as much of a model as grafting needs."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.root = nn.ModuleList([make() for _, make, _ in SHAPES.values()]).requires_grad_(False)
        self.parts: Mapping[Part, nn.Module] = {"denoiser": self.root}
        self.inputs = [torch.randn(shape) for _, _, shape in SHAPES.values()]
        self._layers = [
            Layer("denoiser", str(i), self.root[i], group, f"lora_unet_layer_{i}")
            for i, (group, _, _) in enumerate(SHAPES.values())
        ]

    device = torch.device("cpu")
    dtype = torch.float32

    def layers(self) -> Sequence[Layer]:
        return self._layers

    def leave_out(self, group: LayerGroup) -> None:
        """Have no layers of this group, which come last."""
        kept = [layer for layer in self._layers if layer.group != group]
        self._layers, self.inputs = kept, self.inputs[: len(kept)]
        del self.root[len(kept) :]

    def outputs(self) -> list[Tensor]:
        """What each layer makes of its input."""
        return [layer(x) for layer, x in zip(self.root, self.inputs, strict=True)]


class Bench:
    """The pocket model with fixed inputs: latents, timesteps, tokens."""

    def __init__(self) -> None:
        self.model: Model = load_model("pocket")
        generator = torch.Generator().manual_seed(5)
        self.latents = torch.randn(2, self.model.facts.latent_channels, 16, 16, generator=generator)
        self.timesteps = torch.tensor([20, 700])
        self.ids = self.model.tokenize(["1girl, red hair, beach", "1boy, night"])

    def output(self) -> Tensor:
        """The model's answer; whatever is drawn on the way is the same each time."""
        torch.manual_seed(5)
        return self.model.predict(self.latents, self.timesteps, self.model.encode_text(self.ids))

    def bytes(self) -> dict[str, bytes]:
        """Every tensor of the model, as it lies in memory."""
        return {
            f"{part}.{name}": tensor.contiguous().numpy().tobytes()
            for part, module in self.model.parts.items()
            for name, tensor in module.state_dict().items()
        }


@pytest.fixture(scope="session")
def bench() -> Bench:
    """Shared: every test takes off what it grafts."""
    return Bench()


@pytest.fixture
def layers() -> LayersModel:
    return LayersModel()


@pytest.fixture
def shuffle() -> Callable[..., None]:
    """Gives a graft's trained weights values as training might: small and nowhere zero."""

    def fill(graft: Any, seed: int = 11) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for named in graft.parameters().values():
                for parameter in named.values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    return fill
