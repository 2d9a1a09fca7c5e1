"""How a config of OneTrainer trains: rates, optimizer, schedule, noise and loss."""

from __future__ import annotations

import math

from lorabake.recipe.imports import _optimizers, _schedules, _values
from lorabake.recipe.imports._onetrainer_keys import NOTHING_OF
from lorabake.recipe.imports._reading import Reading

number, whole, flag, text = _values.number, _values.whole, _values.flag, _values.text

_ENCODERS = {"STABLE_DIFFUSION_XL": 2, "FLUX": 2, "STABLE_DIFFUSION_3": 3}


_OPTIMIZERS = {
    "SCHEDULE_FREE_ADAMW": "adamwschedulefree",
    "PRODIGY_PLUS_SCHEDULE_FREE": "prodigyplusschedulefree",
    "DADAPT_ADAM": "dadaptadam",
    "ADAMW_8BIT": "adamw8bit",
    "ADAM_8BIT": "adam8bit",
    "LION_8BIT": "lion8bit",
    "CAME_8BIT": "came",
}


def _scaled(reading: Reading, rate: float) -> tuple[float, str]:
    """OneTrainer may multiply rates by the batch."""
    scaler = (reading.text("learning_rate_scaler") or "NONE").upper()
    batch, accumulation = reading.whole("batch_size") or 1, reading.whole("gradient_accumulation_steps") or 1
    factor = {
        "BATCH": batch,
        "GLOBAL_BATCH": batch,
        "GRADIENT_ACCUMULATION": accumulation,
        "BOTH": batch * accumulation,
        "GLOBAL_BOTH": batch * accumulation,
    }.get(scaler, 1)
    return (
        (rate, "")
        if factor == 1
        else (rate * math.sqrt(factor), f"{rate:g} × √{factor}: learning_rate_scaler is {scaler}")
    )


def denoiser(reading: Reading, model_type: str) -> str:
    """The table of the denoiser: whole configs have tables of other models too. Old ones call Flux's and SD3's the prior."""
    others = model_type.startswith(("FLUX", "STABLE_DIFFUSION_3"))
    names = ("transformer", "prior", "unet") if others else ("unet", "transformer", "prior")
    return next((name for name in names if reading.table(name)), names[0])


def rates(reading: Reading, model_type: str) -> None:
    """Set the learning rates: of the denoiser, and of each text encoder."""
    usual = reading.number("learning_rate")
    base = 3e-6 if usual is None else usual
    name = denoiser(reading, model_type)
    _denoiser_rate(reading, name, base, usual is not None)
    count = next((count for start, count in _ENCODERS.items() if model_type.startswith(start)), 1)
    names = ["text_encoder", "text_encoder_2", "text_encoder_3"][:count]
    each: list[float] = []
    for key in names:
        table = reading.table(key)
        each.append(0.0 if _is_off(reading, key) else _own(reading, key, base))
        after, unit = table.get("stop_training_after"), str(table.get("stop_training_after_unit") or "EPOCH").upper()
        epochs = reading.whole("epochs") or 100
        stops = 30 if after is None else after
        if each[-1] and unit == "EPOCH" and isinstance(stops, int | float) and 0 < stops < epochs:
            reading.lost(
                f"{key}: stop_training_after",
                f"after {stops:g} of {epochs} epochs it is no longer trained, and here text encoders are trained to the end. Lower optimizer.text_encoder_lr.",
            )
    scaled = [_scaled(reading, rate)[0] for rate in each]
    stated = any(reading.table(key) for key in names)
    note = "0 leaves a text encoder untrained" if not all(each) else "theirs is learning_rate"
    value = scaled[0] if len(set(scaled)) == 1 else scaled
    reading.put("optimizer.text_encoder_lr", value, ", ".join(names), note, "converted" if stated else "default")


def _denoiser_rate(reading: Reading, name: str, base: float, stated: bool) -> None:
    if _is_off(reading, name):
        reading.put("optimizer.lr", 0.0, f"{name}: train", "0 leaves the denoiser untrained")
        return
    own = not _values.is_nothing(reading.table(name).get("learning_rate"))
    rate, note = _scaled(reading, _own(reading, name, base))
    key = f"{name}: learning_rate" if own else "learning_rate"
    reading.put("optimizer.lr", rate, key, note, None if own or stated else "default")


