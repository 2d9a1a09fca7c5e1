"""What sd-scripts does to need less memory, as ours: weights in few bits, and blocks that wait in main memory."""

from __future__ import annotations

from lorabake.recipe.imports._reading import Reading

FEWEST = 3
"""Blocks that wait, where any do: two of them are on the card at any time."""
_SPLIT_MODE = 18
"""What sd-scripts takes for its old ``split_mode``."""
_MOST = {"flux": 35, "sd3": 36}
"""The most that sd-scripts takes: it leaves two blocks of a kind on the card."""
_MOST_OF_SMALLER_SD3 = 22


def memory(reading: Reading, family: str) -> None:
    """Set the types of weights and where they wait."""
    for key in ("fp8_base", "fp8_base_unet"):
        if reading.flag(key):
            reading.put("model.quantize", "fp8", key)
    _swapping(reading, family)


def ours_of(count: int, family: str) -> int:
    """Blocks that wait for a ``blocks_to_swap`` of theirs: for Flux half of them are double blocks, and each of the others is two single ones."""
    return 2 * count - count // 2 if family == "flux" else count


def theirs_of(count: int, family: str, base: str) -> int:
    """The ``blocks_to_swap`` for which about as many wait, of those that it takes."""
    smaller = family == "sd3" and "large" not in base.lower()
    return min(2 * count // 3 if family == "flux" else count, _MOST_OF_SMALLER_SD3 if smaller else _MOST[family])


def _most_of(family: str, base: str) -> int:
    """The most that sd-scripts takes for a base that may be the larger one, if its name does not tell it."""
    return _MOST_OF_SMALLER_SD3 if family == "sd3" and "medium" in base.lower() else _MOST[family]


def _swapping(reading: Reading, family: str) -> None:
    key, setting = "blocks_to_swap", "train.blocks_to_swap"
    given = reading.whole(key)
    if reading.flag("split_mode") and given is None:
        key, given = "split_mode", _SPLIT_MODE
    if not given:
        return
    if family not in _MOST:
        reading.unused(key, f"sd-scripts does not look at it for {family}.")
        return
    most = _most_of(family, str(reading.get("model.base")))
    count = ours_of(min(given, most), family)
    if reading.get("adapter.name") == "full":
        reading.left(key, "all weights are trained, and must stay on the card.")
        return
    if count < FEWEST:
        reading.left(key, f"two blocks are on the card at any time here, so that fewer than {FEWEST} save nothing.")
        return
    doubles = min(given, most) // 2
    kinds = f"{doubles} double and {count - doubles} single blocks" if family == "flux" else ""
    stops = f"sd-scripts would stop with an error: it takes {most} at most" if given > most else ""
    reading.put(setting, count, key, "; ".join(filter(None, (kinds, stops))))
    if not reading.get("train.gradient_checkpointing"):
        told = "converted" if reading.has("gradient_checkpointing") else "default"
        note = "blocks that come and go must be recomputed; the result is the same"
        reading.put("train.gradient_checkpointing", True, "gradient_checkpointing", note, told)
