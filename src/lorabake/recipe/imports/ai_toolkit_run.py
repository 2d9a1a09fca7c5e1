"""How a job of ai-toolkit trains: rates, optimizer, schedule, noise and loss."""

from __future__ import annotations

import math

from lorabake.recipe.imports import _optimizers, _schedules, _values
from lorabake.recipe.imports._ai_toolkit_keys import IDLE_TRAIN, LOST_TRAIN, SWALLOWED
from lorabake.recipe.imports._reading import Reading, Row
from lorabake.recipe.imports._values import words

number, whole, flag, text = _values.number, _values.whole, _values.flag, _values.text

TRAIN = (
    Row("batch_size", "train.batch_size", whole),
    Row("gradient_checkpointing", "train.gradient_checkpointing", flag, default=True),
    Row("max_grad_norm", "train.max_grad_norm", number, default=1.0),
    Row("min_denoising_steps", "objective.min_timestep", whole, off=(0,)),
    Row("max_denoising_steps", "objective.max_timestep", whole, off=(999, 1000)),
    Row("reg_weight", "data.prior_loss_weight", number),
)


def train(train: Reading, flow: bool) -> int:
    """Set the run, rates, optimizer and schedule; micro-batches per optimizer step that steps are counted in."""
    train.rows(row for row in TRAIN)
    micro, true = train.whole("gradient_accumulation_steps") or 1, train.whole("gradient_accumulation") or 1
    steps = train.whole("steps")
    count = 1000 if steps is None else steps
    key = "gradient_accumulation_steps" if micro > 1 else "gradient_accumulation"
    if max(micro, true) > 1:
        train.put("train.gradient_accumulation", max(micro, true), key)
    if micro > 1:
        note = f"it counts passes: {count} / {micro}, rounded up, optimizer steps"
        train.put(
            "train.length", _values.span(math.ceil(count / micro), "steps"), "steps", note, None if steps else "default"
        )
    else:
        train.put(
            "train.length", _values.span(count, "steps"), "steps", "optimizer steps", None if steps else "default"
        )
    _rates(train)
    name = train.text("optimizer") or "adamw"
    arguments = _optimizers.arguments_of(train.table("optimizer_params"))
    stated = train.has("optimizer")
    ours = _optimizers.optimizer(train, "optimizer", name, arguments, "optimizer_params")
    if ours == "adamw" and not stated and "eps" not in arguments:
        train.default("optimizer.eps", 1e-6, "optimizer_params: eps")
    if ours == "adafactor":
        _optimizers.relative_adafactor(train, arguments, "optimizer_params", False)
    _schedule(train, math.ceil(count / micro))
    _precision(train)
    ema = train.table("ema_config")
    if ema.get("use_ema", bool(ema)) in (True, "true"):
        decay = train.read("ema_config: ema_decay", ema.get("ema_decay"), number)
        train.put(
            "train.ema",
            [0.999 if decay is None else decay],
            "ema_config: ema_decay",
            "a second file NAME-ema beside each checkpoint; ai-toolkit saves that one alone",
        )
    train.seen |= {"ema_config", "optimizer_params", "lr_scheduler_params"}
    if train.flag("diff_output_preservation"):
        weight = train.number("diff_output_preservation_multiplier")
        train.put(
            "preservation.weight",
            1.0 if weight is None else weight,
            "diff_output_preservation",
            "captions without the trigger are answered as the base does",
        )
        if (words := train.text("diff_output_preservation_class")) is not None:
            train.put("preservation.class_words", words, "diff_output_preservation_class")
    return micro


def _rates(train: Reading) -> None:
    usual, unet, encoder = train.number("lr"), train.number("unet_lr"), train.number("text_encoder_lr")
    base = 1e-6 if usual is None else usual
    if train.has("train_unet") and not train.flag("train_unet"):
        train.put("optimizer.lr", 0.0, "train_unet", "0 leaves the denoiser untrained")
    elif unet is not None:
        train.put("optimizer.lr", unet, "unet_lr")
    else:
        train.put("optimizer.lr", base, "lr", kind=None if usual is not None else "default")
    if usual is not None and unet is not None and encoder is not None:
        train.unused("lr", "each part has a rate of its own.")
    if train.flag("train_text_encoder"):
        train.put(
            "optimizer.text_encoder_lr",
            base if encoder is None else encoder,
            "train_text_encoder" if encoder is None else "text_encoder_lr",
            "as lr" if encoder is None else "",
        )
    else:
        note = "0 leaves the text encoders untrained"
        train.put(
            "optimizer.text_encoder_lr",
            0.0,
            "train_text_encoder",
            note,
            None if train.has("train_text_encoder") else "default",
        )


