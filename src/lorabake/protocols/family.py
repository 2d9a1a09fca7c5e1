"""What a model family offers: facts read without torch, and a loaded model that can encode, predict and name its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lorabake.base.cards import Card

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Prediction = Literal["epsilon", "v", "flow"]
"""What the denoiser answers: the noise ε, v, or the direction from picture to noise (flow matching)."""
Part = Literal["denoiser", "text_encoder", "text_encoder_2", "text_encoder_3"]
Quantisation = Literal["int8", "fp8", "nf4"]
"""How weights are stored in few bits."""
Resident = Literal[Part, "vae"]
"""What of a model is in memory or not: its parts, and its autoencoder."""
LayerGroup = Literal["transformer", "resnet", "text", "norm", "other"]
"""What kind of layer, or where. Norms are a group of their own wherever they are."""
ZERO_TERMINAL_SNR: Mapping[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Scheduler settings of models whose last timestep is noise alone: rescaled betas (algorithm 1 of arXiv 2305.08891), and timesteps that begin
at the last one (table 2)."""

TextOption = Literal["clip_skip", "max_tokens", "t5_tokens"]
"""Settings of a recipe's model section about how captions are read, which not every family has."""
MOST_T5_TOKENS = 512
"""No model was trained with more tokens of T5's for a caption."""
TextOptions = Mapping[TextOption, "int | None"]
"""Values for them; what is missing or None is as the family has it."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a base model is, as its user gave it; every path exists."""

    base: Path
    """A single ``.safetensors`` file, or a folder in diffusers layout."""
    vae: Path | None = None
    """An autoencoder to use in place of the base's own: a file or a folder."""
    text_encoders: tuple[Path, ...] = ()
    """Text encoders to use in place of the base's own: files or folders, in any order."""
    prediction: Prediction | None = None
    """What the user says that the denoiser predicts; None believes the files."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a base model from its small files and the headers of its large ones, before any weight is read."""

    family: str
    path: Path
    name: str
    prediction: Prediction
    resolution: int
    """Side in pixels of the square the model was trained on; areas are budgeted against its square."""
    pixel_step: int
    """Picture sides must be multiples of this many pixels (VAE scale × the denoiser's own down-sampling)."""
    latent_scale: int
    """Pixels per latent cell along a side."""
    latent_channels: int
    base_version: str
    """``ss_base_model_version`` as other tools write it, e.g. ``sd_v1``."""
    architecture: str
    """``modelspec.architecture`` without the adapter suffix, e.g. ``stable-diffusion-v1``."""
    digest: str
    """Fingerprint (hex) of all files of the model, to tell whether a run still stands on the same base."""
    small: bool
    """Narrow layers, as the pocket model has: they want a higher learning rate, and one thread on a CPU."""
    shift: float | None = None
    """How far the model's own schedule moves timesteps towards noise, for flow models whose files say it."""
    usual_cfg: float = 5.0
    """Strength of classifier-free guidance that its pictures are drawn with where nobody says; 1 for models that are distilled for going without."""
    usual_guidance: float | None = None
    """Guidance that guidance-distilled models are told where nobody says; None for models that are told none."""
    usual_t5_tokens: int | None = None
    """Tokens of a caption that T5 reads where nobody says, with its end: as the model was trained. None for models without T5."""
    implementation: str = "diffusers"
    """``modelspec.implementation`` of the family's LoRA files: whose layer names they follow, as other tools write it."""
    vae: Path | None = None
    """As in :class:`ModelSource`."""
    text_encoders: tuple[Path, ...] = ()
    """As in :class:`ModelSource`."""
    notes: tuple[str, ...] = ()
    """What had to be assumed because the files do not say it, and how to say it."""

    @property
    def source(self) -> ModelSource:
        """Where the model is, with what is known of its prediction."""
        return ModelSource(self.path, self.vae, self.text_encoders, self.prediction)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text encoder sees of a caption."""

    tokens: int
    """Tokens of the whole caption, without start and end."""
    room: int
    """Tokens that fit."""
    windows: int
    """Rows of the text encoder's own length that hold some of it; at least 1."""
    kept: str
    lost: str
    """The end of the caption that does not fit; empty when all of it does."""


Reader = Callable[[Sequence[str]], list[Reading]]
"""Reads captions as one text encoder's tokenizer does."""


@dataclass(frozen=True)
class FamilyCard(Card):
    """A family's card: how its models are recognised on disk, from names and metadata inside, never from the file's name."""

    recognise: Callable[[ModelSource], ModelFacts | None] = lambda source: None
    """Facts, or None for models of other families. Raises UserError for a model of the family that cannot be used."""
    text_options: frozenset[TextOption] = frozenset()
    """Which of them models of this family are loaded with; the others do nothing."""
    fp16: bool = True
    """Whether its models can be run in float16."""
    groups: frozenset[LayerGroup] = frozenset({"transformer", "resnet", "text", "norm"})
    """Which groups its models' layers are in, but for ``other``, whose layers no network type changes."""
    readers: Callable[[ModelFacts, TextOptions], Mapping[Part, Reader]] = lambda facts, options: {}
    """For each text encoder what it sees of captions, told from the tokenizer's files alone, without weights or torch.
    The options are the recipe's settings. Raises UserError where those files are broken."""


