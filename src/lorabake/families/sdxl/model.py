"""Stable Diffusion XL as lorabake's loop sees it (Podell et al. 2023, arXiv:2307.01952)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabake.families.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from lorabake.families.networks.export import clip_json, unet_json, write_part, write_rest
from lorabake.families.networks.latent_model import LatentModel, loaded, trainable_norm, with_norms
from lorabake.families.networks.layouts import Paths, ldm_unet
from lorabake.families.networks.noise import betas_of
from lorabake.families.networks.prompt_windows import first_windows, join_windows, split_windows
from lorabake.families.networks.tokenizer import WINDOW_TOKENS, windows_for
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.sdxl.card import PADS, parts_of
from lorabake.protocols.family import Alias, Conditioning, Framing, Layer, LayerGroup, ModelFacts, Part, Tokens

_MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class SDXLModel(LatentModel):
    """A loaded model; see :class:`lorabake.protocols.family.Model`.

    Args:
        facts: what :func:`lorabake.families.inspect_model` said of it.
        dtype: of the frozen weights and activations. The autoencoder overflows in float16, and then runs in float32.
        device: where to load it, straight from the file.
        max_tokens: tokens of a caption that are read, a multiple of 75; each 75 of them are encoded apart.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_tokens: int = WINDOW_TOKENS,
    ) -> None:
        self._windows = windows_for(max_tokens)
        found = parts_of(facts.source, half=dtype == torch.float16)
        assert found is not None, f"{facts.path} was recognised before"
        super().__init__(facts, found.vae, dtype, device, torch.float32 if dtype == torch.float16 else None)
        self._found, self.sampler = found, found.scheduler
        self.tokenizer, self.tokenizer_2 = found.tokenizers()
        self.unet = loaded(UNet2DConditionModel, found.unet, dtype, device)
        self.text_encoder = loaded(CLIPTextModel, found.text_encoder, dtype, device)
        self.text_encoder_2 = loaded(CLIPTextModelWithProjection, found.text_encoder_2, dtype, device)
        self.parts: Mapping[Part, nn.Module] = {
            "denoiser": self.unet,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        self.betas_T = betas_of(self.sampler)
        self._layers = list(layers_of(self.parts))

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids of both tokenizers: 77 for each window of 75 tokens, one window after the other."""
        return {
            "text_encoder": torch.tensor(self.tokenizer.encode(captions, self._windows)),
            "text_encoder_2": torch.tensor(self.tokenizer_2.encode(captions, self._windows)),
        }

    def encode_text(self, tokens: Tokens) -> Conditioning:
        """``text_BLD``: what both text encoders say of every token, side by side; ``pooled_BD``: the second's word on all of it."""
        ids_NL, ids_2_NL = (
            split_windows(tokens[part].to(self.device), tokenizer.max_length)
            for part, tokenizer in (("text_encoder", self.tokenizer), ("text_encoder_2", self.tokenizer_2))
        )
        batch = len(tokens["text_encoder"])
        hidden_2_NLD = self.text_encoder_2.penultimate(ids_2_NL)
        hidden_NLD = torch.cat([self.text_encoder.penultimate(ids_NL), hidden_2_NLD], dim=-1)
        pooled_ND = self.text_encoder_2.pooled(ids_2_NL, hidden_2_NLD)
        return {"text_BLD": join_windows(hidden_NLD, batch), "pooled_BD": first_windows(pooled_ND, batch)}

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        """``time_ids_B6``: original height and width, top and left of the crop, target height and width, in pixels."""
        rows = [[*f.original_wh[::-1], *f.corner_lt[::-1], *f.target_wh[::-1]] for f in framings]
        return {"time_ids_B6": torch.tensor(rows, dtype=torch.float32)}

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output."""
        return self.unet(
            latents_BCHW.to(self.dtype),
            timesteps_B.to(self.device),
            conditioning["text_BLD"].to(self.dtype),
            conditioning["pooled_BD"],
            conditioning["time_ids_B6"].to(self.device),
        )

    def checkpoint_gradients(self, share: float) -> None:
        """Recompute a share of the U-Net's blocks in the backward pass, the first ones."""
        self.unet.checkpoint_gradients(share)

    def save(self, folder: Path) -> None:
        """Write a diffusers folder: the weights as they are now; in the model's own folder, everything else as it came."""
        found = self._found
        unet, first, second = found.unet, found.text_encoder, found.text_encoder_2
        config = unet.json or unet_json(unet.config, found.latent_side)
        write_part(folder / "unet", "diffusion_pytorch_model", self.unet, config)
        write_part(folder / "text_encoder", "model", self.text_encoder, first.json or clip_json(first.config))
        config = second.json or clip_json(second.config, projection=True)
        write_part(folder / "text_encoder_2", "model", self.text_encoder_2, config)
        write_rest(
            folder,
            self.facts,
            ["unet", "text_encoder", "text_encoder_2"],
            scheduler=self.sampler,
            vae=(self.vae, found.vae),
            pads=dict(zip(("tokenizer", "tokenizer_2"), PADS, strict=True)),
            index=_MODEL_INDEX,
        )


def layers_of(parts: Mapping[Part, nn.Module]) -> Iterator[Layer]:
    """The layers that adapters may change.

    In files, the U-Net's have the names of the network SDXL was first published as; diffusers' files have its own names for them,
    and do not number the first text encoder where only that is changed.
    """
    for part, root in parts.items():
        names = ldm_unet(root.config) if isinstance(root, UNet2DConditionModel) else None
        for path, module in root.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) or trainable_norm(module):
                group = with_norms(_group(part, path), module)
                yield Layer(part, path, module, group, _key(part, path, names), _aliases(part, path))


def _key(part: Part, path: str, names: Paths | None) -> str:
    if names is not None:
        name = names.theirs(path)
        assert name is not None, path
        return f"lora_unet_{name.replace('.', '_')}"
    return f"lora_te{1 if part == 'text_encoder' else 2}_{path.replace('.', '_')}"


def _aliases(part: Part, path: str) -> tuple[Alias, ...]:
    prefix = {"denoiser": "lora_unet", "text_encoder": "lora_te"}.get(part)
    return (Alias(f"{prefix}_{path.replace('.', '_')}"),) if prefix else ()


def _group(part: Part, path: str) -> LayerGroup:
    if part != "denoiser":
        return "text" if ".layers." in path else "other"
    if ".attentions." in path:
        return "transformer"
    return "resnet" if any(f".{name}." in path for name in ("resnets", "downsamplers", "upsamplers")) else "other"
