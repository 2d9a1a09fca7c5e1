"""Stable Diffusion 1.x/2.x as lorabake's loop sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.export import clip_json, unet_json, write_part, write_rest
from lorabake.families.networks.latent_model import LatentModel, loaded, trainable_norm, with_norms
from lorabake.families.networks.noise import betas_of
from lorabake.families.networks.prompt_windows import join_windows, split_windows
from lorabake.families.networks.tokenizer import WINDOW_TOKENS, windows_for
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.sd.card import parts_of
from lorabake.protocols.family import Conditioning, Framing, Layer, LayerGroup, ModelFacts, Part, Tokens

_PREFIX: dict[Part, str] = {"denoiser": "lora_unet", "text_encoder": "lora_te"}
_MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class SDModel(LatentModel):
    """A loaded model; see :class:`lorabake.protocols.family.Model`.

    Args:
        facts: what :func:`lorabake.families.inspect_model` said of it.
        dtype: of the frozen weights and activations.
        device: where to load it, straight from the file.
        clip_skip: take the text encoder's ``clip_skip``-th last hidden state (1 = the last); None is the ordinary output.
        max_tokens: tokens of a caption that are read, a multiple of 75; each 75 of them are encoded apart.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        clip_skip: int | None = None,
        max_tokens: int = WINDOW_TOKENS,
    ) -> None:
        self._clip_skip, self._windows = clip_skip, windows_for(max_tokens)
        parts = parts_of(facts.source, half=dtype == torch.float16)
        assert parts is not None, f"{facts.path} was recognised before"
        super().__init__(facts, parts.vae, dtype, device)
        self._parts, self.sampler, self.tokenizer = parts, parts.scheduler, parts.tokenizer()
        self.unet = loaded(UNet2DConditionModel, parts.unet, dtype, device)
        self.text_encoder = loaded(CLIPTextModel, parts.text_encoder, dtype, device)
        if (clip_skip or 1) > (most := self.text_encoder.config.layers):
            raise UserError(
                f"clip_skip is {clip_skip}; the text encoder of {facts.name} has {most} layers. Give 1 to {most}."
            )
        self.parts: Mapping[Part, nn.Module] = {"denoiser": self.unet, "text_encoder": self.text_encoder}
        self.betas_T = betas_of(self.sampler)
        self._layers = [layer for part in self.parts for layer in _layers(part, self.parts[part])]

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids: 77 for each window of 75 tokens, one window after the other."""
        return {"text_encoder": torch.tensor(self.tokenizer.encode(captions, self._windows))}

    def encode_text(self, tokens: Tokens) -> Conditioning:
        """``text_BLD``: hidden states of every token; 77, 152 or 227 of them."""
        ids_BT = tokens["text_encoder"].to(self.device)
        ids_NL = split_windows(ids_BT, self.tokenizer.max_length)
        return {"text_BLD": join_windows(self.text_encoder(ids_NL, clip_skip=self._clip_skip), len(ids_BT))}

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        """Nothing: these models are told the text alone."""
        return {}

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output."""
        return self.unet(
            latents_BCHW.to(self.dtype), timesteps_B.to(self.device), conditioning["text_BLD"].to(self.dtype)
        )

    def checkpoint_gradients(self, share: float) -> None:
        """Recompute a share of the U-Net's blocks in the backward pass, the first ones."""
        self.unet.checkpoint_gradients(share)

    def save(self, folder: Path) -> None:
        """Write a diffusers folder: the weights as they are now; in the model's own folder, everything else as it came."""
        parts = self._parts
        unet, clip = parts.unet, parts.text_encoder
        config = unet.json or unet_json(unet.config, parts.latent_side)
        write_part(folder / "unet", "diffusion_pytorch_model", self.unet, config)
        write_part(folder / "text_encoder", "model", self.text_encoder, clip.json or clip_json(clip.config))
        write_rest(
            folder,
            self.facts,
            ["unet", "text_encoder"],
            scheduler=self.sampler,
            vae=(self.vae, parts.vae),
            pads={"tokenizer": parts.pad},
            index=_MODEL_INDEX,
        )


def _layers(part: Part, root: nn.Module) -> Iterator[Layer]:
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) or trainable_norm(module):
            yield Layer(
                part, path, module, with_norms(_group(part, path), module), f"{_PREFIX[part]}_{path.replace('.', '_')}"
            )


def _group(part: Part, path: str) -> LayerGroup:
    if part == "text_encoder":
        return "text"
    if ".attentions." in path:
        return "transformer"
    return "resnet" if any(f".{name}." in path for name in ("resnets", "downsamplers", "upsamplers")) else "other"