class ComputedWeight:
    """A layer whose ``weight`` is not in memory: asked for it, it computes it anew, frozen. Calling it keeps no weight for the backward pass."""


@dataclass(frozen=True, slots=True)
class Alias:
    """What some LoRA files call a layer, or some of its rows, besides the layer's own key. Rows are outputs: first, behind the last."""

    key: str
    """As :attr:`Layer.key`: prefix and path, with underscores."""
    rows: tuple[int, int] | None = None
    """The layer's rows that have this name; None is all of them. What is one layer here may be several elsewhere."""
    its_rows: tuple[int, int] | None = None
    """Which rows of what has this name they are; None is all of them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model that an adapter may change."""

    part: Part
    path: str
    """Dotted path of the module inside its part."""
    module: nn.Module
    group: LayerGroup
    key: str
    """The layer's name in kohya-format files, e.g. ``lora_unet_mid_block_attentions_0_proj_in``."""
    aliases: tuple[Alias, ...] = ()
    """Other names it has in files; it is never written under them. No alias is the key of another layer."""

    @property
    def names(self) -> tuple[str, str]:
        """What tables by pattern look in: the key, and part and path with dots."""
        return self.key, f"{self.part}.{self.path}"


Tokens = dict[str, "Tensor"]
"""Token ids ``ids_BL`` by text encoder, under the names of parts; every tensor has the batch first. Where captions may be longer
than the text encoder, L is a multiple of its length: one window after the other."""
Conditioning = dict[str, "Tensor"]
"""What the denoiser is told besides the latents; every tensor has the batch first."""


@dataclass(frozen=True, slots=True)
class Framing:
    """How a picture came to its size, for models that are told so (SDXL)."""

    original_wh: tuple[int, int]
    """Pixels of the file."""
    corner_lt: tuple[int, int]
    """Pixels cut off at the left and at the top, after resizing, as the mirrored picture shows them if it is mirrored."""
    target_wh: tuple[int, int]
    """Pixels of what is trained on."""


class Model(Protocol):
    """A loaded base model. Latents are scaled as the denoiser expects them; images are RGB in [-1, 1]."""

    facts: ModelFacts
    parts: Mapping[Part, nn.Module]
    betas_T: Tensor | None
    """Noise schedule of training, float64 on the CPU; None for flow matching."""
    sampler: Mapping[str, Any]
    """The scheduler settings the model came with (timestep spacing, steps offset …)."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def latent_space(self) -> str:
        """sha256 (hex) of what makes latents: the VAE's bytes and its scale. Cached latents carry it in their keys."""
        ...

    @property
    def text_space(self) -> str:
        """sha256 (hex) that tells the text encoders from others. What is kept of captions carries it in its keys."""
        ...

    def layers(self) -> Sequence[Layer]:
        """Every layer an adapter may change, in a fixed order."""
        ...

    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of images; the posterior's mean without a generator, a sample with one."""
        ...

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Images of latents, in [-1, 1] give or take the decoder's overshoot."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Token ids for each text encoder, padded and cut to the model's length."""
        ...

    def encode_text(self, tokens: Tokens) -> Conditioning:
        """Conditioning of token ids; gradients flow into the text encoders where they are trained."""
        ...

    def frame(self, framings: Sequence[Framing]) -> Conditioning:
        """What the denoiser is told of each picture's size and crop, on the CPU, to be joined with the text's conditioning; often nothing."""
        ...

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output (as ``facts.prediction`` says) for noisy latents.

        Flow models take timesteps too: 1000 times the share of noise, not rounded.
        """
        ...

    def checkpoint_gradients(self, share: float) -> None:
        """Trade time for memory: recompute activations in the backward pass, in this share of the denoiser's blocks (0 none, 1 all)."""
        ...

    def swap_blocks(self, count: int) -> Callable[[], str]:
        """Have so many of the denoiser's blocks wait in main memory until their turn, all of them if there are fewer. Only for frozen weights, and to
        train with all blocks recomputed; to be called before adapters are put on. Returns what tells how much that is, once the weights are there."""
        ...

    def resting(self) -> frozenset[Resident]:
        """What of the model is not in memory."""
        ...

    def rest(self, names: Iterable[Resident]) -> None:
        """Let weights leave memory; trained ones stay. Whatever uses them has them read again."""
        ...

    def wake(self, names: Iterable[Resident]) -> None:
        """Have weights in memory. Needed before they are looked at; to be computed with, they come by themselves."""
        ...

    def save(self, folder: Path) -> None:
        """Write the whole model as a folder that other tools read (weights as they are now)."""
        ...
