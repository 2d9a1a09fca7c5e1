"""Configs of other trainers as recipes: kohya's sd-scripts and two GUIs of it, ai-toolkit, OneTrainer. Which one wrote a file is told by its content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.base.places import expanded
from lorabake.recipe.imports import _checks, _values, ai_toolkit, easy_scripts, kohya, kohya_data, kohya_gui, onetrainer
from lorabake.recipe.imports._files import read_config
from lorabake.recipe.imports._kohya_rows import IDLE_KEYS, LEFT, LOST, TRAINING
from lorabake.recipe.imports._paths import beside
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.imports._report import Imported, Line
from lorabake.recipe.imports._values import words
from lorabake.recipe.sections import PARTS, SECTIONS

__all__ = ["Imported", "Line", "import_config"]

_SETTINGS = kohya.HANDLED | {row.key for row in TRAINING} | LEFT.keys() | LOST.keys()
_KOHYA_KEYS = _SETTINGS | IDLE_KEYS | kohya_data.KEYS
_ARGUMENTS = ("network_args", "optimizer_args", "lr_scheduler_args")
"""Keys that are tables themselves, unless they are sections of settings that happen to be called so."""


@dataclass(frozen=True, slots=True)
class _Trainer:
    """A trainer, and how its configs are told."""

    name: str
    signs: frozenset[str]
    """Keys that only its configs have."""
    enough: int
    """So many of them tell it."""


_TRAINERS = (
    _Trainer("gui", frozenset(words(
"""
LoRA_type LyCORIS_preset max_resolution stop_text_encoder_training_pct lr_warmup model_list sdxl_no_half_vae
flux1_checkbox sd3_checkbox additional_parameters
"""
)), 2),
    _Trainer("onetrainer", frozenset(words(
"""
__version training_method base_model_name model_type concept_file_name concepts output_model_destination workspace_dir
cache_dir train_dtype output_dtype learning_rate_scheduler learning_rate_warmup_steps optimizer_defaults
aspect_ratio_bucketing lora_rank lora_alpha peft_type timestep_distribution unet text_encoder
sample_definition_file_name loss_weight_fn output_model_format
"""
)), 3),
    _Trainer("ai-toolkit", frozenset({"job", "config"}), 2),
    _Trainer("kohya-dataset", frozenset({"datasets"}), 1),
    _Trainer("kohya", _KOHYA_KEYS - {"optimizer", "learning_rate", "resolution", "seed", "batch_size"}, 2),
)  # fmt: skip
_CALLED = {
    "gui": "a config of the kohya_ss GUI",
    "onetrainer": "a config of OneTrainer",
    "easy": "a config of LoRA_Easy_Training_Scripts",
    "ai-toolkit": "a job of ai-toolkit",
    "kohya-dataset": "a dataset config of kohya's sd-scripts",
    "kohya": "a training config of kohya's sd-scripts",
}


def import_config(path: str | os.PathLike[str], dataset: str | os.PathLike[str] | None = None) -> Imported:
    """Read a config of another trainer. Nothing is written.

    Args:
        path: the config.
        dataset: a dataset config of sd-scripts that goes with it.

    Raises:
        UserError: it is no such config.
        Problems: values in it are not of their kind.
    """
    source = expanded(path)
    given = _table(source, read_config(source))
    trainer = _detect(source, given)
    pictures = _dataset(source, given, trainer, dataset)
    reading = Reading(given, source=source)
    if trainer == "kohya-dataset":
        _read(source, "kohya", reading.part({}, ""), given)
        reading.warnings.insert(
            0,
            "A dataset config says nothing of the training: those are sd-scripts' defaults. Give the training config, and this one as --dataset.",
        )
    else:
        _read(source, trainer, reading, pictures)
    if reading.problems:
        raise Problems(str(source), _once(reading.problems), "Put the values right, and import again.")
    reading = _checks.fit(reading)
    found = Imported(
        source.name,
        _CALLED[trainer],
        _checks.trimmed(reading.values),
        tuple(reading.lines),
        _untold(reading),
        tuple(dict.fromkeys(reading.warnings)),
    )
    return replace(found, warnings=(*found.warnings, *_checks.remaining(found)))


def _read(source: Path, trainer: str, reading: Reading, pictures: Mapping[str, Any] | None) -> None:
    """What no reader expects is a problem beside those that were found before it."""
    try:
        _READERS[trainer](reading, pictures)
    except UserError:
        raise
    except ValueError as error:
        reading.problems.append(Problem(source.name, f"a value in it cannot be read: {error}."))


def _untold(reading: Reading) -> tuple[str, ...]:
    """Keys without use of which nothing else was told."""
    told = {line.key for line in reading.lines}
    return tuple(key for key in dict.fromkeys(reading.asides) if key not in told)


def _once(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _table(path: Path, data: Any) -> dict[str, Any]:
    if isinstance(data, list):
        raise UserError(
            f"{path} holds a list and is no config by itself: it may be OneTrainer's concepts or samples. Give the config that names it. Nothing was written."
        )
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path} holds no settings. Give the config file of a trainer. Nothing was written.")
    return {str(key): value for key, value in data.items()}


def _detect(path: Path, given: dict[str, Any]) -> str:
    """Which trainer wrote it; for sd-scripts its sections are made one.

    Raises:
        UserError: none did, or several.
    """
    if _is_recipe(given):  # some of whose settings are called as other trainers' are
        raise UserError(f"{path} is a recipe already. Train it with `lorabake train`. Nothing was written.")
    if easy_scripts.is_one(given):
        pages = easy_scripts.as_sd_scripts(given)
        given.clear()
        given.update(pages)
        return "easy"
    found = [trainer.name for trainer in _TRAINERS if len(trainer.signs & given.keys()) >= trainer.enough]
    if "ai-toolkit" in found and not isinstance(given["config"], Mapping):
        found.remove("ai-toolkit")
    flat = _flattened(given)
    if not found or found == ["kohya-dataset"]:
        signs = _TRAINERS[-1].signs
        if len(signs & flat.keys()) >= 2 and not (found and not signs & (flat.keys() - {"general", "datasets"})):
            found = ["kohya", *found]
    if "kohya" in found and (
        "gui" in found
        or (
            "onetrainer" in found
            and not {"network_module", "pretrained_model_name_or_path", "network_dim"} & given.keys()
        )
    ):
        found.remove("kohya")  # the GUI has sd-scripts' names for most, and everybody has some of them
    if "kohya" in found and "kohya-dataset" in found:
        found.remove("kohya-dataset")
    if len(found) > 1:
        which = " and ".join(_CALLED[name] for name in found)
        raise UserError(
            f"{path} has keys of several trainers: it could be {which}. Import each config from a file of its own. Nothing was written."
        )
    if not found:
        raise UserError(f"{path} {_what_else(given)} Nothing was written.")
    if found == ["kohya"]:
        given.clear()
        given.update(flat)
    return found[0]


def _is_recipe(given: Mapping[str, Any]) -> bool:
    known = given.keys() <= {*SECTIONS, *PARTS} and not isinstance(_values.table(given.get("model")).get("type"), str)
    return known and all(isinstance(section, Mapping) for section in given.values())


def _what_else(given: Mapping[str, Any]) -> str:
    if all(
        isinstance(value, Mapping) and {"caption", "tags", "train_resolution"} & value.keys()
        for value in given.values()
    ):
        return "is a metadata file with captions. Write them beside the pictures, as 001.txt for 001.png."
    if any(key.startswith("--") for key in given) or "data_backend_config" in given:
        return "looks like a config of SimpleTuner, which is not read."
    if isinstance(given.get("model"), Mapping) and isinstance(given.get("adapter"), Mapping):
        return "looks like a config of diffusion-pipe, which is not read."
    return (
        "is no config of a trainer that is known here: kohya's sd-scripts (training or dataset), the kohya_ss GUI, "
        "LoRA_Easy_Training_Scripts, ai-toolkit and OneTrainer are."
    )


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """sd-scripts takes sections apart: what they are called means nothing. What goes with datasets, and tables of arguments, stay together."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        apart = (key == "general" and isinstance(given.get("datasets"), list)) or (
            key in _ARGUMENTS and isinstance(value, Mapping) and not value.keys() & _SETTINGS
        )
        if isinstance(value, Mapping) and not apart:
            flat.update(value)
        else:
            flat[key] = value
    return flat


