"""What sd-scripts trains on: folders, buckets and captions, from a dataset config or from the training config alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.dataset.scan import PICTURE_EXTENSIONS
from lorabake.recipe.imports import _values, kohya_buckets
from lorabake.recipe.imports._kohya_rows import SUBSET
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading

OWN_KEYS = frozenset({"image_dir", "num_repeats", "class_tokens", "is_reg", "metadata_file", "conditioning_data_dir"})
"""Keys that each subset has for itself."""
KEYS = (
    OWN_KEYS
    | {row.key for row in SUBSET}
    | {
        "batch_size", "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "validation_seed",
        "validation_split", "network_multiplier", "resize_interpolation", "token_warmup_min", "token_warmup_step", "color_aug", "face_crop_aug_range",
        "random_crop", "custom_attributes", "caption_extension", "cache_info", "alpha_mask", "skip_image_resolution",
    }
)  # fmt: skip
"""All keys of a dataset config."""
_FALL_BACK = KEYS - OWN_KEYS - {"batch_size"}
"""Keys that a dataset config may leave to the training config."""


@dataclass(frozen=True, slots=True)
class Subset:
    """A folder, with everything that holds for it."""

    image_dir: str
    own: Mapping[str, Any]
    of_all: Mapping[str, Any]
    """What may be said further up, as it is for this subset."""


def data(training: Reading, dataset: Mapping[str, Any] | None) -> None:
    """Set the data section and the batch size."""
    subsets: list[Subset] = []
    if dataset is None:
        reading = training
        _folders_of_training(training)
    else:
        subsets = _counted(training, _subsets(training, dataset))
        reading = _common(training, subsets)
        _folders(reading, subsets)
        for key in ("train_data_dir", "reg_data_dir"):
            if training.has(key):
                training.unused(key, "the dataset config takes its place.")
    reading.rows(SUBSET)
    kohya_buckets.buckets(reading)
    _warmup(reading)
    _augment(reading)
    _masks(training, reading, subsets)
    training.seen |= reading.seen


def subsets_of(dataset: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(dataset, subset) tables, in their order."""
    found = []
    for one in _values.tables(dataset.get("datasets")):
        if isinstance(one, Mapping):
            found += [(one, subset) for subset in _values.tables(one.get("subsets"))]
    return found


def _subsets(training: Reading, dataset: Mapping[str, Any]) -> list[Subset]:
    general = _values.table(dataset.get("general"))
    fallback = {key: training.given[key] for key in _FALL_BACK if training.has(key)}
    found: list[Subset] = []
    _unknown(training, general, "general.", KEYS)
    for key in dataset:
        if key not in ("general", "datasets") and not isinstance(training.given.get(key), type(dataset[key])):
            training.part(dataset, "").say("unknown", key, note="sd-scripts refuses a dataset config with it.")
    for one in _values.tables(dataset.get("datasets")):
        if isinstance(one, Mapping):
            _unknown(training, one, "datasets.", KEYS | {"subsets"})
    for one, subset in subsets_of(dataset):
        _unknown(training, subset, "datasets.subsets.", KEYS)
        above = {key: value for key, value in one.items() if key != "subsets"}
        merged = {**fallback, **general, **above, **subset}
        own = {key: subset.get(key, one.get(key, general.get(key))) for key in OWN_KEYS}
        found.append(Subset(str(own.get("image_dir") or ""), own, merged))
    return found


def _counted(training: Reading, subsets: Sequence[Subset]) -> list[Subset]:
    """Those that are trained on: sd-scripts leaves out a subset without repeats."""
    found = [subset for subset in subsets if _repeats(training, subset) >= 1]
    part = training.part({"num_repeats": 0}, "datasets.subsets.")
    for subset in subsets:
        if subset not in found:
            part.unused("num_repeats", f"{subset.image_dir}: sd-scripts leaves a folder with fewer repeats than 1 out.")
    return found


