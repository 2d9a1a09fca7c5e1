"""Ranks and learning rates by block of a U-Net, which sd-scripts gives as lists and a recipe as patterns of layer names.

Blocks are those of the original U-Net: 12 in, 1 in the middle, 12 out for SD; 9, 3 and 9 for SDXL, of which LoRA's lists have 23 with the
embeddings in front and the output behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._reading import Reading

Pattern = str
Layout = tuple[list[Pattern], list[Pattern], list[Pattern]]
"""Patterns of the blocks in, in the middle and out; "" for a block that has no layer which is trained."""


def layout(stages: int, down: Sequence[int], up: Sequence[int], middle: int, convolutions: bool) -> Layout:
    """The blocks of a U-Net.

    Args:
        stages: resolutions.
        down, up: stages that have attention.
        middle: blocks that the lists count in the middle.
        convolutions: whether residual blocks and resamplers are trained too.
    """
    blocks_in = ["", *(pattern for stage in range(stages) for pattern in _down(stage, stage in down, convolutions))]
    blocks_out = [
        pattern for stage in range(stages) for pattern in _up(stage, stage in up, convolutions, stage == stages - 1)
    ]
    each = [r"mid_block\.resnets\.0\.", r"mid_block\.attentions\.0\.", r"mid_block\.resnets\.1\."]
    between = ["mid_block"] if middle == 1 else each if convolutions else ["", each[1], ""]
    return blocks_in[: 3 * stages], between, blocks_out


def _down(stage: int, attention: bool, convolutions: bool) -> list[Pattern]:
    """Two residual blocks with their attention, and the resampler as a block of its own."""
    found = [_block("down", stage, block, attention, convolutions) for block in range(2)]
    return [*found, rf"down_blocks\.{stage}\.downsamplers\." if convolutions else ""]


def _up(stage: int, attention: bool, convolutions: bool, last: bool) -> list[Pattern]:
    """Three residual blocks with their attention; the resampler counts to the third."""
    found = [_block("up", stage, block, attention, convolutions) for block in range(3)]
    if convolutions and not last:
        found[2] = rf"up_blocks\.{stage}\.((resnets|attentions)\.2|upsamplers)\."
    return found


def _block(side: str, stage: int, block: int, attention: bool, convolutions: bool) -> Pattern:
    if convolutions:
        return rf"{side}_blocks\.{stage}\.(resnets|attentions)\.{block}\."
    return rf"{side}_blocks\.{stage}\.attentions\.{block}\." if attention else ""


def layouts(convolutions: bool) -> tuple[Layout, Layout]:
    """SD's (12, 1 and 12 blocks) and SDXL's (9, 3 and 9)."""
    return layout(4, (0, 1, 2), (1, 2, 3), 1, convolutions), layout(3, (1, 2), (0, 1), 3, convolutions)


def weights(reading: Reading, arguments: dict[str, Any], rank: int, alpha: float) -> None:
    """Take the lists by block out of the network arguments, and set what they say."""
    lists = {name: arguments.pop(name, None) for name in ("down_lr_weight", "mid_lr_weight", "up_lr_weight")}
    if any(not _values.is_nothing(value) for value in lists.values()):
        _rates(reading, lists)
    dims, alphas = arguments.pop("block_dims", None), arguments.pop("block_alphas", None)
    if not _values.is_nothing(dims):
        _ranks(reading, dims, alphas, rank, alpha)
    elif not _values.is_nothing(alphas):
        reading.lost(
            "network_args: block_alphas", "here alpha goes along with a block's rank. Give adapter.block_rank."
        )


def _rates(reading: Reading, lists: Mapping[str, Any]) -> None:
    try:
        read = {name: _values.numbers(value) for name, value in lists.items() if not _values.is_nothing(value)}
    except ValueError:
        what = "a curve by name is not known here. Write its factors to optimizer.block_lr."
        reading.lost(
            "network_args: " + " ".join(name for name, value in lists.items() if not _values.is_nothing(value)), what
        )
        return
    blocks = _blocks_of(read, layouts(reading.get("adapter.conv_rank") is not None))
    key = "network_args: " + ", ".join(read)
    if blocks is None:
        counts = ", ".join(f"{len(found)} in {name}" for name, found in read.items())
        reading.lost(
            key, f"{counts}: SD has 12, 1 and 12 blocks, SDXL 9, 3 and 9. Write the factors to optimizer.block_lr."
        )
        return
    factors, none = {}, {}
    for part, patterns in zip(("down", "mid", "up"), blocks, strict=True):
        for pattern, factor in zip(patterns, read.get(f"{part}_lr_weight", []), strict=False):
            if pattern and factor == 0:
                none[pattern] = 0
            elif pattern and factor != 1:
                factors[pattern] = factor
    if factors:
        reading.put("optimizer.block_lr", factors, key, "blocks as patterns of layer names")
    if none:
        reading.put("adapter.block_rank", none, key, "a rate of 0 leaves a block out")


def _blocks_of(read: Mapping[str, Sequence[float]], known: Sequence[Layout]) -> Layout | None:
    for blocks in known:
        of: dict[str, list[Pattern]] = dict(zip(("down", "mid", "up"), blocks, strict=True))
        if all(len(found) == len(of[name.partition("_")[0]]) for name, found in read.items()):
            return blocks
    return None


def _ranks(reading: Reading, dims: Any, alphas: Any, rank: int, alpha: float) -> None:
    key = "network_args: block_dims"
    try:
        ranks = [_values.whole(item) for item in _values.numbers(dims)]
        scales = [] if _values.is_nothing(alphas) else _values.numbers(alphas)
    except ValueError as error:
        reading.lost(key, f"{_values.shown(dims)} {error}.")
        return
    sd, sdxl = layouts(reading.get("adapter.conv_rank") is not None)
    blocks = {25: sd, 23: sdxl}.get(len(ranks))
    if blocks is None:
        reading.lost(key, f"{len(ranks)} numbers: SD has 25 blocks, SDXL 23. Write them to adapter.block_rank.")
        return
    patterns = [pattern for part in blocks for pattern in part]
    patterns = patterns if len(patterns) == len(ranks) else ["", *patterns, ""]
    told = {pattern: found for pattern, found in zip(patterns, ranks, strict=True) if pattern and found != rank}
    reading.put("adapter.block_rank", told, key, "blocks as patterns of layer names")
    of_each = scales or [alpha] * len(ranks)
    if any(
        found and not math.isclose(scale / found, alpha / rank) for scale, found in zip(of_each, ranks, strict=False)
    ):
        what = f"each block has a scale of its own; here all have alpha / rank = {alpha:g} / {rank}."
        reading.lost("network_args: block_alphas", what)
