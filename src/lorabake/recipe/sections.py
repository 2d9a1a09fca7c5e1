"""Settings that belong to no single part, by section of the recipe. Each field's docstring is what ``lorabake explain`` says."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lorabake.base import patterns
from lorabake.base.cards import Settings
from lorabake.base.units import Duration, Epochs
from lorabake.dataset.augment import AugmentConfig
from lorabake.dataset.buckets import BucketConfig
from lorabake.dataset.caption import CaptionConfig, replaced
from lorabake.dataset.masks import MaskConfig
from lorabake.protocols.family import MOST_T5_TOKENS, Quantisation, TextOption, TextOptions

Rate = Annotated[float, Field(ge=0, le=10)]
"""A learning rate."""
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

    quantize: Quantisation | None = None
    """Store the large layers of the frozen denoiser, and of T5, in fewer bits: int8 or fp8 take a half, nf4 about 0.28 of their bf16 memory. They are
    computed anew at each use, so steps are slower; int8 is closest to the original, nf4 farthest. The LoRA is trained, saved and used as ever.
    Absent: off, as long as the model fits. Samples drawn while training are of the quantised model."""

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
    repeats: Annotated[int, Field(ge=1, le=10_000)] | tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = ()
    """How often each picture of the folder is trained on per epoch, or a list with a number for each folder: in place of the number in front of the
    folder's own name. Numbers of folders inside it count besides. Absent: as the names say. 1 to 20 is usual."""
    class_tokens: str | None = Field(default=None, min_length=1)
    """Caption of pictures that have no caption file, in folders without a number; in R_name it is the name. Absent: an empty prompt."""
    regularisation: tuple[Path, ...] = ()
    """Folders of regularisation pictures: the class without what is being learnt, best drawn by the base model itself, named as in `folder` and lying
    apart from it. Every epoch takes some of them in turn, and says how many. Their captions get no prefix or suffix. Default: none."""
    regularisation_ratio: float = Field(default=1.0, gt=0, le=100)
    """Regularisation pictures per training picture and epoch, repeats counted. Default 1, as is the custom: an epoch is twice as long."""
    prior_loss_weight: float = Field(default=1.0, gt=0, le=100)
    """What the loss of regularisation pictures is multiplied by. Default 1; 0.3 to 1 is usual, less holds the class less."""
    flip: bool = False
    """Show each picture mirrored half of the time. Not for subjects that are not symmetric."""
    augment: AugmentConfig = AugmentConfig()
    """What may differ each time a picture is shown."""
    buckets: BucketConfig = BucketConfig()
    """Sizes that pictures are fitted into."""
    captions: CaptionConfig = CaptionConfig()
    """What is done to captions at each step."""
    masks: MaskConfig = MaskConfig()
    """Which places of the pictures are trained."""

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

    @property
    def repeats_of_each(self) -> tuple[int, ...]:
        """Those of every folder; empty where the folders' names say it."""
        return self.repeats if isinstance(self.repeats, tuple) else (self.repeats,) * len(self.folders)

    @model_validator(mode="after")
    def _repeats_are_for_folders(self) -> DataSettings:
        given, there = len(self.repeats_of_each), len(self.folders)
        if given and given != there:
            raise ValueError(
                f"repeats has {given} numbers, and folder has {there}. Give one for each, or a single one for all"
            )
        return self

    @field_validator("regularisation", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, given: Any) -> Any:
        if isinstance(given, str | Path):
            return (given,)
        return tuple(given) if isinstance(given, list) else given