def _unknown(training: Reading, table: Mapping[str, Any], prefix: str, known: frozenset[str] | set[str]) -> None:
    part = training.part(
        {key: value for key, value in table.items() if not isinstance(value, list | dict) or key not in known}, prefix
    )
    part.seen |= set(known)
    part.rest((), known, "sd-scripts refuses a dataset config with it.")


def _common(training: Reading, subsets: Sequence[Subset]) -> Reading:
    """What holds for all subsets; where they differ, the first one's, and that is told."""
    trained = [subset for subset in subsets if not _is_reg(subset)] or list(subsets)
    keys = sorted({key for subset in subsets for key in subset.of_all} - OWN_KEYS)
    common: dict[str, Any] = {}
    reading = training.part(common, "")
    for key in keys:
        # Regularisation pictures have their own captions, and whether they are mirrored is no matter of theirs here.
        values = [subset.of_all.get(key) for subset in trained]
        common[key] = values[0]
        if key != "resolution" and any(value != values[0] for value in values):
            each = ", ".join(dict.fromkeys(_values.shown(value) for value in values))
            what = f"subsets differ in it ({each}), and a recipe has one for all: the first one's is taken. Train them in one recipe each, or agree on one."
            reading.lost(key, what)
    if "batch_size" in common:
        common["train_batch_size"] = common.pop("batch_size")
        reading.aliases, reading.original = (
            {"train_batch_size": "batch_size"},
            {**common, "batch_size": common["train_batch_size"]},
        )
        if (size := reading.whole("train_batch_size")) is not None:
            reading.put("train.batch_size", size, "train_batch_size")
        if training.has("train_batch_size"):
            training.unused("train_batch_size", "the dataset config's batch_size takes its place.")
    _resolutions(reading, trained)
    return reading


def _resolutions(reading: Reading, trained: Sequence[Subset]) -> None:
    """The same folders at several sizes are several resolutions; other folders at other sizes are nothing that a recipe has."""
    by_size: dict[str, set[str]] = {}
    for subset in trained:
        by_size.setdefault(str(subset.of_all.get("resolution")), set()).add(subset.image_dir)
    if len(by_size) < 2:
        return
    sides = [_side(subset.of_all.get("resolution")) for subset in trained]
    if all(folders == next(iter(by_size.values())) for folders in by_size.values()) and all(sides):
        found = sorted({side for side in sides if side})
        reading.put(
            "data.buckets.resolutions",
            found,
            "resolution",
            "the same folders at several sizes: small pictures are seen at those that they are large enough for",
        )
        return
    each = ", ".join(by_size)
    reading.lost(
        "resolution",
        f"folders have sizes of their own ({each}), and a recipe has one for all: the first is taken. Train them in one recipe each.",
    )


def _side(value: Any) -> int | None:
    try:
        sides = [_values.whole(side) for side in _values.numbers(value)]
    except ValueError:
        return None
    return sides[0] if len(set(sides)) == 1 else None


def _is_reg(subset: Subset) -> bool:
    try:
        return not _values.is_nothing(subset.own.get("is_reg")) and _values.flag(subset.own["is_reg"])
    except ValueError:
        return False


def _folders_of_training(training: Reading) -> None:
    if (folder := training.text("train_data_dir")) is not None:
        where = located(training, "train_data_dir", folder)
        training.put("data.folder", where, "train_data_dir")
        _unnumbered(training, Path(where))
    else:
        training.warnings.append("The file names no folder of pictures: put one in as data.folder, or give --dataset.")
        training.put("data.folder", os.path.abspath("pictures"), "train_data_dir", "put your folder in here", "default")
    if (regularisation := training.text("reg_data_dir")) is not None:
        training.put("data.regularisation", [located(training, "reg_data_dir", regularisation)], "reg_data_dir")
    extension(training)


