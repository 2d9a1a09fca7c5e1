"""Stable Diffusion 3 and 3.5 as lorabake's loop sees them (Esser et al. 2024, arXiv:2403.03206).

Shapes: B batch, L tokens of the picture, M of the text, C channels, D channels of the text encoders, P of the pooled text.
Module paths and state-dict keys of the denoiser are those of Stability AI's own files, after which LoRA files name their layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.base.files import write_atomic, write_json
from lorabake.families.networks.attention import attend
from lorabake.families.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from lorabake.families.networks.components import Component
from lorabake.families.networks.config import ClipConfig
from lorabake.families.networks.dit import NORM_EPS, QKV, modulated_norm, recomputed, recomputing, unpatched
from lorabake.families.networks.dit_config import SD3Config
from lorabake.families.networks.export import clip_json, write_part, write_rest, write_tensors
from lorabake.families.networks.flux import FinalLayer
from lorabake.families.networks.flux_layout import t5_json
from lorabake.families.networks.latent_model import LatentModel, loaded
from lorabake.families.networks.pieces import diffusers_state
from lorabake.families.networks.residence import inherit
from lorabake.families.networks.t5 import T5Encoder
from lorabake.families.networks.unet import timestep_sinusoids
from lorabake.families.sd3.card import PADS, PATCH, T5_TOKENS, is_projected, parts_of, sd3_json, sd3_pieces
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

_TIME_CHANNELS = 256
_MLP_RATIO = 4
_PREFIX: dict[Part, str] = {
    "denoiser": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
_MODEL_INDEX: Mapping[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _embedder(in_channels: int, channels: int) -> nn.Sequential:
    """Two linear layers from one vector per sample to the network's width."""
    return _named(mlp=nn.Sequential(nn.Linear(in_channels, channels), nn.SiLU(), nn.Linear(channels, channels)))


class StreamAttention(nn.Module):
    """One stream's share in an attention: its queries, keys and values, and the projection of what it reads, if it is asked for."""

    def __init__(self, config: SD3Config, projected: bool) -> None:
        super().__init__()
        channels, self.heads = config.channels, config.heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.ln_q = nn.RMSNorm(config.head_channels, NORM_EPS) if config.qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(config.head_channels, NORM_EPS) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels) if projected else None

    def queries(self, x_BLC: Tensor) -> QKV:
        """Queries and keys, normed where the model norms them, and values."""
        q, k, v = self.qkv(x_BLC).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return QKV(self.ln_q(q), self.ln_k(k), v)