class PreservationSettings(Settings):
    """Keeping what the base model answers where the LoRA is not meant. Needs no pictures of its own."""

    weight: float = Field(default=0.0, ge=0, le=100)
    """How much it counts that captions without the trigger are answered as the base model does: the difference, at the same noisy picture, times
    this is added to the loss. Default 0: off, and free. 1 is usual, 0.1 to 10 safe. Each batch then takes one pass more without and one with
    gradients, about 2.3 times as long; `share` makes that less."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the batches that are asked this, by chance. Each then counts 1 / share, so that the pull is as strong; 0.5 takes half of
    the added time. Default 1: every batch."""
    trigger: str | None = None
    """What is taken out of captions: whole tags or words; several are parted by commas. Default: output.trigger. Captions that do not hold it are
    not asked: what is being taught cannot be kept."""
    class_words: str = ""
    """What is put in the trigger's place, such as "1girl" or "a woman". Default nothing."""
    caption: str | None = None
    """A text that is kept in place of the captions without the trigger; "" is the empty prompt. Default: the captions."""
    outside_masks: float = Field(default=0.0, ge=0, le=100)
    """How much it counts that the black of masks is answered as the base model does, to the same caption. Default 0: off. 1 is usual, 0.1 to 10 safe.
    Takes one pass more without gradients, about 1.3 times as long. Needs data.masks."""

    def kept_caption(self, caption: str) -> str:
        """What is asked in place of a step's caption. Equal to it where it holds no trigger."""
        if self.caption is not None:
            return self.caption
        return replaced(caption, self.trigger or "", self.class_words)


class RateSettings(Settings):
    """Learning rates, in the optimizer section."""

    lr: float | None = Field(default=None, ge=0, le=10)
    """Learning rate of the denoiser; 0 leaves it untrained. 1e-4 is usual for LoRA on full-size models."""
    text_encoder_lr: Rate | tuple[Rate, ...] | None = None
    """Learning rate of the text encoders, or a list with one for each; 0 leaves it untrained and lets its output be cached. Default: half of lr."""
    block_lr: dict[str, float] | None = None
    """Table of factors on the learning rate: pattern = factor. A pattern is a piece of a layer's name (mid_block, down_blocks.0) or a regular
    expression; the first that is found decides, other layers have factor 1. To leave layers out, see adapter.block_rank."""
    lora_plus_ratio: float | None = Field(default=None, gt=1, le=1000)
    """LoRA+ (arXiv 2402.12354): weights that begin at zero (lora_up) learn this many times as fast. Absent: off. 4 to 16 where used, at a lower lr."""

    @field_validator("block_lr")
    @classmethod
    def _is_a_table_of_factors(cls, table: dict[str, float] | None) -> dict[str, float] | None:
        for pattern, factor in (table or {}).items():
            if not 0 < factor <= 1000:
                raise ValueError(f"the factor of '{pattern}' is {factor:g}: it must be above 0, and at most 1000")
        patterns.checked(table)
        return table

    @property
    def text_encoder_lrs(self) -> tuple[float, ...]:
        """The text encoders' rates that are given."""
        given = self.text_encoder_lr
        return given if isinstance(given, tuple) else () if given is None else (given,)


