"""The text encoders of SD1.x, SD2.x and SDXL: the text half of CLIP (Radford et al. 2021, arXiv:2103.00020).

Shapes: B batch, L tokens, D channels, P channels of the pooled text. Module paths and state-dict keys are the classic ones,
with ``text_model.`` in front: LoRA files name their layers after them. Files without that prefix are read too (``layouts.classic_key``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.attention import attend
from lorabake.families.networks.config import ClipConfig


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention, with biases everywhere."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """BLD -> BLD."""
        q_BLD, k_BLD, v_BLD = self.q_proj(x_BLD), self.k_proj(x_BLD), self.v_proj(x_BLD)
        return self.out_proj(attend(q_BLD, k_BLD, v_BLD, self.heads, causal=True))


class CLIPMLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, channels: int, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.activation = _quick_gelu if quick_gelu else F.gelu
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, channels)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """BLD -> BLD."""
        return self.fc2(self.activation(self.fc1(x_BLD)))


class CLIPEncoderLayer(nn.Module):
    """Self-attention and MLP, each on a normed copy and added back."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config.hidden_size, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config.hidden_size, config.intermediate_size, config.quick_gelu)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """BLD -> BLD."""
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class CLIPTextEmbeddings(nn.Module):
    """A vector per token plus a vector per position."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _embedding(config.positions, config.hidden_size)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """BL -> BLD."""
        return self.token_embedding(ids_BL) + self.position_embedding.weight[: ids_BL.shape[1]]


def _embedding(count: int, width: int) -> nn.Embedding:
    """An embedding of normal numbers; of none on the meta device, where drawing them would import PyTorch's compiler (1 s)."""
    weight = torch.empty(count, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(config.layers)])

    def forward(self, x_BLD: Tensor, count: int) -> Tensor:
        """The output of the first ``count`` layers, BLD; the others are not run."""
        for layer in self.layers[:count]:
            x_BLD = layer(x_BLD)
        return x_BLD


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids_BL: Tensor, count: int) -> Tensor:
        """The normed output of the first ``count`` layers, BLD."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids_BL), count))


class CLIPTextModel(nn.Module):
    """Turns token ids into the vectors that the denoiser attends to."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, ids_BL: Tensor, clip_skip: int | None = None) -> Tensor:
        """One vector per token, BLD.

        Args:
            ids_BL: token ids, at most ``config.positions`` per row.
            clip_skip: None or 1 for the last layer's output, 2 for the one before it (and so on); always normed.

        Raises:
            ValueError: more tokens than positions, or more layers skipped than there are.
        """
        self._check(ids_BL)
        skip = clip_skip or 1
        if not 1 <= skip <= self.config.layers:
            raise ValueError(
                f"clip_skip is {clip_skip}; this text encoder has {self.config.layers} layers: give 1 to {self.config.layers}."
            )
        return self.text_model(ids_BL, self.config.layers - skip + 1)

    def penultimate(self, ids_BL: Tensor) -> Tensor:
        """One vector per token, BLD, from the layer before the last and not normed: what SDXL attends to (see :meth:`forward`)."""
        self._check(ids_BL)
        return self.text_model.encoder(self.text_model.embeddings(ids_BL), self.config.layers - 1)

    def at_end(self, ids_BL: Tensor, x_BLD: Tensor) -> Tensor:
        """The vector at each row's first end token, BD; padding may be more of them."""
        end = self.config.end_id
        places_B = (ids_BL if end is None else (ids_BL == end).int()).argmax(dim=1)
        return x_BLD[torch.arange(len(ids_BL), device=ids_BL.device), places_B]

    def _check(self, ids_BL: Tensor) -> None:
        if ids_BL.shape[1] > self.config.positions:
            raise ValueError(
                f"{ids_BL.shape[1]} tokens were given; this text encoder has {self.config.positions} positions."
            )


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same with a projection of the whole text to one vector, as pictures were compared with it in CLIP's training."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def pooled(self, ids_BL: Tensor, penultimate_BLD: Tensor) -> Tensor:
        """The whole text as one vector, BP: the end token's, through the last layer, the last norm and the projection.

        Args:
            ids_BL: token ids.
            penultimate_BLD: what :meth:`CLIPTextModel.penultimate` made of them.
        """
        last_BLD = self.text_model.final_layer_norm(self.text_model.encoder.layers[-1](penultimate_BLD))
        return self.text_projection(self.at_end(ids_BL, last_BLD))


def _quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702x), in the form that keeps one tensor for the backward pass instead of two."""
    return F.silu(1.702 * x) * (1 / 1.702)