def _unnumbered(training: Reading, folder: Path) -> None:
    """sd-scripts trains numbered subfolders alone; here everything in the folder is trained."""
    if not os.path.isdir(folder):
        return
    loose = [item.name for item in sorted(folder.iterdir()) if item.suffix.lower() in PICTURE_EXTENSIONS]
    others = [
        item.name
        for item in sorted(folder.iterdir())
        if item.is_dir()
        and not item.name.startswith(".")
        and not item.name.partition("_")[0].isdigit()
        and _holds_pictures(item)
    ]
    if loose or others:
        what = f"{len(loose)} pictures directly in it" if loose else f"the folder {others[0]}"
        training.warnings.append(
            f"{folder} holds {what}, which sd-scripts leaves out: here they are trained, once per epoch. Move them out if that is not meant."
        )


def _holds_pictures(folder: Path) -> bool:
    return any(item.suffix.lower() in PICTURE_EXTENSIONS for item in folder.iterdir())


def _folders(reading: Reading, subsets: Sequence[Subset]) -> None:
    trained = _once([subset for subset in subsets if not _is_reg(subset)])
    regularised = _once([subset for subset in subsets if _is_reg(subset)])
    part = reading.part({"image_dir": None}, "datasets.subsets.")
    if not trained:
        reading.problems.append(_no_subset())
        return
    for subset in subsets:
        if not _values.is_nothing(subset.own.get("metadata_file")):
            part.lost(
                "metadata_file",
                f"{subset.own['metadata_file']}: captions of a metadata file are not read. Write them beside the pictures, as 001.txt for 001.png.",
            )
    folders = [located(part, "image_dir", subset.image_dir) for subset in trained]
    part.put("data.folder", folders[0] if len(folders) == 1 else folders, "image_dir")
    repeats = [_repeats(reading, subset) for subset in trained]
    for key in ("num_repeats", "class_tokens"):
        _of_sizes(part, [subset for subset in subsets if not _is_reg(subset)], key)
    if len(folders) > 1 or repeats != [1]:
        part.put(
            "data.repeats",
            repeats[0] if len(set(repeats)) == 1 else repeats,
            "num_repeats",
            kind="same" if any(count != 1 for count in repeats) else "default",
        )
    _class_tokens(part, trained)
    if regularised:
        part.put(
            "data.regularisation",
            [located(part, "image_dir", subset.image_dir) for subset in regularised],
            "is_reg",
            "regularisation pictures are taken in turn, as many as training pictures; their repeats do not count",
        )
    for folder in folders:
        _inside(reading, Path(folder))
    extension(reading)


def _no_subset() -> Any:
    from lorabake.base.errors import Problem

    return Problem("datasets.subsets", "there is none to train on: none has an image_dir.")


def _once(subsets: Sequence[Subset]) -> list[Subset]:
    """Each folder once: others of the same name are its other sizes."""
    return list({subset.image_dir: subset for subset in reversed(subsets) if subset.image_dir}.values())[::-1]


def _of_sizes(part: Reading, subsets: Sequence[Subset], key: str) -> None:
    """Tell where a folder has other values at another of its sizes. Of the same folder twice at one size the second is left out there, too."""
    by_folder: dict[str, dict[str, str]] = {}
    for subset in subsets:
        given = subset.own.get(key)
        if _values.is_nothing(given):
            given = 1 if key == "num_repeats" else "none"
        sizes = by_folder.setdefault(subset.image_dir, {})
        sizes.setdefault(str(subset.of_all.get("resolution")), _values.shown(given))
    for folder, sizes in by_folder.items():
        values = list(dict.fromkeys(sizes.values()))
        if len(values) > 1:
            part.lost(
                key,
                f"{folder} has others at each of its sizes ({', '.join(values)}), and here a folder has one for all: the first is taken.",
            )


def _repeats(reading: Reading, subset: Subset) -> int:
    count = reading.read("datasets.subsets.num_repeats", subset.own.get("num_repeats"), _values.whole)
    return 1 if count is None else count


def _class_tokens(part: Reading, trained: Sequence[Subset]) -> None:
    words = list(
        dict.fromkeys(
            str(subset.own["class_tokens"])
            for subset in trained
            if not _values.is_nothing(subset.own.get("class_tokens"))
        )
    )
    if not words:
        return
    part.put("data.class_tokens", words[0], "class_tokens")
    if len(words) > 1:
        part.lost(
            "class_tokens",
            f"folders have words of their own ({', '.join(words)}), and a recipe has one for all. Write captions beside the pictures that have none.",
        )


