"""Concepts of OneTrainer: folders of pictures, each with its own augmentations and rules for captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem
from lorabake.recipe.imports import _values
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.imports._values import words

_COLOURS = {"brightness": "brightness", "contrast": "contrast", "saturation": "saturation"}


def data(reading: Reading, concepts: Sequence[Any] | None) -> None:
    """Set the data section."""
    enabled = [item for item in _values.tables(concepts) if item.get("enabled", True) and item.get("path")]
    trained = [item for item in enabled if _kind(item) == "STANDARD"]
    if not trained:
        if concepts is not None:
            reading.warnings.append(
                "No concept is enabled and has a path: put your folder of pictures in as data.folder."
            )
        reading.put(
            "data.folder", str(Path("pictures").absolute()), "concept_file_name", "put your folder in here", "default"
        )
        return
    first = trained[0]
    part = reading.part(dict(first), "concepts.")
    paths = [located(part, "path", str(item["path"])) for item in trained]
    part.put("data.folder", paths[0] if len(paths) == 1 else paths, "path")
    _repeats(part, trained)
    _differing(part, trained)
    for item in enabled:
        if _kind(item) == "VALIDATION":
            part.put("validation.folder", located(part, "path", str(item["path"])), "type", "a concept for validation")
        elif _kind(item) == "PRIOR_PREDICTION":
            part.lost(
                "type",
                f"{item['path']}: a concept whose pictures are answered as the base does. Near: preservation.weight, or the folder as data.regularisation.",
            )
        if item.get("loss_weight", 1) not in (1, 1.0):
            part.lost(
                "loss_weight", "all pictures count alike, but for regularisation pictures: data.prior_loss_weight."
            )
    _image(reading.part(_table(first.get("image")), "concepts.image."))
    _text(reading.part(_table(first.get("text")), "concepts.text."))
    for item in trained:
        if item.get("include_subdirectories"):
            part.warnings.append(
                "concepts.include_subdirectories: folders directly inside the folder are trained here, deeper ones are not."
            )


def _kind(item: Mapping[str, Any]) -> str:
    return "VALIDATION" if item.get("validation_concept") else str(item.get("type") or "STANDARD").upper()


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _repeats(part: Reading, trained: Sequence[Mapping[str, Any]]) -> None:
    counts: list[float] = []
    for item in trained:
        given = item.get("balancing", item.get("repeats", 1))
        try:
            counts.append(1.0 if _values.is_nothing(given) else _values.number(given))
        except ValueError as error:
            part.problems.append(Problem("concepts.balancing", f"{_values.shown(given)} {error}."))
            return
        if str(item.get("balancing_strategy") or "REPEATS").upper() == "SAMPLES":
            part.lost(
                "balancing_strategy",
                f"{counts[-1]:g} pictures of it per epoch, drawn anew: here every picture of a folder is trained on in each epoch.",
            )
            counts[-1] = 1.0
    whole = [max(1, round(count)) for count in counts]
    if any(count != int(count) or count < 1 for count in counts):
        part.lost("balancing", "parts of a folder per epoch are no setting here: the nearest whole number is taken.")
    if len(trained) > 1 or whole != [1]:
        part.put("data.repeats", whole[0] if len(set(whole)) == 1 else whole, "balancing", "repeats")


def _differing(part: Reading, trained: Sequence[Mapping[str, Any]]) -> None:
    for table in ("image", "text"):
        values = [_table(item.get(table)) for item in trained]
        keys = {key for value in values for key in value if key not in ("prompt_path",)}
        differing = sorted(key for key in keys if any(value.get(key) != values[0].get(key) for value in values))
        if differing:
            part.lost(
                f"{table}: {', '.join(differing)}",
                "concepts differ in it, and a recipe has one for all: the first one's is taken. Train them in one recipe each, or agree on one.",
            )


def _image(image: Reading) -> None:
    given = image.given
    flip = not image.has("enable_random_flip") or image.flag("enable_random_flip")
    image.put("data.flip", flip, "enable_random_flip", kind=None if "enable_random_flip" in given else "default")
    jitter = not image.has("enable_crop_jitter") or image.flag("enable_crop_jitter")
    if jitter:
        image.put(
            "data.augment.random_crop",
            True,
            "enable_crop_jitter",
            kind=None if "enable_crop_jitter" in given else "default",
        )
    for name, setting in _COLOURS.items():
        strength = image.number(f"random_{name}_max_strength")
        if image.flag(f"enable_random_{name}") and strength:
            image.put(
                f"data.augment.{setting}", strength, f"random_{name}_max_strength", "a share; OneTrainer's strongest"
            )
    hue = image.number("random_hue_max_strength")
    if image.flag("enable_random_hue") and hue:
        image.put("data.augment.hue", hue * 360, "random_hue_max_strength", f"{hue:g} × 360 degrees")
    for key in (
        "enable_fixed_flip",
        "enable_random_rotate",
        "enable_fixed_rotate",
        "enable_fixed_brightness",
        "enable_fixed_contrast",
        "enable_fixed_saturation",
        "enable_fixed_hue",
        "enable_random_circular_mask_shrink",
        "enable_random_mask_rotate_crop",
    ):
        if image.flag(key):
            image.lost(key, "there is no such setting: change the pictures themselves, or see data.augment.")
    if image.flag("enable_resolution_override"):
        image.lost(
            "enable_resolution_override",
            f"{_values.shown(given.get('resolution_override'))}: a recipe has one size for all folders. Set data.buckets.resolution.",
        )
    image.rest(
        ["resolution_override", "random_rotate_max_angle", "enable_crop_jitter"],
        (),
        "OneTrainer takes no notice of it, without a word.",
    )


def _text(told: Reading) -> None:
    if told.flag("enable_tag_shuffling"):
        told.put("data.captions.shuffle", True, "enable_tag_shuffling")
        keep = told.whole("keep_tags_count")
        told.put(
            "data.captions.keep_tokens",
            1 if keep is None else keep,
            "keep_tags_count",
            kind=None if keep is not None else "default",
        )
        delimiter = told.given.get("tag_delimiter")
        if isinstance(delimiter, str) and delimiter.strip() and delimiter.strip() != ",":
            told.put("data.captions.separator", delimiter.strip(), "tag_delimiter")
    source = str(told.given.get("prompt_source") or "sample").lower()
    told.seen |= {"prompt_source", "tag_delimiter", "prompt_path"}
    if source == "filename":
        told.lost(
            "prompt_source",
            "captions are not the files' names here. Write them beside the pictures, as 001.txt for 001.png.",
        )
    elif source == "concept":
        told.lost(
            "prompt_source",
            "captions of a list are not read. Write them beside the pictures, as 001.txt for 001.png, or give data.class_tokens for all.",
        )
    else:
        told.put(
            "data.captions.wildcards",
            True,
            "prompt_source",
            "of a file with several lines, one is drawn at each step",
            "default",
        )
    _dropout(told)
    if told.flag("caps_randomize_enable"):
        told.lost("caps_randomize_enable", "letters stay as they are here.")
    told.rest(
        words(
            """
