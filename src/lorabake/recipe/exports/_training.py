"""What sd-scripts calls the settings of a run: model, network, rates, schedule, objective, files."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from lorabake.base.units import Duration
from lorabake.recipe.exports import _blocks
from lorabake.recipe.exports._writing import Writing
from lorabake.recipe.imports import _optimizers, _schedules, kohya_memory
from lorabake.recipe.imports._kohya_rows import LOSSES, OPTIMIZERS, PRECISIONS, TIMESTEPS, TRAINING, WEIGHTINGS

_MODULES = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3", "sd": "networks.lora"}
_USUAL_LR = 1e-4
_SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
)
"""Those of sd-scripts that are ours too."""


def training(writing: Writing, flow: bool) -> str:
    """Set the training config but for the data; the family that it is for (``sd``, ``sd3`` or ``flux``)."""
    family = _model(writing, flow)
    arguments = _network(writing, family)
    lr, trains_text = _rates(writing, flow)
    arguments += _blocks.blocks(writing, family, lr, trains_text)
    if arguments:
        writing.config["network_args"] = arguments
    _optimizer(writing)
    steps = _length(writing)
    _schedule(writing, lr, steps)
    _objective(writing, flow, family)
    _rows(writing)
    _memory(writing, family)
    _files(writing)
    return family


def _rows(writing: Writing) -> None:
    for row in TRAINING:
        value = writing.get(row.setting)
        off = value is None or value is False or value == "" or value in row.off
        if row.key in ("validation_seed", "validation_split") and not writing.get("validation.share"):
            continue
        if row.key == "prior_loss_weight" and not writing.get("data.regularisation"):
            continue
        if not off:
            theirs = row.back(value) if row.back else value
            writing.put(row.key, theirs, row.setting, "all of it, there" if theirs != value else "")


def _model(writing: Writing, flow: bool) -> str:
    writing.put("pretrained_model_name_or_path", writing.get("model.base"), "model.base")
    encoders: list[str] = writing.get("model.text_encoders") or []
    names = [_encoder(path) for path in encoders]
    family = "sd" if not flow else "sd3" if "clip_g" in names else "flux"
    for key, path in zip(names, encoders, strict=True):
        writing.put(key, path, "model.text_encoders")
    if vae := writing.get("model.vae"):
        writing.put("ae" if family == "flux" else "vae", vae, "model.vae")
    if writing.get("model.prediction") == "v":
        writing.put("v_parameterization", True, "model.prediction", "SD 2 also needs v2 = true")
    if skip := writing.get("model.clip_skip"):
        writing.put("clip_skip", skip, "model.clip_skip")
    if (tokens := writing.get("model.max_tokens")) != 75:
        writing.put("max_token_length", tokens, "model.max_tokens")
    if tokens := writing.get("model.t5_tokens"):
        writing.put("t5xxl_max_token_length", tokens, "model.t5_tokens")
    return family


def _encoder(path: str) -> str:
    """Which text encoder a file is by its name: sd-scripts has to be told."""
    name = PurePath(path.replace("\\", "/")).name.lower()
    return "t5xxl" if "t5" in name else "clip_g" if "clip_g" in name or "bigg" in name else "clip_l"


def _network(writing: Writing, family: str) -> list[str]:
    """Set the network; its arguments."""
    if writing.get("adapter.name") != "lora":
        writing.lost(
            "adapter.name",
            "sd-scripts trains other networks, and all weights, with other modules and programs: the config has a LoRA.",
        )
    writing.put("network_module", _MODULES[family], "adapter.name", "as the family needs it")
    rank = writing.get("adapter.rank") or 4
    writing.put("network_dim", rank, "adapter.rank")
    alpha = writing.get("adapter.alpha")
    alpha, note = (float(rank), "the rank, which is our default") if alpha is None else (alpha, "")
    if writing.get("adapter.rank_stabilized"):
        alpha, note = alpha * math.sqrt(rank), f"{alpha:g} × √{rank}: scaled by alpha / √rank"
    writing.put("network_alpha", alpha, "adapter.alpha", note)
    if dropout := writing.get("adapter.dropout"):
        writing.put("network_dropout", dropout, "adapter.dropout")
    arguments: list[str] = []
    if conv := writing.get("adapter.conv_rank"):
        arguments += _convolutions(writing, conv)
    for name in ("rank_dropout", "module_dropout"):
        if value := writing.get(f"adapter.{name}"):
            arguments.append(f"{name}={value!r}")
            writing.say("same", f"adapter.{name}", "network_args")
    if ratio := writing.get("optimizer.lora_plus_ratio"):
        arguments.append(f"loraplus_lr_ratio={ratio!r}")
        writing.say("same", "optimizer.lora_plus_ratio", "network_args")
    if start := writing.get("adapter.start_from"):
        writing.put("network_weights", start, "adapter.start_from")
    return arguments


def _convolutions(writing: Writing, rank: int) -> list[str]:
    """Network arguments for the rank of convolutions, and for the alpha that gives them the scale that they have here."""
    given = writing.get("adapter.conv_alpha")
    alpha = usual = float(rank) if given is None else given
    if writing.get("adapter.rank_stabilized"):
        alpha = usual * math.sqrt(rank)
        note = f"{usual:g} × √{rank}: scaled by alpha / √rank"
        writing.say("converted", "adapter.conv_alpha", "network_args", f"conv_alpha={alpha!r}", note)
    writing.say("same", "adapter.conv_rank", "network_args")
    return [f"conv_dim={rank}", f"conv_alpha={alpha!r}"]


def _rates(writing: Writing, flow: bool) -> tuple[float, bool]:
    """Set the rates; the denoiser's, and whether text encoders are trained."""
    lr, text = writing.get("optimizer.lr"), writing.get("optimizer.text_encoder_lr")
    name = writing.get("optimizer.name")
    note = ""
    if lr is None:
        lr = 1.0 if name in ("prodigy", "dadapt-adam", "prodigy-schedule-free") else _USUAL_LR
        note = "not given: lorabake takes it by model and optimizer; this is usual"
    writing.put("learning_rate", lr, "optimizer.lr", note)
    if lr == 0:
        writing.put("network_train_text_encoder_only", True, "optimizer.lr", "0 leaves the denoiser untrained")
    else:
        writing.put("unet_lr", lr, "optimizer.lr", note)
    note = ""
    if text is None:
        text = 0.0 if flow else lr if name in ("prodigy", "dadapt-adam") else lr / 2
        note = "not given: half of lr, or 0 for flow models"
    if not any(text if isinstance(text, list) else [text]):
        writing.put(
            "network_train_unet_only", True, "optimizer.text_encoder_lr", note or "0 leaves the text encoders untrained"
        )
        return lr, False
    writing.put("text_encoder_lr", text, "optimizer.text_encoder_lr", note)
    return lr, True


