"""Training configs of kohya's sd-scripts (``--config_file``), with the dataset config (``--dataset_config``) or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lorabake.recipe.imports import (
    _blocks,
    _network,
    _optimizers,
    _prompts,
    _schedules,
    _transformer_blocks,
    _values,
    kohya_data,
    kohya_memory,
    kohya_objective,
)
from lorabake.recipe.imports._kohya_rows import IDLE_KEYS, LEFT, LOST, PRECISIONS, SUBSET, TRAINING
from lorabake.recipe.imports._optimizers import arguments_of
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.imports._values import words

Family = Literal["sd", "sdxl", "sd3", "flux", "other"]
SWALLOWED = "sd-scripts takes no notice of it, without a word."
DEFAULT_LR = 2e-6
DEFAULT_STEPS = 1600
_PARTS = {"ae": "model.vae", "vae": "model.vae"}
_SDXL_NAMES = ("sdxl", "sd_xl", "stable-diffusion-xl", "pony", "illustrious", "noobai")
_ENCODERS = ("clip_l", "clip_g", "t5xxl")
HANDLED = frozenset(
    words(
        """
pretrained_model_name_or_path vae ae clip_l clip_g t5xxl t5xxl_max_token_length max_token_length clip_skip
v_parameterization learning_rate unet_lr text_encoder_lr network_train_unet_only network_train_text_encoder_only
network_module network_args network_dim network_alpha network_dropout network_weights dim_from_weights optimizer_type
optimizer_args use_8bit_adam use_lion_optimizer lr_scheduler lr_scheduler_type lr_scheduler_args lr_warmup_steps
lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_decay_steps
max_train_epochs max_train_steps save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_steps
save_precision mixed_precision sample_prompts sample_every_n_epochs sample_every_n_steps train_data_dir reg_data_dir
dataset_config masked_loss logging_dir log_with validate_every_n_epochs validate_every_n_steps caption_extention
dataset_repeats fp8_base fp8_base_unet block_lr
blocks_to_swap split_mode
"""
    )
)
"""Keys that are read by hand."""


def read(reading: Reading, dataset: Mapping[str, Any] | None) -> None:
    """Set everything that a training config says."""
    family = family_of(reading.given)
    if family == "other":
        reading.lost(
            "network_module",
            "lorabake has no such family of models: SD 1 and 2, SDXL, SD3 and Flux.1 are trained. Give one of these as model.base.",
        )
    _model(reading, family)
    kohya_data.data(reading, dataset)
    ratios = _network.network(reading, family)
    reading.rows(
        row for row in TRAINING if row.setting not in ("train.batch_size",) or not reading.get("train.batch_size")
    )
    steps = _length(reading)
    rates(reading, family, ratios)
    _optimizer(reading, steps)
    kohya_objective.objective(reading, family)
    _precision(reading)
    kohya_memory.memory(reading, family)
    _saving(reading)
    _samples(reading, family)
    _validation(reading)
    _no_use(reading, dataset)
    reading.losses(LOST)
    reading.losses(LEFT, "left")
    reading.rest(IDLE_KEYS, HANDLED | {row.key for row in (*TRAINING, *SUBSET)} | kohya_data.KEYS, SWALLOWED)


def family_of(given: Mapping[str, Any]) -> Family:
    """Which family the config is for: sd-scripts has a program for each, and files say it by the keys that they have."""
    module, kind = str(given.get("network_module") or ""), str(given.get("model_train_type") or "")
    has = {key for key in given if not _values.is_nothing(given[key])}
    if any(name in module for name in ("lumina", "anima", "hunyuan", "wan", "qwen")):
        return "other"
    if "clip_g" in has or module.endswith("_sd3") or kind.startswith("sd3"):
        return "sd3"
    if has & {"ae", "t5xxl"} or module.endswith("_flux") or kind.startswith("flux"):
        return "flux"
    sdxl = given.get("sdxl") in (True, "true", "True") or kind.startswith("sdxl")
    return "sdxl" if sdxl or is_sdxl_name(str(given.get("pretrained_model_name_or_path") or "")) else "sd"


def is_sdxl_name(base: str) -> bool:
    """Whether a base model is called as those of SDXL are."""
    return any(word in base.lower() for word in _SDXL_NAMES)


def _model(reading: Reading, family: Family) -> None:
    base = reading.text("pretrained_model_name_or_path")
    if base is None:
        reading.warnings.append("The file names no base model: put one in as model.base.")
        reading.put("model.base", "put your base model in here", "pretrained_model_name_or_path", "", "default")
    else:
        reading.put(
            "model.base",
            located(reading, "pretrained_model_name_or_path", base, model=True),
            "pretrained_model_name_or_path",
        )
    for key, setting in _PARTS.items():
        if (path := reading.text(key)) is not None:
            reading.put(setting, located(reading, key, path), key)
    encoders = [(key, path) for key in _ENCODERS if (path := reading.text(key)) is not None]
    if encoders:
        paths = [located(reading, key, path) for key, path in encoders]
        reading.put("model.text_encoders", paths, encoders[0][0])
        for key, _ in encoders[1:]:
            reading.say("same", key, "model.text_encoders", None, "in the same list")
    if reading.flag("v_parameterization"):
        reading.put("model.prediction", "v", "v_parameterization")
    _text(reading, family)


def _text(reading: Reading, family: Family) -> None:
    skip = reading.whole("clip_skip")
    if skip is not None and family != "sd" and skip > 1:
        reading.unused("clip_skip", f"sd-scripts does not look at it for {family}.")
    elif skip is not None and skip > 1:
        reading.put("model.clip_skip", skip, "clip_skip")
    elif skip is not None:
        reading.say("same", "clip_skip", "model.clip_skip", None, "the ordinary output")
    length = reading.whole("max_token_length")
    if length is not None and family == "flux":
        reading.unused("max_token_length", "Flux's CLIP reads 75 tokens.")
    elif length is not None:
        reading.put("model.max_tokens", length, "max_token_length")
    if (t5 := reading.whole("t5xxl_max_token_length")) is not None:
        if family in ("flux", "sd3"):
            reading.put("model.t5_tokens", t5, "t5xxl_max_token_length")
        else:
            reading.unused("t5xxl_max_token_length", "the model has no T5.")


def _length(reading: Reading) -> int | None:
    """Set the length of the run; optimizer steps, if they are known."""
    epochs, steps = reading.whole("max_train_epochs"), reading.whole("max_train_steps")
    if epochs:
        reading.put("train.length", _values.span(epochs, "epochs"), "max_train_epochs", "with its unit")
        if reading.has("max_train_steps"):
            reading.unused("max_train_steps", "max_train_epochs takes its place.")
        return None
    if steps:
        reading.put("train.length", _values.span(steps, "steps"), "max_train_steps", "optimizer steps")
    else:
        reading.default("train.length", _values.span(DEFAULT_STEPS, "steps"), "max_train_steps")
    return steps or DEFAULT_STEPS


def rates(reading: Reading, family: Family, ratios: Mapping[str, Any]) -> None:
    """Set the learning rates: a part without one of its own has learning_rate, and 0 leaves a part untrained."""
    usual, unet, encoder = (
        reading.number("learning_rate"),
        reading.number("unet_lr"),
        reading.take("text_encoder_lr", _values.numbers),
    )
    base = DEFAULT_LR if usual is None else usual
    only_unet, only_text = reading.flag("network_train_unet_only"), reading.flag("network_train_text_encoder_only")
    if only_text:
        reading.put("optimizer.lr", 0.0, "network_train_text_encoder_only", "0 leaves the denoiser untrained")
    elif unet is not None:
        reading.put("optimizer.lr", unet, "unet_lr")
    else:
        reading.put("optimizer.lr", base, "learning_rate", kind=None if usual is not None else "default")
    if usual is not None and (unet is not None or only_text):
        if encoder or only_unet:
            reading.unused("learning_rate", "each part has a rate of its own.")
        else:
            reading.say("same", "learning_rate", "optimizer.text_encoder_lr", None, "of the text encoders")
    if only_unet:
        reading.put("optimizer.text_encoder_lr", 0.0, "network_train_unet_only", "0 leaves the text encoders untrained")
        if encoder:
            reading.unused("text_encoder_lr", "network_train_unet_only.")
    else:
        _text_rates(reading, family, encoder or [base], bool(encoder))
    _plus(reading, ratios, only_unet)
    _blocks.absolute(reading, reading.get("optimizer.lr") or 0.0)
    _transformer_blocks.rates(reading, ratios.get(_transformer_blocks.REG_LRS))


def _text_rates(reading: Reading, family: Family, given: list[float], stated: bool) -> None:
    """T5 is never trained here, and there only if that is said; a single rate is for all."""
    key, kind = "text_encoder_lr", None if stated else "default"
    count = {"flux": 2, "sd3": 3}.get(family, 0)
    each = (given * count)[:count] if len(given) == 1 else given
    if count and len(each) == count and any(each):
        each = [*each[:-1], 0.0]
        note = "for each text encoder; T5 is not trained"
        reading.put(f"optimizer.{key}", each, key, note, kind or "converted")
    elif len(set(each or given)) == 1:
        reading.put(f"optimizer.{key}", given[0], key, "" if stated else "theirs is learning_rate", kind)
    else:
        reading.put(f"optimizer.{key}", given, key)


def _plus(reading: Reading, ratios: Mapping[str, Any], only_unet: bool) -> None:
    """LoRA+, by key of the training config (as the GUI writes it) or by network argument."""
    names = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
    found: dict[str, float] = {}
    for name in names:
        ratio = reading.read(f"network_args: {name}", ratios.get(name), _values.number)
        if ratio is not None and ratio > 0:
            found[name] = ratio
    usual = found.get(names[0])
    unet, text = found.get(names[1], usual), found.get(names[2], usual)
    if unet is None and text is None:
        return
    key = "network_args: " + ", ".join(found)
    if unet is not None and (only_unet or unet == text or reading.get("optimizer.text_encoder_lr") in (0, 0.0)):
        if unet > 1:
            reading.put("optimizer.lora_plus_ratio", unet, key)
    else:
        reading.lost(
            key,
            "U-Net and text encoders have ratios of their own, and a recipe has one for all: optimizer.lora_plus_ratio.",
        )


def _optimizer(reading: Reading, steps: int | None) -> None:
    name = reading.text("optimizer_type")
    key = "optimizer_type"
    for old, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if reading.flag(old):
            name, key = name or meant, old
    arguments = reading.take("optimizer_args", arguments_of) or {}
    if name is None:
        name = "AdamW"
    ours = _optimizers.optimizer(reading, key, name, arguments, "optimizer_args")
    if ours == "adafactor" and _optimizers.relative_adafactor(reading, arguments, "optimizer_args", True):
        for unused in ("lr_scheduler", "lr_warmup_steps"):
            if reading.has(unused):
                reading.unused(unused, "Adafactor with relative_step has its own schedule.")
        return
    _same_rates(reading, ours)
    _schedule(reading, steps)


def _same_rates(reading: Reading, ours: str | None) -> None:
    """Optimizers that find the rate have one for all parts."""
    lr, text = reading.get("optimizer.lr"), reading.get("optimizer.text_encoder_lr")
    if ours not in ("prodigy", "dadapt-adam") or not lr or not text:
        return
    rates = text if isinstance(text, list) else [text]
    if any(rate not in (0, lr) for rate in rates):
        ours_now = [lr if rate else 0.0 for rate in rates]
        reading.put(
            "optimizer.text_encoder_lr",
            ours_now if isinstance(text, list) else lr,
            "text_encoder_lr",
            f"'{ours}' has one rate for all: the denoiser's",
        )


def _schedule(reading: Reading, steps: int | None) -> None:
    warmup = reading.number("lr_warmup_steps")
    lr = reading.number("learning_rate")
    given = _schedules.Given(
        key="lr_scheduler",
        name=reading.text("lr_scheduler") or "constant",
        warmup_key="lr_warmup_steps",
        warmup=warmup,
        steps=steps,
        cycles=reading.whole("lr_scheduler_num_cycles") or 1,
        power=1.0 if (power := reading.number("lr_scheduler_power")) is None else power,
        min_ratio=reading.number("lr_scheduler_min_lr_ratio"),
        timescale=reading.whole("lr_scheduler_timescale"),
        lr=DEFAULT_LR if lr is None else lr,
    )
    arguments = reading.take("lr_scheduler_args", arguments_of) or {}
    by_class = reading.text("lr_scheduler_type")
    if by_class is not None:
        rate = reading.get("optimizer.lr") or given.lr
        given = _schedules.Given(given.key, given.name, given.warmup_key, None, steps, lr=rate)
        if _schedules.from_class(reading, "lr_scheduler_type", by_class, arguments, given):
            for unused in ("lr_scheduler", "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_power"):
                if reading.has(unused):
                    reading.unused(unused, "lr_scheduler_type takes its place.")
            return
    _schedules.schedule(reading, given)
    for key, names in (
        ("lr_scheduler_num_cycles", ("cosine_with_restarts",)),
        ("lr_scheduler_power", ("polynomial",)),
        ("lr_scheduler_timescale", ("inverse_sqrt",)),
    ):
        if reading.has(key) and given.name.lower() not in names:
            reading.unused(key, f"{given.name} does not go by it.")
    if reading.number("lr_decay_steps"):
        reading.lost("lr_decay_steps", "there is no such schedule here.")


def _precision(reading: Reading) -> None:
    given = (reading.text("mixed_precision") or "").lower()
    if given in ("bf16", "fp16"):
        reading.put("train.precision", given, "mixed_precision")
    elif given in ("", "no"):
        reading.put("train.precision", "fp32", "mixed_precision", kind=None if given else "default")
    else:
        reading.lost("mixed_precision", "it is none of no, fp16 and bf16.")


def _saving(reading: Reading) -> None:
    epochs, steps = reading.whole("save_every_n_epochs"), reading.whole("save_every_n_steps")
    if epochs:
        reading.put("save.every", _values.span(epochs, "epochs"), "save_every_n_epochs", "with its unit")
        if steps:
            reading.left(
                "save_every_n_steps", "checkpoints are saved in one rhythm here, and save_every_n_epochs is it."
            )
    elif steps:
        reading.put("save.every", _values.span(steps, "steps"), "save_every_n_steps", "with its unit")
    else:
        reading.default("save.every", reading.get("train.length"), "save_every_n_epochs", "only the last one is saved")
    last_epochs, last_steps = reading.whole("save_last_n_epochs"), reading.whole("save_last_n_steps")
    if epochs and last_epochs:
        reading.put("save.keep", last_epochs, "save_last_n_epochs")
    elif not epochs and steps and last_steps:
        reading.put(
            "save.keep",
            last_steps // steps + 1,
            "save_last_n_steps",
            f"checkpoints of the last {last_steps} steps, one each {steps}",
        )
    for key, used in (("save_last_n_epochs", epochs), ("save_last_n_steps", steps if not epochs else None)):
        if reading.has(key) and reading.whole(key) and not used:
            reading.unused(key, "nothing is saved in that rhythm.")
    given = reading.text("save_precision")
    if given is None:
        reading.default("save.dtype", "fp32", "save_precision")
    elif given.lower() in PRECISIONS:
        reading.put("save.dtype", PRECISIONS[given.lower()], "save_precision")
    else:
        reading.lost("save_precision", "it is none of float, fp16 and bf16.")
    if reading.has("logging_dir") or reading.has("log_with"):
        board = (reading.text("log_with") or "tensorboard").lower() in ("tensorboard", "all")
        reading.text("logging_dir")
        if board:
            reading.put(
                "save.tensorboard",
                True,
                "logging_dir" if reading.has("logging_dir") else "log_with",
                "into the run's folder",
            )
        else:
            reading.left("log_with", "runs are logged to events.jsonl, and for TensorBoard with save.tensorboard.")


def _samples(reading: Reading, family: Family) -> None:
    _prompts.prompts(reading, family)
    _rhythm(reading, "sample", needs="sample", without="there are no prompts.")


def _validation(reading: Reading) -> None:
    _rhythm(reading, "validate", needs="validation.share", without="there is no validation_split.")


def _rhythm(reading: Reading, what: str, needs: str, without: str) -> None:
    """How often something is done, in epochs or steps; without effect where there is nothing to do."""
    epochs, steps = reading.whole(f"{what}_every_n_epochs"), reading.whole(f"{what}_every_n_steps")
    key = f"{what}_every_n_epochs" if epochs else f"{what}_every_n_steps"
    if not (epochs or steps):
        return
    if not reading.get(needs):
        reading.unused(key, without)
        return
    often = _values.span(epochs or steps or 1, "epochs" if epochs else "steps")
    reading.put(f"{needs.partition('.')[0]}.every", often, key, "with its unit")


def _no_use(reading: Reading, dataset: Mapping[str, Any] | None) -> None:
    """Keys that are said elsewhere."""
    if dataset is None and (named := reading.text("dataset_config")) is not None:
        reading.warnings.append(f"dataset_config = {named}: not found; give it as --dataset.")
    if (start := reading.text("network_weights")) is not None:
        reading.put("adapter.start_from", located(reading, "network_weights", start), "network_weights")
    for key in ("dataset_config", "dataset_repeats"):
        reading.seen.add(key)