def _own(reading: Reading, name: str, base: float) -> float:
    """The learning rate of a part, which may have one of its own."""
    given = reading.read(f"{name}: learning_rate", reading.table(name).get("learning_rate"), number)
    return base if given is None else given


def _is_off(reading: Reading, name: str) -> bool:
    """Whether a part is left untrained."""
    return reading.read(f"{name}: train", reading.table(name).get("train"), flag) is False


def optimizer(reading: Reading) -> None:
    """Set the optimizer."""
    table = reading.table("optimizer")
    name = str(table.get("optimizer") or "ADAMW").upper()
    arguments = {
        key: _values.plain(value) for key, value in table.items() if value is not None and key not in NOTHING_OF
    }
    betas = [
        arguments.pop(key, default)
        for key, default in (("beta1", 0.9), ("beta2", 0.99 if name.startswith(("LION", "PRODIGY_PLUS")) else 0.999))
    ]
    if any(key in table and table[key] is not None for key in ("beta1", "beta2")) and name != "ADAFACTOR":
        arguments["betas"] = [*betas, arguments.pop("beta3", 0.9999)] if name.startswith("CAME") else betas
    defaults = {"scale_parameter": False, "relative_step": False} if name == "ADAFACTOR" else {}
    ours = _optimizers.optimizer(
        reading, "optimizer", _OPTIMIZERS.get(name, name), {**defaults, **arguments}, "optimizer"
    )
    if ours == "adafactor":
        _optimizers.relative_adafactor(reading, arguments, "optimizer", False)


def schedule(reading: Reading) -> None:
    """Set the schedule and its warm-up, which is counted in passes there."""
    name = (reading.text("learning_rate_scheduler") or "CONSTANT").lower()
    warmup = reading.number("learning_rate_warmup_steps")
    stated = warmup is not None
    warmup = 200.0 if warmup is None else warmup
    accumulation = reading.whole("gradient_accumulation_steps") or 1
    if name == "adafactor" or reading.get("schedule.name") == "constant":
        if reading.get("schedule.name") is None:
            reading.put("schedule.name", "constant", "learning_rate_scheduler", "Adafactor's own")
    elif name == "cosine_with_restarts":
        reading.put("schedule.name", "cosine-restarts", "learning_rate_scheduler", "the nearest to it")
        reading.put(
            "schedule.cycles", max(1, round(reading.number("learning_rate_cycles") or 1)), "learning_rate_cycles"
        )
        reading.lost(
            "learning_rate_scheduler",
            "it comes up again as slowly as it falls, and here it jumps up. COSINE_WITH_HARD_RESTARTS does as well.",
        )
    else:
        cycles = max(1, round(reading.number("learning_rate_cycles") or 1))
        _schedules.schedule(
            reading,
            _schedules.Given("learning_rate_scheduler", name, "", None, None, cycles=cycles),
        )
    if warmup > 1:
        steps = int(warmup / accumulation)
        note = "optimizer steps" if accumulation == 1 else f"{warmup:g} passes / {accumulation}"
        if steps:
            reading.put(
                "schedule.warmup",
                _values.span(steps, "steps"),
                "learning_rate_warmup_steps",
                note,
                None if stated else "default",
            )
    elif warmup:
        reading.put("schedule.warmup", warmup, "learning_rate_warmup_steps", "a share of the run")
    if (floor := reading.number("learning_rate_min_factor")) and reading.get("schedule.name") != "constant":
        reading.put("schedule.floor", floor, "learning_rate_min_factor")
    for key in ("learning_rate_cycles", "learning_rate_min_factor"):
        reading.seen.add(key)


def objective(reading: Reading, flow: bool) -> None:
    """Set the objective."""
    _weighting(reading, flow)
    _loss(reading)
    if offset := reading.number("offset_noise_weight"):
        reading.put("objective.noise", "offset", "offset_noise_weight", "the kind of noise that it is")
        reading.put("objective.noise_offset", offset, "offset_noise_weight")
    if reading.flag("rescale_noise_scheduler_to_zero_terminal_snr"):
        reading.put("objective.zero_terminal_snr", True, "rescale_noise_scheduler_to_zero_terminal_snr")
    lowest, highest = reading.number("min_noising_strength"), reading.number("max_noising_strength")
    if lowest:
        reading.put("objective.min_timestep", int(1000 * lowest), "min_noising_strength", f"{lowest:g} of 1000")
    if highest is not None and highest < 1:
        reading.put("objective.max_timestep", int(1000 * highest), "max_noising_strength", f"{highest:g} of 1000")
    _timesteps(reading, flow)


