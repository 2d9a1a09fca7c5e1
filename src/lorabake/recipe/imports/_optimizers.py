"""Optimizers of other trainers: what they are called there, and what their packages take for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._reading import Reading

NAMES: dict[str, tuple[str, str]] = {
    "adam": ("adamw", "weight decay, if there is any, is applied as AdamW does"),
    "adamw": ("adamw", ""),
    "adamw8bit": ("adamw-8bit", ""),
    "adamw8": ("adamw-8bit", ""),
    "adam8bit": ("adamw-8bit", "weight decay, if there is any, is applied as AdamW does"),
    "adam8": ("adamw-8bit", "weight decay, if there is any, is applied as AdamW does"),
    "pagedadamw8bit": ("adamw-8bit", "the same steps; nothing is paged"),
    "pagedadamw": ("adamw", "the same steps; nothing is paged"),
    "pagedadamw32bit": ("adamw", "the same steps; nothing is paged"),
    "lion": ("lion", ""),
    "lion8bit": ("lion", "the same steps, its memory not in 8 bits"),
    "pagedlion8bit": ("lion", "the same steps, its memory not in 8 bits"),
    "prodigy": ("prodigy", ""),
    "dadaptadam": ("dadapt-adam", ""),
    "dadaptation": ("dadapt-adam", "the published version, where theirs is the preprint's"),
    "dadaptadampreprint": ("dadapt-adam", "the published version, where theirs is the preprint's"),
    "dadaptationadam": ("dadapt-adam", ""),
    "adafactor": ("adafactor", ""),
    "adamwschedulefree": ("adamw-schedule-free", ""),
    "scheduleFreeadamw".lower(): ("adamw-schedule-free", ""),
    "prodigyplusschedulefree": ("prodigy-schedule-free", ""),
    "came": ("came", ""),
    "muon": ("muon", ""),
}
"""By name in lower case without marks: ours, and what is to be said."""

_PACKAGES: dict[str, dict[str, Any]] = {
    "prodigy": {"weight_decay": 0.0, "use_bias_correction": False, "safeguard_warmup": False},
    "dadapt-adam": {"weight_decay": 0.0, "use_bias_correction": False, "decouple": False},
    "adafactor": {"scale_parameter": True},
}
"""Defaults of the packages that are not ours."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps", "weight_decay"),
    "adamw-8bit": ("betas", "eps", "weight_decay"),
    "lion": ("betas", "weight_decay"),
    "prodigy": ("betas", "eps", "weight_decay", "decouple", "use_bias_correction", "d0", "growth_rate", "beta3", "safeguard_warmup", "d_coef", "slice_p"),
    "dadapt-adam": ("betas", "eps", "weight_decay", "decouple", "use_bias_correction", "d0", "growth_rate"),
    "adafactor": ("clip_threshold", "weight_decay", "scale_parameter"),
    "adamw-schedule-free": ("betas", "eps", "weight_decay", "r", "weight_lr_power"),
    "prodigy-schedule-free": (
        "betas", "beta3", "eps", "weight_decay", "d0", "d_coef", "d_limiter", "split_groups", "schedulefree_c",
        "factored", "use_stableadamw", "use_bias_correction", "use_speed",
    ),
    "came": ("betas", "clip_threshold", "weight_decay"),
    "muon": ("momentum", "nesterov", "weight_decay", "ns_steps"),
}  # fmt: skip
"""Arguments of the packages that are settings of ours by the same name."""
RELATIVE_LR = 1e-2
"""Rate that Adafactor with relative_step takes in its first 10000 steps: min(0.01, 1 / √step)."""
_HARMLESS = {
    "amsgrad": (False,), "maximize": (False,), "foreach": (None, True, False), "fused": (None, True, False), "capturable": (False, True),
    "optim_bits": (32,), "percentile_clipping": (100,), "block_wise": (True,), "is_paged": (True, False), "log_every": (0,), "min_8bit_size": (4096, 16384),
    "fsdp_in_use": (False,), "no_prox": (False,), "use_triton": (False, True), "cautious": (False,), "beta1": (None,), "warmup_init": (False,), "eps2": (1e-3,),
    "relative_step": (False, True), "stochastic_rounding": (False,), "fused_back_pass": (False,), "prodigy_steps": (0,), "slice_p": (1, 11),
}  # fmt: skip
"""Arguments that, with these values, change nothing."""


def plain_name(name: str) -> str:
    """``prodigyplus.ProdigyPlusScheduleFree`` and ``Prodigy_Plus_Schedule_Free`` as one."""
    return name.rpartition(".")[2].lower().replace("_", "").replace("-", "")