keep_tags_count tag_dropout_mode tag_dropout_probability tag_dropout_special_tags_mode tag_dropout_special_tags
tag_dropout_special_tags_regex caps_randomize_mode caps_randomize_probability caps_randomize_lowercase
enable_tag_shuffling
"""
        ),
        (),
        "OneTrainer takes no notice of it, without a word.",
    )


def _dropout(told: Reading) -> None:
    if not told.flag("tag_dropout_enable"):
        return
    probability, mode = (
        told.number("tag_dropout_probability") or 0.0,
        str(told.given.get("tag_dropout_mode") or "FULL").upper(),
    )
    if mode == "FULL":
        told.put(
            "data.captions.caption_dropout", probability, "tag_dropout_probability", "FULL leaves out the whole caption"
        )
        told.lost("tag_dropout_mode", "FULL leaves out all but the kept tags; here the whole caption.")
    elif mode == "RANDOM":
        told.put("data.captions.tag_dropout", probability, "tag_dropout_probability")
    else:
        told.lost(
            "tag_dropout_mode", f"{mode}: tags are left out with one probability here: data.captions.tag_dropout."
        )
    if str(told.given.get("tag_dropout_special_tags_mode") or "NONE").upper() != "NONE":
        told.lost("tag_dropout_special_tags_mode", "all tags but the kept ones may be left out here.")
