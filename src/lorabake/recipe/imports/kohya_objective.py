"""Noise, timesteps, loss and its weights of sd-scripts, as ours. It multiplies what is asked for; a recipe has one of a kind."""

from __future__ import annotations

import math

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._kohya_rows import LOSSES, TIMESTEPS, WEIGHTINGS
from lorabake.recipe.imports._reading import Reading

FLOW = ("flux", "sd3")
_DEFAULT_SHIFT = 3.0
_HUBER = (("huber_schedule", "snr"), ("huber_c", 0.1), ("huber_scale", 1.0))


def objective(reading: Reading, family: str) -> None:
    """Set the objective."""
    flow = family in FLOW
    if flow:
        reading.put("objective.name", "flow", "base model", f"{family} is a flow model", "default")
    _weighting(reading, flow, family)
    _noise(reading, flow, family)
    _loss(reading, flow)
    if flow:
        _flow(reading, family)
    else:
        if reading.flag("zero_terminal_snr"):
            reading.put("objective.zero_terminal_snr", True, "zero_terminal_snr")
        for key in (
            "timestep_sampling",
            "discrete_flow_shift",
            "sigmoid_scale",
            "model_prediction_type",
            "weighting_scheme",
            "logit_mean",
            "logit_std",
            "guidance_scale",
        ):
            if reading.has(key):
                reading.unused(key, "it is for flow models (Flux, SD3).")


def _weighting(reading: Reading, flow: bool, family: str) -> None:
    """min-SNR, debiased and the weights of v models are multiplied with each other there."""
    gamma = reading.number("min_snr_gamma")
    asked = [name for name, key in WEIGHTINGS.items() if (gamma if key == "min_snr_gamma" else reading.flag(key))]
    if flow:
        for key in WEIGHTINGS.values():
            if reading.has(key) and key in [WEIGHTINGS[name] for name in asked]:
                reading.unused(key, f"sd-scripts does not look at it for {family}.")
        reading.default("objective.weighting", "none", "base model", "sd-scripts weighs no timesteps of flow models")
        return
    if not asked:
        given = reading.has("min_snr_gamma")
        reading.put(
            "objective.weighting",
            "none",
            "min_snr_gamma",
            "0 is off" if given else "",
            "converted" if given else "default",
        )
        return
    first, *others = asked
    key = WEIGHTINGS[first]
    reading.put("objective.weighting", first, key)
    if first == "min-snr":
        reading.put("objective.min_snr_gamma", gamma, key)
    for other in others:
        reading.lost(
            WEIGHTINGS[other],
            f"sd-scripts multiplies it with {key}, and a recipe has one weighting: '{first}'. Choose one of them.",
        )


def _noise(reading: Reading, flow: bool, family: str) -> None:
    offset, grains = reading.number("noise_offset"), reading.whole("multires_noise_iterations")
    keys = (
        "noise_offset",
        "noise_offset_random_strength",
        "adaptive_noise_scale",
        "multires_noise_iterations",
        "multires_noise_discount",
    )
    if flow:
        for key in keys:
            if reading.has(key) and _values.plain(reading.given[key]) not in (0, 0.0, False):
                reading.unused(key, f"sd-scripts does not look at it for {family}.")
            reading.seen.add(key)
        offset = grains = None
    adaptive, discount = reading.number("adaptive_noise_scale"), reading.number("multires_noise_discount")
    if offset:
        reading.put("objective.noise", "offset", "noise_offset", "the kind of noise that it is")
        reading.put("objective.noise_offset", offset, "noise_offset")
        if adaptive:
            reading.put("objective.noise_offset_adaptive", adaptive, "adaptive_noise_scale")
        if reading.flag("noise_offset_random_strength"):
            reading.put("objective.noise_offset_random", True, "noise_offset_random_strength")
        if grains:
            reading.lost(
                "multires_noise_iterations",
                "sd-scripts adds both kinds of noise, and a recipe has one: 'offset'. Choose one of them.",
            )
    elif grains:
        reading.put("objective.noise", "pyramid", "multires_noise_iterations", "the kind of noise that it is")
        reading.put("objective.pyramid_iterations", grains, "multires_noise_iterations")
        reading.put(
            "objective.pyramid_discount",
            0.3 if discount is None else discount,
            "multires_noise_discount",
            kind=None if discount is not None else "default",
        )
    if not flow:
        idle = (
            ("adaptive_noise_scale", adaptive and not offset, "noise_offset"),
            ("multires_noise_discount", discount and not grains, "multires_noise_iterations"),
            (
                "noise_offset_random_strength",
                reading.flag("noise_offset_random_strength") and not offset,
                "noise_offset",
            ),
        )
        for key, given, other in idle:
            if given:
                reading.unused(key, f"there is no {other}.")
    if gamma := reading.number("ip_noise_gamma"):
        reading.put("objective.input_perturbation", gamma, "ip_noise_gamma")
        if reading.flag("ip_noise_gamma_random_strength"):
            reading.put("objective.input_perturbation_random", True, "ip_noise_gamma_random_strength")
    elif reading.flag("ip_noise_gamma_random_strength"):
        reading.unused("ip_noise_gamma_random_strength", "there is no ip_noise_gamma.")