def arguments_of(value: Any) -> dict[str, Any]:
    """``["weight_decay=0.1", "betas=0.9,0.99"]``, the same in one string, or a table, as a table.

    Raises:
        ValueError: a piece is no ``name=value``.
    """
    if isinstance(value, Mapping):
        return {str(name): _values.plain(item) for name, item in value.items()}
    pieces = [str(piece) for piece in value] if isinstance(value, list | tuple) else _pieces(str(value))
    found: dict[str, Any] = {}
    for piece in pieces:
        name, equals, given = piece.strip().strip("\"'").partition("=")
        if not equals:
            raise ValueError(f"holds '{_values.shown(piece)}', which is no name=value")
        found[name.strip()] = _values.plain(given.strip().strip("\"'"))
    return found


def _pieces(text: str) -> list[str]:
    """Words of a command line; "betas=0.9, 0.99" is one."""
    words: list[str] = []
    for word in text.replace('"', " ").split():
        if words and "=" not in word:
            words[-1] += word
        else:
            words.append(word)
    return words


def optimizer(reading: Reading, key: str, name: str, arguments: Mapping[str, Any], arguments_key: str) -> str | None:
    """Set the optimizer and what its package takes; ours by name, None if there is none like it."""
    ours, note = NAMES.get(plain_name(name), (None, ""))
    if ours is None:
        known = ", ".join(sorted({ours for ours, _ in NAMES.values()}))
        reading.lost(
            key,
            f"there is no such optimizer here, so the recipe has adamw; choose among {known}, and its learning rate.",
        )
        return None
    reading.put("optimizer.name", ours, key, note)
    left = dict(arguments)
    for argument in ARGUMENTS[ours]:
        if argument in left:
            _put(reading, ours, argument, left.pop(argument), arguments_key)
        elif argument in _PACKAGES.get(ours, {}):
            reading.default(f"optimizer.{argument}", _PACKAGES[ours][argument], f"{arguments_key}: {argument}")
    if "decay_rate" in left and ours == "adafactor":
        reading.put("optimizer.beta2_decay", left.pop("decay_rate"), f"{arguments_key}: decay_rate")
    if "warmup_steps" in left and ours == "adamw-schedule-free":
        steps = left.pop("warmup_steps")
        if steps:
            reading.put(
                "schedule.warmup",
                _values.span(steps, "steps"),
                f"{arguments_key}: warmup_steps",
                "the optimizer's own warm-up is the schedule's here",
            )
    for argument, value in left.items():
        if value not in _HARMLESS.get(argument, ()) or argument not in _HARMLESS:
            reading.lost(
                f"{arguments_key}: {argument}",
                f"{_values.shown(value)}: '{ours}' has no such setting here. See `lorabake explain {ours}`.",
            )
    return ours


def _put(reading: Reading, ours: str, argument: str, value: Any, arguments_key: str) -> None:
    key = f"{arguments_key}: {argument}"
    if argument == "growth_rate" and str(value).lower() in ("inf", "none"):
        return
    if value is None:
        return
    if argument == "eps" and isinstance(value, list | tuple):
        reading.lost(key, f"'{ours}' has one eps here.")
        return
    if argument in ("betas",) and isinstance(value, list | tuple):
        value = [float(item) for item in value if isinstance(item, int | float)]
    if isinstance(value, str):
        reading.lost(key, f"{_values.shown(value)} could not be read as a value.")
        return
    whole = argument in ("slice_p", "ns_steps")
    numeric = isinstance(value, int | float) and not isinstance(value, bool) and not whole
    reading.put(f"optimizer.{argument}", float(value) if numeric else value, key)


def relative_adafactor(reading: Reading, arguments: Mapping[str, Any], arguments_key: str, default: bool) -> bool:
    """Whether Adafactor finds its rate itself; then the rates and the schedule that do so are set."""
    if not _is(arguments, "relative_step", default) and not _is(arguments, "warmup_init", False):
        return False
    key = f"{arguments_key}: relative_step"
    if _is(arguments, "warmup_init", False):
        reading.lost(
            f"{arguments_key}: warmup_init",
            "its rate rises by 1e-6 a step, which no schedule here does. Give optimizer.lr and schedule.warmup.",
        )
    told = "Adafactor finds its rate itself, min(0.01, 1 / √step), which is 0.01 for the first 10000 steps"
    reading.put("optimizer.lr", RELATIVE_LR, key, told)
    reading.put("schedule.name", "constant", key, "its own schedule takes the place of theirs")
    return True


def _is(arguments: Mapping[str, Any], name: str, default: bool) -> bool:
    value = arguments.get(name, default)
    return str(value).strip().lower() in ("true", "1")