class Stream(nn.Module):
    """What a block has for one of picture and text.

    Args:
        dual: it also attends to itself alone.
        last: only asked for keys and values, and not needed afterwards.
    """

    def __init__(self, config: SD3Config, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        channels = config.channels
        self.count = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, self.count * channels))
        self.attn = StreamAttention(config, projected=not last)
        self.attn2 = StreamAttention(config, projected=True) if dual else None
        width = _MLP_RATIO * channels
        self.mlp = None
        if not last:
            self.mlp = _named(
                fc1=nn.Linear(channels, width), act=nn.GELU(approximate="tanh"), fc2=nn.Linear(width, channels)
            )

    def told(self, told_BC: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate, B1C each, of attention, MLP and the attention to itself. ``told_BC`` has been through SiLU already."""
        return self.adaLN_modulation[1](told_BC)[:, None].chunk(self.count, dim=-1)

    def after(self, x_BLC: Tensor, read_BLC: Tensor, told: Sequence[Tensor]) -> Tensor:
        """The stream with what it read in the joint attention, what it reads in its own, and what the MLP makes of both."""
        assert self.attn.proj is not None and self.mlp is not None, "the last text stream is not needed afterwards"
        _, _, gate, mlp_shift, mlp_scale, mlp_gate, *own = told
        changed_BLC = torch.addcmul(x_BLC, gate, self.attn.proj(read_BLC))
        if self.attn2 is not None and self.attn2.proj is not None:
            own_shift, own_scale, own_gate = own
            q, k, v = self.attn2.queries(modulated_norm(x_BLC, own_shift, own_scale))
            alone_BLC = attend(q.flatten(2), k.flatten(2), v.flatten(2), self.attn2.heads)
            changed_BLC = torch.addcmul(changed_BLC, own_gate, self.attn2.proj(alone_BLC))
        return torch.addcmul(changed_BLC, mlp_gate, self.mlp(modulated_norm(changed_BLC, mlp_shift, mlp_scale)))


class JointBlock(nn.Module):
    """Picture and text with weights of their own; each token attends to those of both."""

    def __init__(self, config: SD3Config, index: int) -> None:
        super().__init__()
        self.is_last = index == config.blocks - 1
        self.x_block = Stream(config, dual=index in config.dual)
        self.context_block = Stream(config, last=self.is_last)

    def forward(self, x_BLC: Tensor, text_BMC: Tensor, told_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams, changed; the text as it came in the last block."""
        x_told, text_told = self.x_block.told(told_BC), self.context_block.told(told_BC)
        of_x = self.x_block.attn.queries(modulated_norm(x_BLC, *x_told[:2]))
        of_text = self.context_block.attn.queries(modulated_norm(text_BMC, *text_told[:2]))
        q, k, v = (torch.cat(pair, dim=1).flatten(2) for pair in zip(of_x, of_text, strict=True))
        read = attend(q, k, v, self.x_block.attn.heads)
        read_x, read_text = read.split([x_BLC.shape[1], text_BMC.shape[1]], dim=1)
        x_BLC = self.x_block.after(x_BLC, read_x, x_told)
        return x_BLC, text_BMC if self.is_last else self.context_block.after(text_BMC, read_text, text_told)


class SD3Transformer(nn.Module):
    """Predicts the direction from picture to noise. Set ``gradient_checkpointing`` to the share of blocks, 0 to 1, that are recomputed in the backward pass."""

    gradient_checkpointing: float = 0.0
    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        self.x_embedder = _named(proj=nn.Conv2d(config.latent_channels, channels, PATCH, stride=PATCH))
        self.register_buffer("pos_embed", torch.zeros(1, config.places**2, channels))
        self.t_embedder = _embedder(_TIME_CHANNELS, channels)
        self.y_embedder = _embedder(config.pooled_channels, channels)
        self.context_embedder = nn.Linear(config.text_channels, channels)
        self.joint_blocks = nn.ModuleList([JointBlock(config, index) for index in range(config.blocks)])
        self.final_layer = FinalLayer(channels, PATCH * PATCH * config.latent_channels)

    def blocks(self) -> list[list[nn.Module]]:
        """What is recomputed as one, in the order of their turns."""
        return [[block] for block in self.joint_blocks]

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BMD: Tensor, pooled_BP: Tensor) -> Tensor:
        """The prediction for each latent, BCHW.

        Args:
            latents_BCHW: noisy latents in the weights' type; even height and width.
            timesteps_B: 1000 × the share of noise, 0 (clean) to 1000 (noise), whole or not.
            text_BMD: what the text encoders say of each token.
            pooled_BP: what the CLIPs say of the whole text.

        Raises:
            UserError: the table of positions ends before the picture does.
        """
        height, width = latents_BCHW.shape[2:]
        sinusoids = timestep_sinusoids(timesteps_B, _TIME_CHANNELS).to(pooled_BP.dtype)
        told_BC = F.silu(self.t_embedder(sinusoids) + self.y_embedder(pooled_BP))
        x_BLC = self.x_embedder(latents_BCHW).flatten(2).transpose(1, 2)
        x_BLC, text_BMC = x_BLC + self._places(height // PATCH, width // PATCH), self.context_embedder(text_BMD)
        again = recomputing(self.gradient_checkpointing, len(self.joint_blocks))
        for index, block in enumerate(self.joint_blocks):
            x_BLC, text_BMC = (
                recomputed(block, x_BLC, text_BMC, told_BC) if again(index) else block(x_BLC, text_BMC, told_BC)
            )
        cells = self.final_layer(x_BLC, told_BC).unflatten(
            -1, (PATCH * PATCH, -1)
        )  # here a cell's channels are together
        return unpatched(cells.transpose(2, 3).flatten(2), height, width, PATCH)

    def _places(self, rows: int, columns: int) -> Tensor:
        """Where each token is, 1LC: the middle of the table."""
        side = self.config.places
        if max(rows, columns) > side:
            raise UserError(
                f"A picture of {columns * PATCH} × {rows * PATCH} latent cells is too large for this model: it knows {side * PATCH} a side."
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.pos_embed.unflatten(1, (side, side))
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


class SD3Model(LatentModel):
    """A loaded model; see :class:`lorabake.protocols.family.Model`.

    Args:
        facts: what :func:`lorabake.families.inspect_model` said of it.
        dtype: of the frozen weights and activations; not float16, in which T5 and the larger denoisers overflow.
        device: where to load it, straight from the file.
        t5_tokens: tokens of a caption that T5 reads, with its end, 512 at most; None is 256.
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
            raise UserError(f"{facts.name} cannot run in float16: it overflows. Use bfloat16 or float32.")
        if t5_tokens is not None and not 1 <= t5_tokens <= MOST_T5_TOKENS:
            raise UserError(
                f"t5_tokens is {t5_tokens}; give 1 to {MOST_T5_TOKENS}, the most that any was trained with."
            )
        found = parts_of(facts.source)
        assert found is not None, f"{facts.path} was recognised before"
        super().__init__(facts, found.vae, dtype, device)
        self._found, self.sampler, self._t5_tokens = found, found.scheduler, t5_tokens or T5_TOKENS
        self.tokenizer, self.tokenizer_2 = found.clip_tokenizers()
        self.tokenizer_3 = found.t5_tokenizer()
        self.transformer = loaded(SD3Transformer, found.transformer, dtype, device)
        self.text_encoder = projected_clip(found.text_encoder, dtype, device)
        self.text_encoder_2 = projected_clip(found.text_encoder_2, dtype, device)
        self.text_encoder_3 = loaded(T5Encoder, found.text_encoder_3, dtype, device) if found.text_encoder_3 else None
        parts: dict[Part, nn.Module] = {
            "denoiser": self.transformer,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }
        if self.text_encoder_3 is not None:
            parts["text_encoder_3"] = self.text_encoder_3
        self.parts: Mapping[Part, nn.Module] = parts
        self._layers = [layer for part, root in parts.items() for layer in sd3_layers(part, root)]

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids: 77 for each CLIP, and as many as T5 reads if there is a T5."""
        tokens: Tokens = {
            "text_encoder": torch.tensor(self.tokenizer.encode(captions)),
            "text_encoder_2": torch.tensor(self.tokenizer_2.encode(captions)),
        }
        if self.tokenizer_3 is not None:
            tokens["text_encoder_3"] = torch.tensor(self.tokenizer_3.encode(captions, self._t5_tokens))
        return tokens

    def encode_text(self, tokens: Tokens) -> Conditioning:
        """``text_BMD``: the CLIPs' tokens, what both say side by side and then zeros, then T5's; ``pooled_BP``: both CLIPs' on all of it.

        Without a T5, zeros stand for its tokens.
        """
        ids_BL, ids_2_BL = (tokens[part].to(self.device) for part in ("text_encoder", "text_encoder_2"))
        first_BLD, second_BLD = self.text_encoder.penultimate(ids_BL), self.text_encoder_2.penultimate(ids_2_BL)
        pooled = self.text_encoder.pooled(ids_BL, first_BLD), self.text_encoder_2.pooled(ids_2_BL, second_BLD)
        both_BLD, width = torch.cat([first_BLD, second_BLD], dim=-1), self.transformer.config.text_channels
        if self.text_encoder_3 is not None:
            t5_BLD = self.text_encoder_3(tokens["text_encoder_3"].to(self.device))
        else:
            t5_BLD = both_BLD.new_zeros(len(both_BLD), self._t5_tokens, width)
        padded_BLD = F.pad(both_BLD, (0, width - both_BLD.shape[-1]))
        return {"text_BMD": torch.cat([padded_BLD, t5_BLD], dim=1), "pooled_BP": torch.cat(pooled, dim=-1)}

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        """Nothing: these models are told the text alone."""
        return {}

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The direction from picture to noise."""
        return self.transformer(
            latents_BCHW.to(self.device, self.dtype),
            timesteps_B.to(self.device),
            conditioning["text_BMD"].to(self.dtype),
            conditioning["pooled_BP"].to(self.dtype),
        )

    def checkpoint_gradients(self, share: float) -> None:
        """Recompute a share of the denoiser's blocks in the backward pass, the first ones."""
        self.transformer.gradient_checkpointing = share

    def save(self, folder: Path) -> None:
        """Write a diffusers folder: the weights as they are now; in the model's own folder, everything else as it came."""
        found, index = self._found, dict(_MODEL_INDEX)
        sd3, t5 = found.transformer, found.text_encoder_3
        tensors = diffusers_tensors(self.transformer.state_dict(), sd3.config)
        write_tensors(folder / "transformer", "diffusion_pytorch_model", tensors, sd3.json or sd3_json(sd3.config))
        clips = (self.text_encoder, found.text_encoder), (self.text_encoder_2, found.text_encoder_2)
        for part, (network, clip) in zip(("text_encoder", "text_encoder_2"), clips, strict=True):
            config = clip.json or clip_json(network.config, projection=True)
            write_part(folder / part, "model", network, {**config, "projection_dim": network.config.projection_dim})
        if self.text_encoder_3 is not None and self.tokenizer_3 is not None and t5 is not None:
            write_part(folder / "text_encoder_3", "model", self.text_encoder_3, t5.json or t5_json(t5.config))
            for name, text in self.tokenizer_3.files(T5_TOKENS).items():
                write_atomic(folder / "tokenizer_3" / name, text.encode())
        else:
            index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        write_rest(
            folder,
            self.facts,
            ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3"],
            scheduler=found.scheduler,
            vae=(self.vae, found.vae),
            pads=dict(zip(("tokenizer", "tokenizer_2"), PADS, strict=True)),
            index=index,
        )
        write_json(folder / "model_index.json", index)  # also over its own folder's: T5 may be from elsewhere


def projected_clip(part: Component[ClipConfig], dtype: torch.dtype, device: str) -> CLIPTextModelWithProjection:
    """A CLIP from its files; where it comes without a projection, as the first one does in single files, with one that changes nothing."""
    if is_projected(part):
        return loaded(CLIPTextModelWithProjection, part, dtype, device)
    plain = loaded(CLIPTextModel, part, dtype, device)
    width = part.config.hidden_size
    with torch.device("meta"):
        whole = CLIPTextModelWithProjection(replace(part.config, projection_dim=width)).eval()
    whole.text_model = plain.text_model
    inherit(whole, plain)
    whole.text_projection.weight = nn.Parameter(torch.eye(width, dtype=dtype, device=device), requires_grad=False)
    return whole


def sd3_layers(part: Part, root: nn.Module) -> Iterator[Layer]:
    """Every Linear of a part, and the convolution that pictures enter by.

    What is outside the denoiser's blocks and all of T5 count as ``other``, which network types leave alone. diffusers' files have other
    names, and several for a product that is several layers there.
    """
    pieces: dict[str, list[Alias]] = {}
    if isinstance(root, SD3Transformer):
        for piece in sd3_pieces(root.config):
            alias = Alias(_key("lora_transformer", piece.theirs), piece.our_rows, piece.their_rows)
            pieces.setdefault(piece.ours, []).append(alias)
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            alone = [Alias(_key("lora_te", path))] if part == "text_encoder" else []
            yield Layer(
                part, path, module, _group(part, path), _key(_PREFIX[part], path), tuple(pieces.get(path, alone))
            )


def diffusers_tensors(state: Mapping[str, Tensor], config: SD3Config) -> dict[str, Tensor]:
    """The denoiser's tensors under diffusers' names, none sharing memory with another."""
    return {"pos_embed.pos_embed": state["pos_embed"].clone(), **diffusers_state(state, sd3_pieces(config))}


def _key(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _group(part: Part, path: str) -> LayerGroup:
    if part == "denoiser":
        return "transformer" if path.startswith("joint_blocks.") else "other"
    return "text" if part != "text_encoder_3" and ".layers." in path else "other"
