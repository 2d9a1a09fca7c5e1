"""Flux.1 as lorabake's loop sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.base.files import write_atomic
from lorabake.families.flux.card import FluxParts, parts_of
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.clip_vocabulary import SD1_PAD
from lorabake.families.networks.dit_config import FluxConfig
from lorabake.families.networks.export import clip_json, write_part, write_rest, write_tensors
from lorabake.families.networks.flux import FluxTransformer
from lorabake.families.networks.flux_layout import diffusers_pieces, flux_json, t5_json
from lorabake.families.networks.latent_model import LatentModel, loaded
from lorabake.families.networks.pieces import diffusers_state
from lorabake.families.networks.t5 import T5Encoder
from lorabake.protocols.family import (
    MOST_T5_TOKENS,
    Alias,
    Conditioning,
    Framing,
    Layer,
    LayerGroup,
    ModelFacts,
    Part,
    Tokens,
)

_PREFIX: dict[Part, str] = {"denoiser": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}
_DIFFUSERS_PREFIX: dict[Part, str] = {
    "denoiser": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
}
_BLOCKS = ("double_blocks.", "single_blocks.")
_GUIDANCE = 1.0
_MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": "FluxPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


class FluxModel(LatentModel):
    """A loaded model; see :class:`lorabake.protocols.family.Model`.

    Args:
        facts: what :func:`lorabake.families.inspect_model` said of it.
        dtype: of the frozen weights and activations; not float16, in which T5 overflows.
        device: where to load it, straight from the file.
        t5_tokens: tokens of a caption that T5 reads, with its end, 512 at most; None is what the model was trained with.
    """

    betas_T = None

    def __init__(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        t5_tokens: int | None = None,
    ) -> None:
        if dtype == torch.float16:
            raise UserError(f"{facts.name} cannot run in float16: its text encoder overflows. Use bfloat16 or float32.")
        if t5_tokens is not None and not 1 <= t5_tokens <= MOST_T5_TOKENS:
            raise UserError(
                f"t5_tokens is {t5_tokens}; give 1 to {MOST_T5_TOKENS}, the most that any was trained with."
            )
        parts = parts_of(facts.source)
        assert parts is not None, f"{facts.path} was recognised before"
        super().__init__(facts, parts.vae, dtype, device)
        self._parts: FluxParts = parts
        self.sampler, (self.tokenizer, self.tokenizer_2) = parts.scheduler, parts.tokenizers()
        self._t5_tokens = t5_tokens or parts.t5_tokens
        self.transformer = loaded(FluxTransformer, parts.transformer, dtype, device)
        self.text_encoder = loaded(CLIPTextModel, parts.text_encoder, dtype, device)
        self.text_encoder_2 = loaded(T5Encoder, parts.text_encoder_2, dtype, device)
        self.parts: Mapping[Part, nn.Module] = {
            "denoiser": self.transformer,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        self._layers = [layer for part in self.parts for layer in flux_layers(part, self.parts[part])]

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids: 77 for CLIP, and as many as T5 reads."""
        return {
            "text_encoder": torch.tensor(self.tokenizer.encode(captions)),
            "text_encoder_2": torch.tensor(self.tokenizer_2.encode(captions, self._t5_tokens)),
        }

    def encode_text(self, tokens: Tokens) -> Conditioning:
        """``text_BLD``: T5's vectors of every token, padding included; ``pooled_BD``: CLIP's of the whole caption."""
        ids_BL = tokens["text_encoder"].to(self.device)
        return {
            "text_BLD": self.text_encoder_2(tokens["text_encoder_2"].to(self.device)),
            "pooled_BD": self.text_encoder.at_end(ids_BL, self.text_encoder(ids_BL)),
        }

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        """Nothing: these models are told the text alone."""
        return {}

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The direction from picture to noise.

        ``guidance_B`` in the conditioning is what a model that is told a guidance scale (dev) is told; without it 1, which is
        what it is trained with. Other models do not look at it.
        """
        guidance_B = conditioning.get("guidance_B")
        if guidance_B is None:
            guidance_B = torch.full((len(latents_BCHW),), _GUIDANCE, device=self.device)
        return self.transformer(
            latents_BCHW.to(self.device, self.dtype),
            timesteps_B.to(self.device),
            conditioning["text_BLD"].to(self.dtype),
            conditioning["pooled_BD"].to(self.dtype),
            guidance_B.to(self.device),
        )

    def checkpoint_gradients(self, share: float) -> None:
        """Recompute a share of the denoiser's blocks in the backward pass, the first ones."""
        self.transformer.gradient_checkpointing = share

    def save(self, folder: Path) -> None:
        """Write a diffusers folder: the weights as they are now; in the model's own folder, everything else as it came."""
        parts = self._parts
        flux, clip, t5 = parts.transformer, parts.text_encoder, parts.text_encoder_2
        tensors = diffusers_tensors(self.transformer.state_dict(), flux.config)
        write_tensors(folder / "transformer", "diffusion_pytorch_model", tensors, flux.json or flux_json(flux.config))
        write_part(folder / "text_encoder", "model", self.text_encoder, clip.json or clip_json(clip.config))
        write_part(folder / "text_encoder_2", "model", self.text_encoder_2, t5.json or t5_json(t5.config))
        for name, text in self.tokenizer_2.files(parts.t5_tokens).items():
            write_atomic(folder / "tokenizer_2" / name, text.encode())
        write_rest(
            folder,
            self.facts,
            ["transformer", "text_encoder", "text_encoder_2", "tokenizer_2"],
            scheduler=parts.scheduler,
            vae=(self.vae, parts.vae),
            pads={"tokenizer": SD1_PAD},
            index=_MODEL_INDEX,
        )


def flux_layers(part: Part, root: nn.Module) -> Iterator[Layer]:
    """Every Linear of a part.

    T5's count as ``other``, which network types leave alone: hardly any client loads changes to it, and no trainer makes them
    unless told. diffusers' files have other names, and several for a product that is several layers there.
    """
    pieces: dict[str, list[Alias]] = {}
    if isinstance(root, FluxTransformer):
        for piece in diffusers_pieces(root.config):
            alias = Alias(_key(_DIFFUSERS_PREFIX[part], piece.theirs), piece.our_rows, piece.their_rows)
            pieces.setdefault(piece.ours, []).append(alias)
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear):
            aliases = tuple(pieces[path]) if pieces else (Alias(_key(_DIFFUSERS_PREFIX[part], path)),)
            yield Layer(part, path, module, _group(part, path), _key(_PREFIX[part], path), aliases)


def diffusers_tensors(state: Mapping[str, Tensor], config: FluxConfig) -> dict[str, Tensor]:
    """The denoiser's tensors under diffusers' names, none sharing memory with another."""
    return diffusers_state(state, diffusers_pieces(config))


def _key(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _group(part: Part, path: str) -> LayerGroup:
    if part == "denoiser":
        return "transformer" if path.startswith(_BLOCKS) else "other"
    return "text" if part == "text_encoder" else "other"