class StartSettings(Settings):
    """Where training begins, in the adapter section."""

    start_from: str | None = None
    """LoRA file to train on, in place of a new adapter: of the same network type and rank, its alpha may differ. The first step finds the
    file's own change, exactly. Absent: a new adapter, which changes nothing yet. To continue a run, use the run itself."""


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
    max_weight_norm: float | None = Field(default=None, gt=0, le=1000)
    """No layer's change may be larger than this: after each step what is, is scaled down to it (kohya's scale_weight_norms). Absent: no limit. 1 keeps
    a LoRA gentle beside others."""
    ema: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Decays of running averages of the weights, such as [0.99, 0.999]: for each, every checkpoint gets a second file, NAME-ema0.99. Averages are
    smoother than the last step; 0.99 looks back over some hundred steps. They never change the training. `lorabake grid RUN` shows each as a row;
    where pictures are held out (validation), the loss with each is told too."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Everything random derives from it: the same recipe gives the same bytes."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Type of the frozen weights and activations; the adapter itself is always float32. Default: bf16 on a GPU that has it, fp32 on a CPU.
    fp16 takes as little memory, and is for GPUs without bf16: the loss is scaled up so that small gradients are not lost, and steps in which
    something overflows are skipped. Not for Flux and SD3, which overflow in it."""
    gradient_checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] = False
    """Recompute activations instead of keeping them: about 40 % slower, much less memory. Or the share of the denoiser's blocks to do so with, such
    as 0.5: about that share of the time and of what is saved. The result is the same to the last bit. Default: none."""
    blocks_to_swap: int = Field(default=0, ge=0, le=1000)
    """Blocks of the frozen denoiser that wait in main memory and come to the GPU one ahead of their turn, for models that are larger than the card: two
    of them are there at any time, so 3 is the fewest. Needs gradient_checkpointing = true. More than the model has means all. The result is the
    same; steps are slower as soon as copying takes longer than computing. Default 0: none."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to train. Default: the GPU if there is one."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads. Default: 1 for small models, where more are slower, else all cores. Part of what makes bytes repeat."""


class ValidationSettings(Settings):
    """The loss of pictures that are not trained on: it rises again when the LoRA begins to learn its pictures by heart. It never changes
    the result."""

    share: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the dataset's pictures that is held out of training. Which ones depends on their bytes and `seed` alone, so that more pictures change
    nothing for those that are there. Default 0; 0.1 is usual for 50 pictures and more, below it every picture is better trained on."""
    folder: Path | None = None
    """A folder of pictures to ask about, named as data.folder and lying apart from it; in place of a share. Default: none."""
    every: Duration = Epochs(1)
    """How often they are asked about; also before the first step and after the last."""
    timesteps: int = Field(default=4, ge=1, le=64)
    """Amounts of noise at which each picture is asked about, spread as training draws them; always the same, with the same noise. Default 4: each takes
    a forward pass, once more for the base, and once for each of train.ema."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Which pictures are held out, and their noise. It is apart from train.seed, so that runs with other seeds can be compared."""

    @property
    def wanted(self) -> bool:
        """Whether anything is asked."""
        return self.share > 0 or self.folder is not None


class SaveSettings(Settings):
    """What is written, and when."""

    every: Duration = Epochs(1)
    """How often a checkpoint is written. The last one is always written."""
    keep: int | None = Field(default=None, ge=1)
    """Checkpoints kept: the newest ones of the run, the final one and those inside epochs counted alike. Older ones are deleted once a
    newer one is safely written, and only as the run wrote them: a file that was changed since stays. Absent: all are kept."""
    keep_state: bool = False
    """Keep a state beside each checkpoint, from which a new run can go on: `lorabake train RECIPE --from-state CHECKPOINT --into FOLDER`.
    About twelve bytes for each trained weight. A run that was stopped or killed continues without it."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number type in the files. fp16 is what clients expect."""
    state_every: float = Field(default=60.0, gt=0)
    """Seconds between saves of the state a killed run continues from. It never changes the result."""
    tensorboard: bool = False
    """Write tb/ in the run folder while training, for TensorBoard: loss, rates, gradient norm, pictures per second, samples.
    `lorabake tensorboard RUN` writes it afterwards."""


class SampleSettings(Settings):
    """Pictures drawn while training, with the LoRA as it is saved. They never change the result."""

    every: Duration | None = None
    """How often they are drawn. Absent: with every checkpoint. Before the first step and at the end they are drawn in any case."""
    prompts_file: str | None = None
    """Text file with more prompts, one a line; # starts a comment. What is not understood is an error that names the line."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw, in kohya's prompt-line form ("text --n negative --d seed --s steps --l cfg
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
    "preservation": PreservationSettings,
    "validation": ValidationSettings,
    "save": SaveSettings,
    "sample": SampleSettings,
    "output": OutputSettings,
}
"""Sections with fixed settings."""

PARTS: dict[str, str | None] = {"adapter": "lora", "objective": None, "optimizer": "adamw", "schedule": "cosine"}
"""Sections whose settings come from the card of the part named in them, and the default part; None: the base model decides."""

BESIDE: dict[str, tuple[str, type[Settings]]] = {
    "adapter": ("start", StartSettings),
    "optimizer": ("rates", RateSettings),
}
"""Settings that stand in a part's section whichever part it is, and the recipe's own name for them."""
