"""Sample prompts of OneTrainer: a list of tables, in the config or in a JSON file that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorabake.base.errors import UserError
from lorabake.recipe.imports import _values
from lorabake.recipe.imports._files import read_text
from lorabake.recipe.imports._paths import beside
from lorabake.recipe.imports._prompts import Lines
from lorabake.recipe.imports._reading import Reading

_FILE, _INSIDE = "sample_definition_file_name", "samples"
_USUAL: dict[str, Any] = {
    "width": 512, "height": 512, "seed": 42, "diffusion_steps": 20, "cfg_scale": 7.0, "noise_scheduler": "DDIM",
}  # fmt: skip
"""What a sample has that does not say it."""
_UNITS = {"EPOCH": "epochs", "STEP": "steps"}


def samples(reading: Reading, model_type: str) -> None:
    """Set what is drawn while training, and how often.

    Args:
        reading: that the recipe is put into.
        model_type: as OneTrainer calls families.
    """
    inside = reading.given.get(_INSIDE)
    key = _INSIDE if isinstance(inside, list) else _FILE
    named = reading.text(_FILE)
    if key == _FILE and named is None:
        return
    if (reading.text("sample_after_unit") or "MINUTE").upper() == "NEVER":
        reading.unused(key, "sample_after_unit is NEVER: nothing is drawn.")
        return
    if key == _INSIDE:
        given = inside
    elif (given := _listed(reading, str(named))) is None:
        return
    lines = Lines(_family(model_type), "OneTrainer")
    found = [line for item in _values.tables(given) if item.get("enabled", True) and (line := _line(item, lines))]
    for option, why in lines.left.items():
        reading.left(f"{key}: {option}", why)
    if not found:
        reading.unused(key, "no sample in it is enabled and has a prompt.")
        return
    reading.put("sample.prompts", found, key, "each as a line with its values")
    _every(reading)


def _listed(reading: Reading, name: str) -> Any:
    """What the file holds; None where it is not found or is no list, which is told."""
    path = beside(reading.source, name)
    if path is None:
        reading.left(_FILE, f"{name} is not found, from the current folder or beside the config. Give sample.prompts.")
        return None
    try:
        given = json.loads(read_text(path))
    except UserError as error:
        what = str(error).removesuffix(" Nothing was written.")
    except (ValueError, RecursionError) as error:
        what = f"{path} is not valid JSON: {error}."
    else:
        if isinstance(given, list):
            return given
        what = f"{path} holds no list of samples."
    reading.left(_FILE, f"{what} Give sample.prompts.")
    return None


def _line(item: Mapping[str, Any], lines: Lines) -> str:
    """One sample as a line; "" where it has no prompt."""
    given = {**_USUAL, **{key: value for key, value in item.items() if not _values.is_nothing(value)}}
    if not str(given.get("prompt") or "").strip():
        return ""
    if _is_on(given.get("random_seed")):
        lines.left["random_seed"] = (
            "pictures of a prompt have one seed here, so that they can be compared: --d, else 0."
        )
        del given["seed"]
    if _is_on(given.get("sample_inpainting")):
        lines.left["sample_inpainting"] = "pictures are drawn from noise alone."
    told = {name: given.get(name) for name in ("prompt", "negative_prompt", "width", "height", "seed")}
    told["sample_steps"] = given["diffusion_steps"]
    told["guidance_scale" if lines.family == "flux" else "scale"] = given["cfg_scale"]
    if lines.family in ("sd", "sdxl"):  # the others' samplers are the models' own
        told["sample_sampler"] = given["noise_scheduler"]
    return lines.line(told)


def _is_on(value: Any) -> bool:
    return value is True or str(value).strip().lower() == "true"


def _every(reading: Reading) -> None:
    unit = (reading.text("sample_after_unit") or "MINUTE").upper()
    every = reading.number("sample_after") or 0
    if unit == "ALWAYS":
        reading.put("sample.every", "1 step", "sample_after_unit")
    elif unit in _UNITS and every:
        accumulation = reading.whole("gradient_accumulation_steps") or 1
        count = max(1, int(every if unit == "EPOCH" else every / accumulation))
        reading.put("sample.every", _values.span(count, _UNITS[unit]), "sample_after", "with its unit")
    elif reading.has("sample_after_unit"):
        reading.left(
            "sample_after",
            "samples are drawn by epochs or steps here: sample.every. Without it, with every checkpoint.",
        )


def _family(model_type: str) -> str:
    """The base's family, as far as samples go by it."""
    if model_type.startswith("FLUX"):
        return "flux"
    if model_type.startswith("STABLE_DIFFUSION_XL"):
        return "sdxl"
    if model_type.startswith("STABLE_DIFFUSION_3"):
        return "sd3"
    return "sd" if model_type.startswith("STABLE_DIFFUSION") else "other"