def _optimizer(writing: Writing) -> None:
    name = writing.get("optimizer.name")
    if name not in OPTIMIZERS:
        writing.lost("optimizer.name", "sd-scripts has no such optimizer: the config has its default, AdamW.")
        return
    writing.put("optimizer_type", OPTIMIZERS[name], "optimizer.name")
    arguments = ["relative_step=False", "warmup_init=False"] if name == "adafactor" else []
    for argument in _optimizers.ARGUMENTS[name]:
        value = writing.get(f"optimizer.{argument}")
        if value is not None:
            arguments.append(f"{argument}={','.join(map(repr, value)) if isinstance(value, list) else repr(value)}")
    if name == "adafactor":
        arguments.append(f"decay_rate={writing.get('optimizer.beta2_decay')!r}")
    writing.config["optimizer_args"] = arguments


def _length(writing: Writing) -> int | None:
    """Set the length of the run; optimizer steps, if they are known."""
    length = Duration.parse(writing.get("train.length"))
    key = "max_train_epochs" if length.unit == "epochs" else "max_train_steps"
    writing.put(key, length.count, "train.length", "without its unit")
    return length.count if length.unit == "steps" else None


def _schedule(writing: Writing, lr: float, steps: int | None) -> None:
    name, warmup = writing.get("schedule.name"), writing.get("schedule.warmup")
    floor: float = writing.get("schedule.floor") or 0.0
    theirs = {"cosine-restarts": "cosine_with_restarts", "inverse-sqrt": "inverse_sqrt"}.get(name, name)
    if name == "constant" and warmup:
        theirs = "constant_with_warmup"
    if name == "cosine" and floor:
        theirs = "cosine_with_min_lr"
        writing.put("lr_scheduler_min_lr_ratio", floor, "schedule.floor")
    elif floor and not (name == "polynomial" and lr and math.isclose(floor, _schedules.POLYNOMIAL_END / lr)):
        writing.lost("schedule.floor", "this schedule of sd-scripts falls to zero.")
    if theirs not in _SCHEDULES:
        writing.lost("schedule.name", "sd-scripts has no such schedule: the config has cosine.")
        theirs = "cosine"
        for setting in ("first_cycle", "cycle_growth", "decay", "d"):
            writing.get(f"schedule.{setting}")
    writing.put("lr_scheduler", theirs, "schedule.name", "" if theirs == name else "its name there")
    if name == "cosine-restarts":
        writing.put("lr_scheduler_num_cycles", writing.get("schedule.cycles"), "schedule.cycles")
    if name == "polynomial":
        writing.put("lr_scheduler_power", writing.get("schedule.power"), "schedule.power")
    timescale = writing.get("schedule.timescale")
    if isinstance(timescale, str):
        writing.put("lr_scheduler_timescale", int(timescale.split()[0]), "schedule.timescale", "without its unit")
    elif timescale is not None:
        writing.lost("schedule.timescale", "sd-scripts takes steps here: give it as such.")
    if isinstance(warmup, str):
        writing.put("lr_warmup_steps", int(warmup.split()[0]), "schedule.warmup", "without its unit")
    elif warmup and steps:
        writing.put("lr_warmup_steps", round(warmup * steps), "schedule.warmup", f"{warmup:g} of {steps} steps")
    elif warmup:
        writing.put("lr_warmup_steps", warmup, "schedule.warmup", "a share there too")