def _schedule(train: Reading, steps: int) -> None:
    params = train.table("lr_scheduler_params")
    name = (train.text("lr_scheduler") or "constant").lower()
    if name == "cosine_with_restarts":  # its period is the whole run, so it never restarts
        train.put("schedule.name", "cosine", "lr_scheduler", "its period is the whole run, so that it never restarts")
    else:
        warmup = params.get("num_warmup_steps", params.get("warmup_steps"))
        given = _schedules.Given(
            "lr_scheduler",
            name,
            "lr_scheduler_params: num_warmup_steps",
            train.read("lr_scheduler_params: num_warmup_steps", warmup, number),
            steps,
            lr=train.get("optimizer.lr"),
        )
        _schedules.schedule(train, given)
    lowest = train.read("lr_scheduler_params: eta_min", params.get("eta_min"), number)
    lr = train.get("optimizer.lr")
    if lowest is not None and lr and name.startswith("cosine") and 0 < lowest < lr:
        train.put("schedule.floor", lowest / lr, "lr_scheduler_params: eta_min", f"{lowest:g} of {lr:g}")
    elif name.startswith("cosine") and lowest is not None:
        train.say("same", "lr_scheduler_params: eta_min", "schedule.floor", None, "off")


def _precision(train: Reading) -> None:
    given = (train.text("dtype") or "").lower()
    if given in ("bf16", "bfloat16"):
        train.put("train.precision", "bf16", "dtype")
    elif given in ("fp32", "float32", "float"):
        train.put("train.precision", "fp32", "dtype")
    elif given in ("fp16", "float16"):
        train.put("train.precision", "fp16", "dtype")


def objective(train: Reading, flow: bool) -> None:
    """Set the objective, and account for what is left of the train section."""
    gamma = train.number("min_snr_gamma")
    if gamma and not flow:
        train.put("objective.weighting", "min-snr", "min_snr_gamma")
        train.put("objective.min_snr_gamma", gamma, "min_snr_gamma")
    elif gamma:
        train.unused("min_snr_gamma", "it is not for flow models.")
    if not (gamma and not flow):
        train.put("objective.weighting", "none", "min_snr_gamma", kind="default")
    if offset := train.number("noise_offset"):
        train.put("objective.noise", "offset", "noise_offset", "the kind of noise that it is")
        train.put("objective.noise_offset", offset, "noise_offset")
    loss = (train.text("loss_type") or "mse").lower()
    if loss in ("mse", "mae"):
        if train.has("loss_type"):
            train.put("objective.loss", {"mse": "l2", "mae": "l1"}[loss], "loss_type")
    else:
        train.lost("loss_type", "there is no such loss here, so the recipe has l2. `lorabake list losses` shows all.")
    _timesteps(train, flow)
    for key in ("content_or_style", "content_or_style_reg"):
        if (train.text(key) or "balanced") != "balanced":
            train.lost(
                key,
                "near: objective.timesteps = 'logit-normal', with objective.logit_mean above 0 for content and below for style.",
            )
    train.losses(LOST_TRAIN)
    keys = words(
        """
timestep_type loss_type dtype lr unet_lr text_encoder_lr train_unet train_text_encoder optimizer lr_scheduler steps
ema_config
"""
    )
    train.rest(IDLE_TRAIN, [*keys, *(row.key for row in TRAIN)], SWALLOWED)


def _timesteps(train: Reading, flow: bool) -> None:
    key = "timestep_type"
    given = (train.text(key) or "sigmoid").lower()
    if not flow:
        if train.has(key):
            train.unused(key, "it is for flow models.")
        return
    stated = None if train.has(key) else "default"
    if given == "sigmoid":
        train.put("objective.timesteps", "sigmoid", key, kind=stated)
    elif given == "linear":
        train.put("objective.timesteps", "uniform", key, "drawn evenly")
    elif given == "lognorm_blend":
        train.put("objective.timesteps", "logit-normal", key, "the nearest to it")
        train.lost(key, "its blend of two distributions is not ours.")
    else:
        train.put("objective.timesteps", "flux-shift" if "shift" in given else "uniform", key, "the nearest to it")
        train.lost(
            key, f"'{given}' draws or weighs timesteps otherwise. `lorabake list timesteps` shows what there is."
        )