def _inside(reading: Reading, folder: Path) -> None:
    """sd-scripts looks at an image_dir alone; here its subfolders are trained too."""
    if os.path.isdir(folder):
        inner = [
            item.name
            for item in sorted(folder.iterdir())
            if item.is_dir()
            and not item.name.startswith(".")
            and item.name.lower() != "masks"
            and _holds_pictures(item)
        ]
        if inner:
            reading.warnings.append(
                f"{folder} holds folders with pictures ({inner[0]}), which sd-scripts leaves out: here they are trained. Move them out if that is not meant."
            )


def extension(reading: Reading) -> None:
    """Captions are read from .txt, else .caption."""
    for key in ("caption_extension", "caption_extention"):
        if (given := reading.text(key)) is None:
            continue
        if given.lstrip(".").lower() in ("txt", "caption"):
            reading.asides.append(reading.called(key))
        else:
            reading.lost(key, "captions are read from files ending in .txt, or else .caption. Rename them.")


def _warmup(reading: Reading) -> None:
    length, fewest = reading.number("token_warmup_step"), reading.whole("token_warmup_min")
    if not length:
        if fewest is not None:
            reading.unused("token_warmup_min", "there is no token_warmup_step.")
        if reading.has("token_warmup_step"):
            reading.say("same", "token_warmup_step", "data.captions.token_warmup", None, "off")
        return
    ours = length if length < 1 else _values.span(int(length), "steps")
    reading.put(
        "data.captions.token_warmup",
        ours,
        "token_warmup_step",
        "a share of the run" if length < 1 else "optimizer steps",
    )
    if fewest is not None:
        reading.put("data.captions.token_warmup_min", fewest, "token_warmup_min")


def _augment(reading: Reading) -> None:
    looks = []
    if reading.flag("random_crop"):
        reading.put("data.augment.random_crop", True, "random_crop")
        looks.append("random_crop")
    elif reading.has("random_crop"):
        reading.say("same", "random_crop", "data.augment.random_crop", None, "off")
    if reading.has("face_crop_aug_range") and (span := reading.take("face_crop_aug_range", _values.numbers)):
        reading.put("data.augment.face_crop", span, "face_crop_aug_range")
        looks.append("face_crop_aug_range")
    if looks:
        reading.put(
            "data.augment.views",
            "fresh",
            looks[0],
            "sd-scripts crops anew at every step. Without it 8 looks are kept, which is much faster.",
            "default",
        )


def _masks(training: Reading, reading: Reading, subsets: Sequence[Subset]) -> None:
    """kohya takes the mean over the whole picture, black included."""
    masked, alpha = training.flag("masked_loss"), reading.flag("alpha_mask")
    told = [subset for subset in subsets if not _values.is_nothing(subset.own.get("conditioning_data_dir"))]
    fitting = [subset for subset in told if _is_mask_folder(subset)]
    if alpha:
        training.put("data.masks.source", "alpha", "alpha_mask")
    elif masked and fitting and len(fitting) == len(told):
        training.put("data.masks.source", "files", "masked_loss", "the masks lie where they are looked for")
    elif masked or told:
        where = str(told[0].own["conditioning_data_dir"]) if told else "they are not in this file"
        what = "put them into a folder masks inside the pictures' folder, under the pictures' names, and set data.masks.source = \"files\""
        training.lost("masked_loss", f'masks ({where}): {what}, data.masks.normalise = "none".')
        return
    else:
        return
    training.put(
        "data.masks.normalise", "none", "masked_loss", "sd-scripts takes the mean over the whole picture", "default"
    )


def _is_mask_folder(subset: Subset) -> bool:
    return os.path.normpath(str(subset.own["conditioning_data_dir"])) == os.path.normpath(
        os.path.join(subset.image_dir, "masks")
    )