def _objective(writing: Writing, flow: bool, family: str) -> None:
    writing.get("objective.name")
    _weighting(writing, flow)
    _noise(writing, flow)
    loss = {ours: theirs for theirs, ours in LOSSES.items()}[writing.get("objective.loss")]
    if loss != "l2":
        writing.put("loss_type", loss, "objective.loss")
    if loss in ("huber", "smooth_l1"):
        for key in ("huber_schedule", "huber_c", "huber_scale"):
            if key != "huber_scale" or writing.get("objective.huber_schedule") != "snr":
                writing.put(key, writing.get(f"objective.{key}"), f"objective.{key}")
        if flow and writing.get("objective.huber_schedule") == "snr":
            writing.lost(
                "objective.huber_schedule", "sd-scripts stops with an error: its schedule snr is not for flow models."
            )
    if writing.get("objective.zero_terminal_snr"):
        writing.put("zero_terminal_snr", True, "objective.zero_terminal_snr")
    rule = writing.get("objective.timesteps")
    if not flow:
        if rule != "uniform":
            writing.lost("objective.timesteps", "sd-scripts draws timesteps evenly for such models.")
        return
    _flow(writing, str(rule), family)


def _flow(writing: Writing, rule: str, family: str) -> None:
    shift, scale = writing.get("objective.shift"), writing.get("objective.sigmoid_scale")
    names = {ours: theirs for theirs, ours in TIMESTEPS.items()}
    if family == "flux":
        writing.config |= {"model_prediction_type": "raw", "guidance_scale": 1.0}
    if rule in names and family == "flux":
        writing.put("timestep_sampling", names[rule], "objective.timesteps")
        if rule == "shift":
            writing.put(
                "discrete_flow_shift",
                3.0 if shift is None else shift,
                "objective.shift",
                "not given: the model's own, usually this" if shift is None else "",
            )
        if rule != "uniform":
            writing.put("sigmoid_scale", scale, "objective.sigmoid_scale")
    elif rule == "logit-normal":
        writing.put("weighting_scheme", "logit_normal", "objective.timesteps", "its name there")
        writing.put("logit_mean", writing.get("objective.logit_mean"), "objective.logit_mean")
        writing.put("logit_std", writing.get("objective.logit_std"), "objective.logit_std")
        writing.config |= (
            {"timestep_sampling": "sigma", "discrete_flow_shift": 1.0} if family == "flux" else {"training_shift": 1.0}
        )
    elif rule == "uniform":
        writing.put("weighting_scheme", "uniform", "objective.timesteps")
    elif rule in ("sigmoid", "shift"):
        mean = math.log(shift or 3.0) if rule == "shift" else 0.0
        writing.put("weighting_scheme", "logit_normal", "objective.timesteps", "the same distribution")
        writing.put("logit_mean", mean, "objective.shift", "ln of the shift")
        writing.put("logit_std", scale, "objective.sigmoid_scale")
    else:
        writing.lost("objective.timesteps", "sd-scripts does not draw timesteps so.")


def _weighting(writing: Writing, flow: bool) -> None:
    weighting = writing.get("objective.weighting")
    if weighting == "min-snr":
        writing.put(
            "min_snr_gamma", writing.get("objective.min_snr_gamma"), "objective.weighting", "the γ itself asks for it"
        )
    elif weighting in WEIGHTINGS:
        writing.put(WEIGHTINGS[weighting], True, "objective.weighting")
    elif weighting != "none":
        writing.lost("objective.weighting")