def _weighting(reading: Reading, flow: bool) -> None:
    given = (reading.text("loss_weight_fn") or "CONSTANT").upper()
    strength = reading.number("loss_weight_strength")
    gamma = 5.0 if strength is None else strength
    ours = {"CONSTANT": "none", "MIN_SNR_GAMMA": "min-snr", "DEBIASED_ESTIMATION": "debiased", "P2": "p2"}.get(given)
    stated = None if reading.has("loss_weight_fn") else "default"
    if ours is None or (flow and ours != "none"):
        reading.put("objective.weighting", "none", "loss_weight_fn", "in place of it")
        reading.lost(
            "loss_weight_fn", "timesteps are not weighted so here. `lorabake list weightings` shows how they can be."
        )
        return
    reading.put("objective.weighting", ours, "loss_weight_fn", kind=stated)
    if ours in ("min-snr", "p2"):
        setting = "objective.min_snr_gamma" if ours == "min-snr" else "objective.p2_gamma"
        reading.put(setting, gamma, "loss_weight_strength", kind=None if strength is not None else "default")
    elif strength is not None:
        reading.unused("loss_weight_strength", f"{given} does not go by it.")
    if ours == "debiased" and reading.get("model.prediction") == "v":
        reading.lost(
            "loss_weight_fn", "for v models it is 1 / (√SNR + 1) there, and 1 / (SNR + 1) here, as in sd-scripts."
        )


def _loss(reading: Reading) -> None:
    given = {
        key: reading.number(key) for key in ("mse_strength", "mae_strength", "log_cosh_strength", "huber_strength")
    }
    used = {key: (1.0 if key == "mse_strength" else 0.0) if value is None else value for key, value in given.items()}
    on = [key for key, value in used.items() if value]
    if on == ["mse_strength"] or on == ["mae_strength"]:
        if on == ["mae_strength"] or given["mse_strength"] is not None:
            reading.put("objective.loss", "l2" if on == ["mse_strength"] else "l1", on[0], "the only part of the loss")
    else:
        reading.lost(
            ", ".join(on) or "mse_strength",
            "a loss of several parts, or of these, is none here, so the recipe has l2. `lorabake list losses` shows all.",
        )
    if reading.has("huber_delta"):
        reading.number("huber_delta")


def _timesteps(reading: Reading, flow: bool) -> None:
    given = (reading.text("timestep_distribution") or "UNIFORM").upper()
    weight, bias = reading.number("noising_weight") or 0.0, reading.number("noising_bias") or 0.0
    shift, dynamic = reading.number("timestep_shift"), reading.flag("dynamic_timestep_shifting")
    shift = 1.0 if shift is None else shift
    key, stated = "timestep_distribution", None if reading.has("timestep_distribution") else "default"
    if given == "UNIFORM" and shift == 1 and not (dynamic and flow):
        reading.put("objective.timesteps", "uniform", key, kind=stated)
    elif given == "LOGIT_NORMAL" and not (dynamic and flow):
        reading.put("objective.timesteps", "logit-normal", key)
        reading.put(
            "objective.logit_mean",
            bias + math.log(shift),
            "noising_bias",
            f"{bias:g} + ln {shift:g}, which is timestep_shift",
        )
        reading.put("objective.logit_std", weight + 1.0, "noising_weight", f"{weight:g} + 1")
    elif given == "LOGIT_NORMAL" and bias == 0:
        reading.put("objective.timesteps", "flux-shift", key, "with dynamic_timestep_shifting")
        reading.put("objective.sigmoid_scale", weight + 1.0, "noising_weight", f"{weight:g} + 1")
    else:
        nearest = "flux-shift" if dynamic and flow else "uniform" if given == "UNIFORM" else "sigmoid"
        reading.put("objective.timesteps", nearest, key, "the nearest to it")
        reading.lost(
            key,
            f"{given}, shifted by {'the size of the picture' if dynamic else f'{shift:g}'}, weight {weight:g}, bias {bias:g}: "
            "timesteps are not drawn so here. `lorabake list timesteps` shows how they can be.",
        )
