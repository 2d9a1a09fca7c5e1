"""Settings that belong to no single part, by section of the recipe. Each field's docstring is what ``lorabake explain`` says."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from lorabake.base.cards import Settings
from lorabake.base.units import Duration, Epochs
from lorabake.dataset.augment import AugmentConfig
from lorabake.dataset.buckets import BucketConfig
from lorabake.dataset.caption import CaptionConfig
from lorabake.protocols.family import MOST_T5_TOKENS, TextOption, TextOptions

MaxTokens = Literal[75, 150, 225]
"""What ``model.max_tokens`` may be."""


class ModelSettings(Settings):
    """The base model."""

    base: str = "pocket"
    """Base model to train on: a single .safetensors file, a model folder in diffusers layout, or 'pocket' for the small one that comes
    with lorabake."""
    vae: str | None = None
    """VAE to use in place of the base model's own, or because it has none: a .safetensors file or a folder. Absent: its own."""
    text_encoders: tuple[str, ...] = ()
    """Text encoders to use in place of the base model's own, or because it has none: .safetensors files or folders, in any order."""
    prediction: Literal["epsilon", "v"] | None = None
    """What the base model predicts, noise or v, where its files do not say it (most SD2 files) or say it wrongly. Absent: as they say."""
    clip_skip: int | None = Field(default=None, ge=1, le=12)
    """Take the output of the text encoder's N-th last layer, normed: 1 is the last, 2 the one before (the habit for anime SD1.x models).
    Absent: the ordinary output, for SD2 already the last but one of the original. diffusers counts one less."""
    max_tokens: MaxTokens = 75
    """Tokens of a caption that the text encoder reads; the rest is cut off. Each 75 are encoded apart and joined, as clients do with
    long prompts. Default 75: every step is slower with more. `lorabake validate RECIPE --captions` shows what is cut."""
    t5_tokens: int | None = Field(default=None, ge=1, le=MOST_T5_TOKENS)
    """Tokens of a caption that the T5 text encoder reads, its end included, for models that have one (Flux, SD3); the rest is cut off. Absent:
    as the model was trained, 512 for Flux dev and 256 for schnell and SD3. Fewer make every step faster, and pictures may differ a little."""

    def source(self) -> dict[str, Any]:
        """The arguments of :func:`lorabake.families.inspect_model` among them."""
        return self.model_dump(include={"base", "vae", "text_encoders", "prediction"})

    def reading(self, names: Collection[TextOption]) -> TextOptions:
        """How captions are read: those of the settings that a family of models has."""
        return {name: getattr(self, name) for name in names}


class DataSettings(Settings):
    """The pictures and captions."""

    folder: Path | tuple[Path, ...]
    """Dataset folder: subfolders named R_name (R = repeats per epoch), or pictures directly in it; captions beside them as .txt. Or a list
    of such folders: pictures directly in one that is named R_name have R repeats."""
    class_tokens: str | None = Field(default=None, min_length=1)
    """Caption of pictures that have no caption file, in folders without a number; in R_name it is the name. Absent: an empty prompt."""
    flip: bool = False
    """Show each picture mirrored half of the time. Not for subjects that are not symmetric."""
    augment: AugmentConfig = AugmentConfig()
    """What may differ each time a picture is shown."""
    buckets: BucketConfig = BucketConfig()
    """Sizes that pictures are fitted into."""
    captions: CaptionConfig = CaptionConfig()
    """What is done to captions at each step."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The dataset's folders, at least one."""
        return self.folder if isinstance(self.folder, tuple) else (self.folder,)

    @field_validator("folder")
    @classmethod
    def _is_a_folder_at_least(cls, folder: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        if folder == ():
            raise ValueError("an empty list. Give a folder, or several")
        return folder


class RateSettings(Settings):
    """Learning rates, in the optimizer section."""

    lr: float | None = Field(default=None, ge=0, le=10)
    """Learning rate of the denoiser; 0 leaves it untrained. 1e-4 is usual for LoRA on full-size models."""
    text_encoder_lr: float | None = Field(default=None, ge=0, le=10)
    """Learning rate of the text encoder; 0 leaves it untrained and lets its output be cached. Default: half of lr."""


class TrainSettings(Settings):
    """The run."""

    length: Duration = Epochs(10)
    """How long to train: "10 epochs" or "2400 steps" (optimizer steps)."""
    batch_size: int = Field(default=1, ge=1, le=4096)
    """Pictures per forward pass. Larger is steadier and, up to a point, faster per picture; costs memory."""
    gradient_accumulation: int = Field(default=1, ge=1, le=1024)
    """Forward passes per optimizer step: the effective batch is batch_size × this."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this joint L2 norm; 0 never. 1 is usual."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Everything random derives from it: the same recipe gives the same bytes."""
    precision: Literal["fp32", "bf16"] | None = None
    """Type of the frozen weights and activations; the adapter itself is always float32. Default: bf16 on a GPU that has it, fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: about 40 % slower, much less memory."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to train. Default: the GPU if there is one."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads. Default: 1 for small models, where more are slower, else all cores. Part of what makes bytes repeat."""


class SaveSettings(Settings):
    """What is written, and when."""

    every: Duration = Epochs(1)
    """How often a checkpoint is written. The last one is always written."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number type in the files. fp16 is what clients expect."""
    state_every: float = Field(default=60.0, gt=0)
    """Seconds between saves of the state a killed run continues from. It never changes the result."""


class SampleSettings(Settings):
    """Pictures drawn while training. They never change the result."""

    prompts: tuple[str, ...] = ()
    """Prompts drawn at every checkpoint and before the first step, in kohya's prompt-line form ("text --n negative --d seed --s steps --l cfg
    --g guidance"). Where cfg or guidance is not given, it is what suits the base model: cfg 5 for SD and SDXL, cfg 1 and guidance 3.5 for Flux dev."""


def file_name(text: str) -> str:
    """``text`` as a file name that every system takes: what cannot be in one becomes ``_``."""
    return re.sub(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]', "_", text).strip(". ")[:200].rstrip(". ") or "lora"


class OutputSettings(Settings):
    """What the file says of itself."""

    name: str | None = None
    """File name of the LoRA, without suffix. Default: the dataset folder's name."""
    trigger: str | None = None
    """Trigger words, written into the metadata so that the file is not an orphan."""
    comment: str | None = None
    """Free text for the metadata."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str | None) -> str | None:
        if name is not None and name != file_name(name):
            raise ValueError(
                f'{name!r} cannot be a file name everywhere. Leave out / \\ : * ? " < > |, and dots and spaces at its ends'
            )
        return name


SECTIONS: dict[str, type[Settings]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "save": SaveSettings,
    "sample": SampleSettings,
    "output": OutputSettings,
}
"""Sections with fixed settings."""

PARTS: dict[str, str | None] = {"adapter": "lora", "objective": None, "optimizer": "adamw", "schedule": "cosine"}
"""Sections whose settings come from the card of the part named in them, and the default part; None: the base model decides."""