def _noise(writing: Writing, flow: bool) -> None:
    noise = writing.get("objective.noise")
    if noise != "gaussian" and flow:
        writing.lost("objective.noise", "sd-scripts does not look at it for flow models.")
    elif noise == "offset":
        writing.put("noise_offset", writing.get("objective.noise_offset"), "objective.noise_offset")
        if adaptive := writing.get("objective.noise_offset_adaptive"):
            writing.put("adaptive_noise_scale", adaptive, "objective.noise_offset_adaptive")
        if writing.get("objective.noise_offset_random"):
            writing.put("noise_offset_random_strength", True, "objective.noise_offset_random")
    elif noise == "pyramid":
        writing.put(
            "multires_noise_iterations", writing.get("objective.pyramid_iterations"), "objective.pyramid_iterations"
        )
        writing.put("multires_noise_discount", writing.get("objective.pyramid_discount"), "objective.pyramid_discount")
    if gamma := writing.get("objective.input_perturbation"):
        writing.put("ip_noise_gamma", gamma, "objective.input_perturbation")
        if writing.get("objective.input_perturbation_random"):
            writing.put("ip_noise_gamma_random_strength", True, "objective.input_perturbation_random")


def _memory(writing: Writing, family: str) -> None:
    quantised, count = writing.get("model.quantize"), writing.get("train.blocks_to_swap")
    if quantised == "fp8":
        writing.put("fp8_base", True, "model.quantize", "without a scale for each row, there")
    elif quantised:
        writing.left("model.quantize", "sd-scripts stores the base in bf16, fp16 or fp8")
    if not count:
        return
    if family == "sd":
        writing.left("train.blocks_to_swap", "sd-scripts swaps blocks of Flux and SD3, and none of U-Nets.")
        return
    theirs = kohya_memory.theirs_of(count, family, writing.get("model.base"))
    there = kohya_memory.ours_of(theirs, family)
    kinds = f"{theirs // 2} double and {there - theirs // 2} single blocks" if family == "flux" else ""
    note = "; ".join(filter(None, (kinds, f"the nearest to {count} that it takes" if there != count else "")))
    writing.put("blocks_to_swap", theirs, "train.blocks_to_swap", note)


def _files(writing: Writing) -> None:
    precision = writing.get("train.precision")
    note = "" if precision else "not given: what a GPU usually has"
    writing.put("mixed_precision", {"fp32": "no", None: "bf16"}.get(precision, precision), "train.precision", note)
    dtype = {ours: theirs for theirs, ours in PRECISIONS.items() if theirs != "fp32"}[writing.get("save.dtype")]
    writing.put("save_precision", dtype, "save.dtype")
    writing.config |= {"save_model_as": "safetensors", "output_dir": "output"}
    every, length = Duration.parse(writing.get("save.every")), Duration.parse(writing.get("train.length"))
    keep = writing.get("save.keep")
    if every != length:
        writing.put(f"save_every_n_{every.unit}", every.count, "save.every", "without its unit")
        if keep and every.unit == "epochs":
            writing.put("save_last_n_epochs", keep, "save.keep")
        elif keep:
            writing.put(
                "save_last_n_steps", (keep - 1) * every.count, "save.keep", f"the last {(keep - 1) * every.count} steps"
            )
    if writing.get("save.tensorboard"):
        writing.config |= {"log_with": "tensorboard", "logging_dir": "logs"}
        writing.say("same", "save.tensorboard", "log_with", "tensorboard")
    if writing.get("validation.share"):
        often = Duration.parse(writing.get("validation.every"))
        writing.put(f"validate_every_n_{often.unit}", often.count, "validation.every", "without its unit")


def samples(writing: Writing) -> tuple[str, ...]:
    """Set how samples are drawn; prompts that need a file of their own."""
    prompts: list[Any] = writing.get("sample.prompts") or []
    file = writing.get("sample.prompts_file")
    if not prompts and not file:
        return ()
    if file and prompts:
        writing.left("sample.prompts_file", "sd-scripts has one file of prompts: sample.prompts make it.")
    elif file:
        writing.put("sample_prompts", file, "sample.prompts_file")
    given = writing.get("sample.every") or writing.get("save.every")
    every = Duration.parse(given)
    writing.put(f"sample_every_n_{every.unit}", every.count, "sample.every", "without its unit")
    return tuple(map(str, prompts))