def _loss(reading: Reading, flow: bool) -> None:
    given = (reading.text("loss_type") or "l2").lower()
    ours = LOSSES.get(given)
    if ours is None:
        reading.lost(
            "loss_type", f"there is no such loss here, so the recipe has l2; choose among {', '.join(LOSSES.values())}."
        )
        ours = "l2"
    elif reading.has("loss_type"):
        reading.put("objective.loss", ours, "loss_type")
    if ours not in ("huber", "smooth-l1"):
        for key, _ in _HUBER:
            if reading.has(key):
                reading.unused(key, f"the loss {given} does not go by it.")
        return
    chosen = reading.text("huber_schedule") or "snr"
    if flow and chosen == "snr":
        reading.lost(
            "huber_schedule",
            "sd-scripts stops with an error: its schedule snr is not for flow models. Here it is computed from their signal and noise.",
        )
    for key, default in _HUBER:
        value = reading.text(key) if key == "huber_schedule" else reading.number(key)
        if key == "huber_scale" and chosen == "snr":
            if value is not None:
                reading.unused(key, "the schedule snr does not go by it.")
            continue
        reading.put(
            f"objective.{key}", default if value is None else value, key, kind=None if value is not None else "default"
        )


def _flow(reading: Reading, family: str) -> None:
    _timesteps(reading, family)
    kind = reading.text("model_prediction_type")
    if family == "flux" and (kind or "sigma_scaled") != "raw":
        told = "it is not given, and theirs is sigma_scaled: " if kind is None else ""
        reading.lost(
            "model_prediction_type",
            f"{told}Flux is trained on its raw prediction here, which sd-scripts' own guide asks for too.",
        )
    elif kind is not None:
        reading.say("same", "model_prediction_type", note="as it is here")
    guidance = reading.number("guidance_scale")
    if family == "flux" and (3.5 if guidance is None else guidance) != 1:
        told = "it is not given, and theirs is 3.5: " if guidance is None else ""
        reading.lost(
            "guidance_scale",
            f"{told}Flux dev is told a guidance of 1 while it is trained here, which is what most guides ask for.",
        )
    elif guidance is not None:
        reading.say("same", "guidance_scale", note="as it is here")
    if reading.flag("zero_terminal_snr"):
        reading.unused("zero_terminal_snr", "flow models have it by themselves.")


def _timesteps(reading: Reading, family: str) -> None:
    """kohya's ``sigma`` draws from the model's own sampling steps, which are shifted; in logits a shift is a sum."""
    key = "timestep_sampling"
    given = (reading.text(key) or "sigma").lower() if family == "flux" else "sigma"
    stated = None if reading.has(key) else "default"
    shift_key = "discrete_flow_shift" if family == "flux" else "training_shift"
    asked = reading.number(shift_key)
    shift = (_DEFAULT_SHIFT if family == "flux" else 1.0) if asked is None else asked
    scale, scheme = (
        reading.number("sigmoid_scale"),
        (reading.text("weighting_scheme") or ("none" if family == "flux" else "uniform")).lower(),
    )
    mean, width = (
        reading.number("logit_mean") or 0.0,
        1.0 if (given_width := reading.number("logit_std")) is None else given_width,
    )
    if given in TIMESTEPS:
        reading.put("objective.timesteps", TIMESTEPS[given], key, kind=stated)
        if given == "shift":
            reading.put("objective.shift", shift, shift_key, kind=None if asked is not None else "default")
        elif asked is not None:
            reading.unused(shift_key, f"{given} does not go by it.")
        if scale is not None and given != "uniform":
            reading.put("objective.sigmoid_scale", scale, "sigmoid_scale")
    elif scheme == "logit_normal":
        reading.put("objective.timesteps", "logit-normal", "weighting_scheme", "as they are drawn")
        reading.put(
            "objective.logit_mean", mean + math.log(shift), "logit_mean", f"{mean:g} + ln {shift:g}, which is the shift"
        )
        reading.put("objective.logit_std", width, "logit_std", kind=None if given_width is not None else "default")
    elif shift == 1 and scheme in ("none", "uniform", "sigma_sqrt", "cosmap"):
        reading.put("objective.timesteps", "uniform", key, "a shift of 1 is none", stated or "converted")
    else:
        reading.put("objective.timesteps", "shift", key, "the nearest to it", stated or "converted")
        reading.put("objective.shift", shift, shift_key, kind=None if asked is not None else "default")
        reading.lost(
            key,
            f"'{given}' draws evenly and then shifts by {shift:g}; here 'shift' draws most in the middle. With discrete_flow_shift = 1 it is 'uniform'.",
        )
    if scheme in ("sigma_sqrt", "cosmap", "mode"):
        reading.lost(
            "weighting_scheme", "timesteps are not weighted so here. `lorabake list weightings` shows how they can be."
        )
    elif reading.has("weighting_scheme") and scheme != "logit_normal":
        reading.say("same", "weighting_scheme", note="every timestep weighs the same, as here")
    if scale is not None and given not in ("sigmoid", "shift", "flux_shift"):
        reading.unused("sigmoid_scale", f"{given} does not go by it.")
    for name in ("logit_mean", "logit_std"):
        if reading.has(name) and not (given == "sigma" and scheme == "logit_normal"):
            reading.unused(name, "weighting_scheme is not logit_normal.")
