"""Stable Diffusion 1.x/2.x as lorabake's loop sees it."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.base.files import replacing, sha256_file, write_atomic
from lorabake.families.networks.load import load_folder
from lorabake.protocols.family import Conditioning, Framing, Layer, LayerGroup, ModelFacts, Part, Tokens

_PREFIX: dict[Part, str] = {"denoiser": "lora_unet", "text_encoder": "lora_te"}
_FOLDERS: dict[Part, str] = {"denoiser": "unet", "text_encoder": "text_encoder"}
_WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


class SDModel:
    """A loaded model; see :class:`lorabake.protocols.family.Model`.

    Args:
        facts: what :func:`lorabake.families.inspect_model` said of it.
        dtype: of the frozen weights and activations.
        device: where to load it, straight from the file.
        clip_skip: take the text encoder's ``clip_skip``-th last hidden state (1 = the last); None is the ordinary output.
    """

    def __init__(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        clip_skip: int | None = None,
    ) -> None:
        self.facts, self._clip_skip = facts, clip_skip
        self._device, self._dtype = torch.device(device), dtype
        self.unet, self.text_encoder, self.vae, self.tokenizer, self.sampler = load_folder(
            facts.path, dtype=dtype, device=device
        )
        if (clip_skip or 1) > (most := self.text_encoder.config.layers):
            raise UserError(
                f"clip_skip is {clip_skip}; the text encoder of {facts.name} has {most} layers. Give 1 to {most}."
            )
        self.parts: Mapping[Part, nn.Module] = {"denoiser": self.unet, "text_encoder": self.text_encoder}
        for module in (self.unet, self.text_encoder, self.vae):
            module.requires_grad_(False).eval()
        self.betas_T = _betas(self.sampler)
        self._layers = [layer for part in self.parts for layer in _layers(part, self.parts[part])]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the denoiser's weights."""
        return self._dtype

    @functools.cached_property
    def latent_space(self) -> str:
        """sha256 of the VAE's weights and configuration files."""
        return _digest(self.facts.path / "vae")

    def layers(self) -> Sequence[Layer]:
        """Every Linear and Conv2d, denoiser first, in module order."""
        return self._layers

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents."""
        posterior = self.vae.encode(images_BCHW.to(self.device, self.vae.encoder.conv_in.weight.dtype))
        latents = posterior.mean if generator is None else posterior.sample(generator)
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self.vae.decode(
            latents_BCHW.to(self.device, self.vae.encoder.conv_in.weight.dtype) / self.vae.config.scaling_factor
        )

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids of 77 tokens each."""
        return {"text_encoder": torch.tensor(self.tokenizer.encode(captions))}

    def encode_text(self, tokens: Tokens) -> Conditioning:
        """``text_BLD``: hidden states of every token."""
        ids_BL = tokens["text_encoder"].to(self.device)
        return {"text_BLD": self.text_encoder(ids_BL, clip_skip=self._clip_skip)}

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        """Nothing: these models are told the text alone."""
        return {}

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's output."""
        return self.unet(
            latents_BCHW.to(self.dtype), timesteps_B.to(self.device), conditioning["text_BLD"].to(self.dtype)
        )

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute each UNet block in the backward pass."""
        self.unet.checkpoint_gradients(enabled)

    def save(self, folder: Path) -> None:
        """Write a diffusers folder: the weights as they are now, everything else as it came."""
        folder.mkdir(parents=True, exist_ok=True)
        for item in self.facts.path.iterdir():
            if item.is_dir() and item.name not in _WEIGHTS:
                shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
            elif item.is_file() and item.suffix == ".json":
                write_atomic(folder / item.name, item.read_bytes())
        for part, name in _FOLDERS.items():
            config = json.loads((self.facts.path / name / "config.json").read_text(encoding="utf-8"))
            write_atomic(folder / name / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            tensors = {key: tensor.detach().contiguous() for key, tensor in self.parts[part].state_dict().items()}
            with replacing(folder / name / _WEIGHTS[name]) as path:
                save_file(tensors, path, metadata={"format": "pt"})


def _digest(*folders: Path) -> str:
    files = [
        path for folder in folders for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json")
    ]
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def _betas(sampler: Mapping[str, Any]) -> Tensor:
    """The noise schedule a model was trained with, from its scheduler's settings.

    Raises:
        UserError: a kind of schedule that is not known, or zero terminal SNR with ε prediction, where the last step has no target.
    """
    kind, count = sampler.get("beta_schedule", "scaled_linear"), int(sampler["num_train_timesteps"])
    if sampler.get("trained_betas"):
        betas_T = torch.tensor(sampler["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas_T = torch.linspace(sampler["beta_start"], sampler["beta_end"], count).double()
    elif kind == "scaled_linear":
        betas_T = torch.linspace(sampler["beta_start"] ** 0.5, sampler["beta_end"] ** 0.5, count).double() ** 2
    else:
        raise UserError(f"The model's noise schedule '{kind}' is not known. Known: linear, scaled_linear.")
    if not sampler.get("rescale_betas_zero_snr"):
        return betas_T
    if sampler.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            "The model asks for zero terminal SNR but predicts noise (epsilon): its last timestep has nothing to predict."
        )
    return _zero_terminal_snr(betas_T)


def _zero_terminal_snr(betas_T: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last is 0 and the first stays. Lin et al. 2023, arXiv 2305.08891, algorithm 1."""
    roots_T = (1 - betas_T).cumprod(0).sqrt()
    first, last = roots_T[0].clone(), roots_T[-1].clone()
    cumprod_T = ((roots_T - last) * first / (first - last)) ** 2
    return 1 - torch.cat([cumprod_T[:1], cumprod_T[1:] / cumprod_T[:-1]])


def _layers(part: Part, root: nn.Module) -> Iterator[Layer]:
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield Layer(part, path, module, _group(part, path), f"{_PREFIX[part]}_{path.replace('.', '_')}")


def _group(part: Part, path: str) -> LayerGroup:
    if part == "text_encoder":
        return "text"
    if ".attentions." in path:
        return "transformer"
    return "resnet" if any(f".{name}." in path for name in ("resnets", "downsamplers", "upsamplers")) else "other"
