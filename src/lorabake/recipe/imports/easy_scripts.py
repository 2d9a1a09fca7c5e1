"""Configs of LoRA_Easy_Training_Scripts: what it hands to sd-scripts, by the pages of its window, each with ``args`` and ``dataset_args``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabake.base.errors import UserError
from lorabake.recipe.imports import _values, kohya, kohya_data
from lorabake.recipe.imports._reading import Reading

_PARTS = ("args", "dataset_args")
_OWN = ("fa", "save_toml", "save_toml_location", "tag_occurrence", "tag_file_location", "train_mode")
"""Keys of its own. ``fa`` chooses the network, and the others say nothing of the training."""


def is_one(given: Mapping[str, Any]) -> bool:
    """Whether a file has such pages."""
    return any(key.endswith("_args") and _values.table(table).keys() & {*_PARTS} for key, table in given.items())


def as_sd_scripts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The pages as one training config, with its datasets in it.

    Raises:
        UserError: it trains no LoRA.
    """
    mode = _values.table(given.get("train_mode")).get("train_mode", "lora")
    if mode != "lora":
        raise UserError(
            f"The config trains a '{_values.shown(mode)}', and of LoRA_Easy_Training_Scripts' modes a recipe can be 'lora' alone. Nothing was written."
        )
    training: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for key, value in given.items():
        if not key.endswith("_args") or not isinstance(value, Mapping):
            training[key] = value
            continue
        training |= _values.table(value.get("args"))
        for name, item in _values.table(value.get("dataset_args")).items():
            (shared if name in kohya_data.KEYS else training)[name] = item
        training |= {name: item for name, item in value.items() if name not in _PARTS}
    subsets = [
        {name: item for name, item in subset.items() if name != "name"}
        for subset in _values.tables(training.pop("subsets", None))
    ]
    return {"general": shared, "datasets": [{"subsets": subsets}], **training}


def read(reading: Reading, dataset: Mapping[str, Any] | None) -> None:
    """Set everything that the pages say."""
    config = {key: value for key, value in reading.given.items() if key not in _OWN}
    reading.asides += [key for key in reading.given if key in _OWN]
    arguments = _values.table(config.get("network_args"))
    for module, chosen in (
        ("networks.lora_fa", reading.flag("fa")),
        ("networks.dylora", "unit" in arguments),
        ("lycoris.kohya", "algo" in arguments),
    ):
        if chosen:
            config["network_module"] = module
    inner = reading.part(config, "")
    inner.original = reading.given
    if not _values.is_nothing(config.get("lr_scheduler_type")):
        _cycles(inner, config)
    elif "warmup_ratio" in config:
        inner.aliases = {"lr_warmup_steps": "warmup_ratio"}
        config["lr_warmup_steps"] = config.pop("warmup_ratio")
    kohya.read(inner, dataset)


def _cycles(reading: Reading, config: dict[str, Any]) -> None:
    """A schedule that is named by its class is told the length of a cycle and of its warm-up, in steps."""
    if reading.has("warmup_ratio"):
        what = "its schedule warms up in every cycle; here only the run has a warm-up. Set schedule.warmup."
        reading.lost("warmup_ratio", what)
    cycles, steps = reading.whole("lr_scheduler_num_cycles"), reading.whole("max_train_steps")
    if cycles and steps:
        arguments = _values.table(config.get("lr_scheduler_args"))
        config["lr_scheduler_args"] = {**arguments, "first_cycle_max_steps": steps // cycles}
        what = f"{steps} steps / {cycles}"
        reading.say("converted", "lr_scheduler_num_cycles", "schedule.first_cycle", None, what)
    elif cycles:
        reading.lost("lr_scheduler_num_cycles", "so many cycles in a run of epochs: set schedule.first_cycle.")
    for key in ("warmup_ratio", "lr_scheduler_num_cycles"):
        config.pop(key, None)
