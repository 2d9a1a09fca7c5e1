"""What a job of ai-toolkit trains on: folders, sizes, masks and captions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._ai_toolkit_keys import IDLE_DATASET, LOST_DATASET, SWALLOWED
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading, Row

number, whole, flag, text = _values.number, _values.whole, _values.flag, _values.text

DATASET = (
    Row("shuffle_tokens", "data.captions.shuffle", flag),
    Row("keep_tokens", "data.captions.keep_tokens", whole),
    Row("caption_dropout_rate", "data.captions.caption_dropout", number),
    Row("token_dropout_rate", "data.captions.tag_dropout", number),
    Row("flip_x", "data.flip", flag),
    Row("random_crop", "data.augment.random_crop", flag),
    Row("default_caption", "data.class_tokens", text),
)


_MOST_CAPTIONS = 5000


def datasets(process: Reading, trigger: str | None) -> None:
    """Set the data section."""
    given = _values.tables(process.given.get("datasets"))
    process.seen.add("datasets")
    given = [item for item in given if _counts(process, item)]
    trained = [item for item in given if not item.get("is_reg")]
    regularised = [item for item in given if item.get("is_reg")]
    if not trained:
        process.warnings.append("The job names no folder of pictures: put one in as data.folder.")
        process.put("data.folder", str(Path("pictures").absolute()), "datasets", "put your folder in here", "default")
        return
    common: dict[str, Any] = dict(trained[0])
    part = process.part(common, "datasets.")
    for key in {key for item in trained for key in item} - {"folder_path", "dataset_path", "resolution", "num_repeats"}:
        values = [item.get(key) for item in trained]
        if any(value != values[0] for value in values):
            part.lost(
                key,
                "datasets differ in it, and a recipe has one for all: the first one's is taken. Train them in one recipe each, or agree on one.",
            )
    folders = list(dict.fromkeys(str(item.get("folder_path") or item.get("dataset_path") or "") for item in trained))
    where = [located(part, "folder_path", folder) for folder in folders]
    part.put("data.folder", where[0] if len(where) == 1 else where, "folder_path")
    _repeats(part, trained, len(folders))
    if regularised:
        paths = list(
            dict.fromkeys(located(part, "folder_path", str(item.get("folder_path") or "")) for item in regularised)
        )
        part.put(
            "data.regularisation",
            paths,
            "is_reg",
            "taken in turn, as many as training pictures; ai-toolkit takes a batch of each in turn",
        )
    _sizes(part, trained)
    part.rows(DATASET)
    if part.get("data.augment.random_crop"):
        part.put(
            "data.augment.views",
            "fresh",
            "random_crop",
            "it crops anew at every step. Without it 8 looks are kept, which is much faster.",
            "default",
        )
    _masks(part, where)
    _captions(process, part, where, trigger)
    if any(item.get("network_weight", 1) not in (1, 1.0) for item in given):
        part.lost("network_weight", "the LoRA is trained at its full strength here.")
    part.losses(LOST_DATASET)
    part.rest(IDLE_DATASET, (row.key for row in DATASET), SWALLOWED)


def _counts(process: Reading, item: Mapping[str, Any]) -> bool:
    """Whether its pictures are trained on at all."""
    count = process.read("datasets.num_repeats", item.get("num_repeats"), number)
    if count is None or count >= 1:
        return True
    folder = item.get("folder_path") or item.get("dataset_path")
    process.unused("datasets", f"{folder}: num_repeats is {count:g}, so that none of its pictures is trained on.")
    return False


def _repeats(part: Reading, trained: Sequence[Mapping[str, Any]], folders: int) -> None:
    repeats: dict[str, int] = {}
    for item in trained:
        count = part.read("num_repeats", item.get("num_repeats"), number)
        repeats[str(item.get("folder_path") or item.get("dataset_path") or "")] = 1 if count is None else int(count)
    counts = list(repeats.values())
    if folders > 1 or counts != [1]:
        part.put(
            "data.repeats",
            counts[0] if len(set(counts)) == 1 else counts,
            "num_repeats",
            kind=None if part.has("num_repeats") else "default",
        )


def _sizes(part: Reading, trained: Sequence[Mapping[str, Any]]) -> None:
    """Pictures are never enlarged there, and buckets are on unless that is said."""
    sides: list[int] = []
    for item in trained:
        given = part.read("resolution", item.get("resolution"), _values.numbers)
        sides += [int(side) for side in given or [512]]
    found = sorted(set(sides)) or [512]
    stated = None if part.has("resolution") else "default"
    if len(found) > 1:
        part.put(
            "data.buckets.resolutions",
            found,
            "resolution",
            "each picture at each of them that it is large enough for",
            stated or "converted",
        )
    else:
        part.put("data.buckets.resolution", found[0], "resolution", kind=stated)
    enabled = not part.has("buckets") or part.flag("buckets")
    if not enabled:
        part.put("data.buckets.enabled", False, "buckets")
    else:
        part.put("data.buckets.upscale", False, "buckets", "small pictures are not enlarged there", "default")
    if (step := part.whole("bucket_tolerance")) is not None:
        part.put("data.buckets.step", step, "bucket_tolerance")
    elif any(side % 64 for side in found):
        step = next((small for small in (32, 16, 8) if not any(side % small for side in found)), 8)
        part.put("data.buckets.step", step, "resolution", f"sides are no multiples of 64, but of {step}")


def _masks(part: Reading, folders: Sequence[str]) -> None:
    mask, alpha = part.text("mask_path"), part.flag("alpha_mask")
    if not (mask or alpha):
        return
    if mask and Path(mask).resolve() not in [(Path(folder) / "masks").resolve() for folder in folders]:
        part.lost(
            "mask_path",
            "put the masks into a folder masks inside the pictures' folder, under the pictures' names, and set data.masks.source = \"files\".",
        )
        return
    part.put("data.masks.source", "files" if mask else "alpha", "mask_path" if mask else "alpha_mask")
    lowest = part.number("mask_min_value")
    part.put(
        "data.masks.unmasked_weight",
        0.0 if lowest is None else lowest,
        "mask_min_value",
        kind=None if lowest is not None else "default",
    )
    part.put("data.masks.normalise", "none", "mask_path", "it takes the mean over the whole picture", "default")


def _captions(process: Reading, part: Reading, folders: Sequence[str], trigger: str | None) -> None:
    """The trigger is put in front of captions that do not have it, and in place of [trigger]."""
    extension = (part.text("caption_ext") or "txt").lstrip(".").lower()
    if extension not in ("txt", "caption"):
        part.lost("caption_ext", "captions are read from files ending in .txt, or else .caption. Rename them.")
    words = part.get("data.class_tokens")
    if trigger and isinstance(words, str) and "[trigger]" in words:
        part.put("data.class_tokens", words.replace("[trigger]", trigger), "default_caption", "[trigger] filled in")
    texts = _read_captions(folders, extension)
    holes = sum("[trigger]" in told for told in texts)
    if holes:
        part.lost(
            "folder_path",
            f"{holes} captions hold [trigger], which is text here. Put the trigger itself into the files.",
        )
    if not trigger:
        return
    having = sum(trigger.lower() in told.lower() for told in texts)
    if not texts or not having:
        note = "in front of every caption" + ("" if texts else "; take it out if captions have it already")
        process.put("data.captions.prefix", f"{trigger},", "trigger_word", note)
    elif having < len(texts) - holes:
        process.lost(
            "trigger_word",
            f"{having} of {len(texts)} captions have it, and ai-toolkit puts it in front of the others. Write it into those files.",
        )


def _read_captions(folders: Sequence[str], extension: str) -> list[str]:
    texts: list[str] = []
    for folder in folders:
        if os.path.isdir(folder):
            for path in sorted(Path(folder).glob(f"*.{extension}"))[:_MOST_CAPTIONS]:
                texts.append(path.read_text(encoding="utf-8", errors="replace")[:10_000])
    return texts
