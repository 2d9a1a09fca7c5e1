"""The options that ``options.py`` measures: what each changes in the plain recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PLAIN = """\
[data]
folder = "dataset"

[data.captions]
shuffle = true
keep_tokens = 1

[adapter]
name = "lora"
rank = 32
conv_rank = 32

[objective]
min_timestep = 250
max_timestep = 960

[optimizer]
lr = 2.7e-3
text_encoder_lr = 1e-3
betas = [0.9, 0.99]

[schedule]
name = "linear"
warmup = 0.05

[train]
length = "300 steps"
batch_size = 4
precision = "fp32"

[save]
every = "300 steps"

[output]
name = "{name}"
trigger = "{name}"
"""
"""Like the demo's recipe, but plainer (even timesteps, a linear schedule) and shorter, so that there is room above and below."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training."""

    name: str
    settings: tuple[str, ...] = ()
    """As ``--set`` takes them; FOLDER is where the recipe is."""
    others: Literal["among", "apart", "none"] = "among"
    """Where pictures of other characters are: in the dataset, in a regularisation folder, or nowhere."""
    masks: bool = False
    """Whether there are masks: a soft oval over the middle of each picture of the character."""
    without: str = ""
    """Setting that the plain recipe has and this one has not."""
    file: str = ""
    """What the judged file's name has after the output's."""

    @property
    def title(self) -> str:
        """For the table."""
        said = [*self.settings, *([f"no {self.without}"] if self.without else [])]
        return f"{self.name}<br>`{'` `'.join(said)}`" if said else self.name

    @property
    def recipe(self) -> str:
        """The recipe before the settings."""
        lines = [line for line in PLAIN.splitlines() if not self.without or not line.startswith(f"{self.without} =")]
        return "\n".join(lines) + "\n"


SEEDS = tuple(Row(f"plain {seed}", (f"train.seed={seed}",)) for seed in (42, 1, 2, 3))


def _each(section: str, *names: str) -> tuple[Row, ...]:
    """Rows for the values of one setting."""
    kind = section.rpartition(".")[2]
    return tuple(Row(f"{kind} {name}", (f"{section}={name}",)) for name in names)


def _optimizer(name: str, *settings: str) -> Row:
    """An optimizer with its own momentum."""
    return Row(name, (f"optimizer.name={name}", *settings), without="betas")


