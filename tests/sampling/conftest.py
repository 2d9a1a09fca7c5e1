"""A model small enough to be read at a glance: real layers, random weights, four pixels to a latent cell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabake.protocols.family import Conditioning, Framing, Layer, ModelFacts, Part, Prediction, Resident, Tokens

LENGTH, WIDTH, LATENT = 12, 8, 4


class TinyModel:
    """A model of the family protocol: a convolution that is told the time and the mean of its text."""

    def __init__(self, prediction: Prediction = "epsilon", sampler: Mapping[str, object] | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.words = nn.Embedding(256, WIDTH)
            self.tell = nn.Linear(WIDTH + 1, LATENT)
            self.look = nn.Conv2d(LATENT, LATENT, 3, padding=1)
            self.paint = nn.ConvTranspose2d(LATENT, 3, 4, stride=4)
        self.parts: Mapping[Part, nn.Module] = {"denoiser": nn.Sequential(self.look), "text_encoder": self.words}
        self.facts = ModelFacts(
            family="tiny", path=Path("tiny"), name="tiny", prediction=prediction, resolution=32, pixel_step=8, latent_scale=4,
            latent_channels=LATENT, base_version="tiny", architecture="tiny", small=True, digest="tiny",
            usual_guidance=3.5 if prediction == "flow" else None,
        )  # fmt: skip
        betas_T = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).double() ** 2
        self.betas_T = None if prediction == "flow" else betas_T
        self.sampler: Mapping[str, object] = sampler or {"timestep_spacing": "leading", "steps_offset": 1, "shift": 3.0}
        self.encoded: list[str] = []
        self.rows: list[int] = []
        self.guidance: list[list[float]] = []

    device = torch.device("cpu")
    dtype = torch.float32
    latent_space = "tiny"
    text_space = "tiny"

    def layers(self) -> Sequence[Layer]:
        return []

    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return nn.functional.avg_pool2d(images_BCHW, 4)

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        return self.paint(latents_BCHW)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        self.encoded += captions
        return {"text_encoder": torch.tensor([list(text.encode()[:LENGTH].ljust(LENGTH)) for text in captions])}

    def encode_text(self, tokens: Tokens) -> Conditioning:
        return {"text_BLD": self.words(tokens["text_encoder"])}

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        return {}

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows.append(len(latents_BCHW))
        if "guidance_B" in conditioning:
            self.guidance.append(conditioning["guidance_B"].tolist())
        told_BD = torch.cat([conditioning["text_BLD"].mean(1), timesteps_B.float()[:, None] / 1000], dim=1)
        return self.look(latents_BCHW) + self.tell(told_BD)[:, :, None, None]

    def checkpoint_gradients(self, share: float) -> None:
        raise AssertionError("it is not trained")

    def resting(self) -> frozenset[Resident]:
        return frozenset()

    def rest(self, names: Iterable[Resident]) -> None:
        raise AssertionError("it comes from no file")

    def wake(self, names: Iterable[Resident]) -> None:
        raise AssertionError("it comes from no file")

    def save(self, folder: Path) -> None:
        raise AssertionError("it is not saved")


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """Makes tiny models."""
    return TinyModel