def _dataset(
    source: Path, given: dict[str, Any], trainer: str, dataset: str | os.PathLike[str] | None
) -> Mapping[str, Any] | None:
    """The dataset config: given, or in the same file, or named by it and found."""
    if dataset is not None:
        path = expanded(dataset)
        if trainer not in ("kohya", "gui"):
            raise UserError(
                f"--dataset is for configs of sd-scripts, and {source} is {_CALLED[trainer]}. Leave it out. Nothing was written."
            )
        found = _table(path, read_config(path))
        if not kohya_data.subsets_of(found):
            raise UserError(
                f"{path} is no dataset config of sd-scripts: it has no [[datasets]] with [[datasets.subsets]]. Nothing was written."
            )
        return found
    if trainer in ("kohya", "easy") and isinstance(given.get("datasets"), list):
        return {key: given.pop(key) for key in ("general", "datasets") if key in given}
    named = given.get("dataset_config")
    if trainer in ("kohya", "gui") and isinstance(named, str) and named.strip() and (path := beside(source, named)):
        return _table(path, read_config(path))
    return None


_READERS: dict[str, Callable[[Reading, Mapping[str, Any] | None], None]] = {
    "kohya": kohya.read,
    "gui": kohya_gui.read,
    "easy": easy_scripts.read,
    "ai-toolkit": lambda reading, _: ai_toolkit.read(reading),
    "onetrainer": lambda reading, _: onetrainer.read(reading),
}