ROWS: dict[str, tuple[Row, ...]] = {
    "Loss and weighting": (
        *_each("objective.loss", "l1"),
        Row("huber", ("objective.loss=huber",)),
        Row("huber, constant", ("objective.loss=huber", "objective.huber_schedule=constant")),
        Row("huber, exponential", ("objective.loss=huber", "objective.huber_schedule=exponential")),
        Row("smooth l1", ("objective.loss=smooth-l1",)),
        *_each("objective.weighting", "none", "soft-min-snr", "p2", "debiased", "learned"),
        Row("min-snr, gamma 1", ("objective.min_snr_gamma=1",)),
    ),
    "Noise and timesteps": (
        Row("noise offset", ("objective.noise=offset", "objective.noise_offset=0.1")),
        Row("pyramid noise", ("objective.noise=pyramid",)),
        Row("input perturbation", ("objective.input_perturbation=0.1",)),
        *_each("objective.timesteps", "stratified", "sigmoid"),
        Row("timesteps logit-normal", ("objective.timesteps=logit-normal", "objective.logit_mean=0.5")),
        Row("all timesteps", ("objective.min_timestep=0", "objective.max_timestep=1000")),
    ),
    "Pictures": (
        Row("flip", ("data.flip=true",)),
        Row("colours", ("data.augment.hue=10", "data.augment.saturation=0.2", "data.augment.brightness=0.1")),
        Row("masks", ("data.masks.source=files",), masks=True),
        Row("masks, normalise none", ("data.masks.source=files", "data.masks.normalise=none"), masks=True),
        Row("no pictures of others", others="none"),
        Row("others as regularisation", ('data.regularisation=["FOLDER/regularisation"]',), others="apart"),
        Row(
            "regularisation, prior loss weight 0.3",
            ('data.regularisation=["FOLDER/regularisation"]', "data.prior_loss_weight=0.3"),
            others="apart",
        ),
        Row("prior preservation", ("preservation.weight=1",)),
        Row("prior preservation, no pictures of others", ("preservation.weight=1",), others="none"),
    ),
    "Captions": (
        Row("no shuffling", ("data.captions.shuffle=false", "data.captions.keep_tokens=0")),
        Row("caption dropout", ("data.captions.caption_dropout=0.1",)),
        Row("tag dropout", ("data.captions.tag_dropout=0.2",)),
        Row("token warm-up", ("data.captions.token_warmup=100 steps",)),
    ),
    "Optimizers": (
        _optimizer("adamw-8bit"),
        _optimizer("prodigy", "optimizer.lr=1", "optimizer.text_encoder_lr=1"),
        _optimizer("prodigy-schedule-free", "optimizer.lr=1", "optimizer.text_encoder_lr=1", "schedule.name=constant"),
        _optimizer("dadapt-adam", "optimizer.lr=1", "optimizer.text_encoder_lr=1", "schedule.warmup=0"),
        _optimizer("adafactor"),
        _optimizer("came", "optimizer.lr=2.7e-4", "optimizer.text_encoder_lr=1e-4"),
        _optimizer("lion", "optimizer.lr=5e-4", "optimizer.text_encoder_lr=2e-4"),
        _optimizer("adamw-schedule-free", "schedule.name=constant"),
        _optimizer("muon"),
        Row("LoRA+", ("optimizer.lora_plus_ratio=4",)),
        Row("weight decay 0.1", ("optimizer.weight_decay=0.1",)),
        Row("text encoder left alone", ("optimizer.text_encoder_lr=0",)),
    ),
    "Schedules": (
        *_each(
            "schedule.name",
            "constant",
            "cosine",
            "cosine-restarts",
            "cosine-warm-restarts",
            "polynomial",
            "rex",
            "rex-warm-restarts",
            "inverse-sqrt",
        ),
        Row("no warm-up", ("schedule.warmup=0",)),
    ),
    "Adapter": (
        Row("rank 8", ("adapter.rank=8", "adapter.conv_rank=8")),
        Row("no convolutions", without="conv_rank"),
        Row("alpha half the rank", ("adapter.alpha=16", "adapter.conv_alpha=16")),
        Row("rank-stabilised", ("adapter.rank_stabilized=true", "adapter.alpha=4", "adapter.conv_alpha=4")),
        Row("dropout", ("adapter.dropout=0.1",)),
        Row("rank dropout", ("adapter.rank_dropout=0.1",)),
        Row("module dropout", ("adapter.module_dropout=0.1",)),
        Row("weight norm at most 1", ("train.max_weight_norm=1",)),
        Row("average of decay 0.99", ("train.ema=[0.99]",), file="-ema0.99"),
        Row("half the blocks", ('adapter.block_rank={"down_blocks" = 0}',)),
        Row("accumulation of 2", ("train.gradient_accumulation=2", "train.length=150 steps", "save.every=150 steps")),
    ),
    "Arithmetic": (
        *_each("train.precision", "bf16"),
        Row("gradient checkpointing", ("train.gradient_checkpointing=true",)),
    ),
}

NOT_HERE = """\
Not in the table: `objective.zero_terminal_snr` and the weighting `epsilon-like` (for models that predict v), shifted timesteps (for flow
models), random and face crops and several resolutions (the pictures here are drawn in the model's own size), `data.captions.wildcards`,
separators, prefixes and suffixes (they decide what captions say, not how it is learned), `adapter.start_from`."""
"""Options without a row, and why."""
