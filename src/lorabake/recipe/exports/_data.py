"""What sd-scripts calls the settings of a dataset, and which folders it has to be told one by one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabake.dataset.buckets import BucketConfig
from lorabake.dataset.scan import MASK_FOLDER, PICTURE_EXTENSIONS
from lorabake.recipe.exports._masks import mask_folders
from lorabake.recipe.exports._writing import Writing
from lorabake.recipe.imports._kohya_rows import SUBSET

_COLOURS = ("brightness", "contrast", "saturation", "hue")
_NEARLY_ALL = 0.999999
"""The share of a run for all of it."""


def data(writing: Writing, raw: Mapping[str, Any], family: str) -> dict[str, Any] | None:
    """Set the data; the dataset config, where one is needed.

    Args:
        writing: added to.
        raw: what the recipe says itself, without defaults.
        family: the model's.
    """
    _captions(writing)
    resolutions = _buckets(writing, raw)
    _augment(writing)
    folders = _listed(writing.get("data.folder"))
    masks = _masks(writing, folders)
    repeats = _listed(writing.get("data.repeats"))
    repeats = repeats * len(folders) if len(repeats) == 1 else repeats
    regularisation = _listed(writing.get("data.regularisation"))
    if masks and regularisation:
        writing.lost("data.regularisation", "sd-scripts takes no regularisation pictures where masks are files.")
        regularisation = []
    if (
        len(folders) == 1
        and not repeats
        and len(regularisation) < 2
        and not resolutions
        and not masks
        and _is_numbered(folders[0])
    ):
        writing.config |= writing.general
        writing.put("train_data_dir", folders[0], "data.folder")
        if regularisation:
            writing.put("reg_data_dir", regularisation[0], "data.regularisation")
        if writing.get("data.class_tokens"):
            writing.left("data.class_tokens", "every folder has its words in its name.")
        return None
    return _dataset(writing, folders, repeats, regularisation, resolutions, masks)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _is_numbered(folder: str) -> bool:
    """Whether sd-scripts sees all of it: numbered folders alone. One that is not here is believed to be so."""
    path = Path(folder)
    return not path.is_dir() or not (_pictures(path) or any(_number(inner.name) is None for inner in _inner(path)))


def _inner(path: Path) -> list[Path]:
    return [
        item
        for item in sorted(path.iterdir())
        if item.is_dir() and not item.name.startswith(".") and item.name.lower() != MASK_FOLDER and _pictures(item)
    ]


def _pictures(path: Path) -> bool:
    return any(item.suffix.lower() in PICTURE_EXTENSIONS for item in path.iterdir())


def _number(name: str) -> int | None:
    number = name.partition("_")[0]
    return int(number) if number.isdecimal() else None


def _dataset(
    writing: Writing,
    folders: list[str],
    repeats: list[int],
    regularisation: list[str],
    resolutions: list[int],
    masks: Mapping[Path, Path],
) -> dict[str, Any]:
    subsets: list[dict[str, Any]] = []
    for index, folder in enumerate(folders):
        named = _number(Path(folder).name) if len(folders) > 1 and not repeats else None
        subsets += _subsets(folder, repeats[index] if repeats else named or 1)
    for subset in subsets if masks else ():
        pictures = Path(subset["image_dir"])
        subset["conditioning_data_dir"] = str(masks.get(pictures, pictures / MASK_FOLDER))
    words = writing.get("data.class_tokens")
    if words:
        writing.say("same", "data.class_tokens", "class_tokens", words)
    for subset in subsets:
        if words and "class_tokens" not in subset:
            subset["class_tokens"] = words
    writing.say("converted", "data.folder", "image_dir", [subset["image_dir"] for subset in subsets], "in dataset.toml")
    for folder in regularisation:
        subsets += [{**subset, "is_reg": True} for subset in _subsets(folder, 1)]
    if regularisation:
        writing.say("converted", "data.regularisation", "is_reg", True, "in dataset.toml")
    own = {"batch_size": writing.config.pop("train_batch_size", 1)}
    size = {
        key: writing.general.pop(key)
        for key in (
            "enable_bucket",
            "min_bucket_reso",
            "max_bucket_reso",
            "bucket_reso_steps",
            "bucket_no_upscale",
            "resolution",
        )
        if key in writing.general
    }
    sizes = [{**size, "resolution": side} for side in resolutions] or [size]
    datasets = [{**own, **one, "subsets": subsets} for one in sizes]
    return {"general": dict(writing.general), "datasets": datasets}


def _subsets(folder: str, repeats: int) -> list[dict[str, Any]]:
    """A folder as sd-scripts needs it: each folder inside it by itself."""
    path = Path(folder)
    if not path.is_dir():
        return [{"image_dir": folder, "num_repeats": repeats}]
    found = [{"image_dir": folder, "num_repeats": repeats}] if _pictures(path) else []
    for inner in _inner(path):
        words = inner.name.partition("_")[2] if _number(inner.name) is not None else ""
        found.append(
            {
                "image_dir": str(inner),
                "num_repeats": repeats * (_number(inner.name) or 1),
                **({"class_tokens": words} if words else {}),
            }
        )
    return found or [{"image_dir": folder, "num_repeats": repeats}]


def _captions(writing: Writing) -> None:
    writing.general["caption_extension"] = ".txt"
    for row in SUBSET:
        value = writing.get(row.setting)
        if value not in (None, "", False, 0, 0.0) and (row.key, value) != ("caption_separator", ","):
            writing.put(row.key, value, row.setting, general=True)
    warmup = writing.get("data.captions.token_warmup")
    if isinstance(warmup, str) and warmup.endswith(("step", "steps")):
        writing.put(
            "token_warmup_step", int(warmup.split()[0]), "data.captions.token_warmup", "without its unit", general=True
        )
    elif isinstance(warmup, str):
        writing.lost("data.captions.token_warmup", "sd-scripts takes steps or a share of the run: give it as such.")
    elif warmup is not None:
        share, note = _share(writing, warmup)
        writing.put("token_warmup_step", share, "data.captions.token_warmup", note, general=True)
    fewest = writing.get("data.captions.token_warmup_min")
    if warmup is not None and fewest != 1:
        writing.put("token_warmup_min", fewest, "data.captions.token_warmup_min", general=True)


def _share(writing: Writing, share: float) -> tuple[float, str]:
    """A share of the run as sd-scripts reads it, and what is to be said: from 1 up it takes a number for steps."""
    if share < 1:
        return share, ""
    if steps := writing.config.get("max_train_steps"):
        return steps, "the whole run, in steps"
    return _NEARLY_ALL, "sd-scripts takes 1 for one step: this is nearly the whole run"


def _buckets(writing: Writing, raw: Mapping[str, Any]) -> list[int]:
    """Set the sizes; several resolutions, if there are several."""
    given = (raw.get("data") or {}).get("buckets") or {}
    config = BucketConfig.model_validate(writing.recipe["data"]["buckets"])
    writing.seen |= {f"data.buckets.{name}" for name in BucketConfig.model_fields}
    width, height = config.resolution_wh
    note = (
        "" if "resolution" in given or config.resolutions else "not given: lorabake takes the model's own; this is SD's"
    )
    writing.put(
        "resolution", width if width == height else [width, height], "data.buckets.resolution", note, general=True
    )
    if not config.enabled:
        return list(config.resolutions)
    writing.put("enable_bucket", True, "data.buckets.enabled", general=True)
    writing.put("bucket_reso_steps", config.step, "data.buckets.step", general=True)
    if not config.upscale:
        writing.put("bucket_no_upscale", True, "data.buckets.upscale", "the opposite", general=True)
        if config.resolutions:
            writing.lost(
                "data.buckets.resolutions",
                "sd-scripts shows small pictures at every size, here at those that they are large enough for.",
            )
        return list(config.resolutions)
    largest = max([config.largest, *(2 * side for side in config.resolutions if config.max is None)])
    writing.put(
        "min_bucket_reso",
        config.smallest,
        "data.buckets.min",
        "" if config.min else "our default, stated",
        general=True,
    )
    writing.put(
        "max_bucket_reso", largest, "data.buckets.max", "" if config.max else "our default, stated", general=True
    )
    return list(config.resolutions)


def _augment(writing: Writing) -> None:
    if writing.get("data.augment.random_crop"):
        writing.put("random_crop", True, "data.augment.random_crop", general=True)
    if span := writing.get("data.augment.face_crop"):
        writing.put(
            "face_crop_aug_range",
            ",".join(f"{side:g}" for side in span),
            "data.augment.face_crop",
            "as text",
            general=True,
        )
    for name in _COLOURS:
        if writing.get(f"data.augment.{name}"):
            writing.lost(f"data.augment.{name}", "sd-scripts has one mixture of colours, color_aug.")


def _masks(writing: Writing, folders: list[str]) -> dict[Path, Path]:
    """Folders of masks by folder of pictures, where masks are files that sd-scripts can be told of."""
    source = writing.get("data.masks.source")
    if source == "none":
        return {}
    if writing.get("data.masks.normalise") != "none":
        writing.lost(
            "data.masks.normalise",
            "sd-scripts takes the mean over the whole picture: the subject of a small mask is learnt slowly.",
        )
    for name in ("unmasked_weight", "unmasked_probability"):
        if writing.get(f"data.masks.{name}"):
            writing.lost(f"data.masks.{name}")
    if source == "alpha":
        writing.put("alpha_mask", True, "data.masks.source", general=True)
        return {}
    found = mask_folders(folders)
    if isinstance(found, str):
        what = "for each folder of pictures sd-scripts takes one folder with a mask for every picture, and no other"
        writing.lost("data.masks.source", f"{what}. {found}")
        return {}
    writing.put("masked_loss", True, "data.masks.source", "masks from the folders that hold them")
    return found
