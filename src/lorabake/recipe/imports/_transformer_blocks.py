"""Ranks and learning rates by layer of Flux and SD3, which sd-scripts has as network arguments of its own, as patterns of layer names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorabake.base.patterns import decide
from lorabake.recipe.imports import _values
from lorabake.recipe.imports._layer_names import FLUX_BLOCKS, Named, flux_layers
from lorabake.recipe.imports._reading import Reading


@dataclass(frozen=True, slots=True)
class _Family:
    """The arguments of a family's network."""

    types: Mapping[str, str]
    """Rank of one kind of layer: pattern by argument."""
    choices: Mapping[str, tuple[str, int]]
    """Which blocks are trained: what their names begin with and how many there are, by argument."""
    others: str
    """Ranks of what is around the blocks, which is not trained here."""


_FAMILIES = {
    "flux": _Family(
        {
            "img_attn_dim": "img_attn", "txt_attn_dim": "txt_attn", "img_mlp_dim": "img_mlp", "txt_mlp_dim": "txt_mlp",
            "img_mod_dim": "img_mod", "txt_mod_dim": "txt_mod", "single_dim": r"single_blocks_\d+_linear", "single_mod_dim": "modulation",
        },
        {"train_double_block_indices": ("double_blocks", FLUX_BLOCKS["double_blocks"]),
         "train_single_block_indices": ("single_blocks", FLUX_BLOCKS["single_blocks"])},
        "in_dims",
    ),
    "sd3": _Family(
        {
            "context_attn_dim": "context_block_attn", "context_mlp_dim": "context_block_mlp", "context_mod_dim": "context_block_adaLN_modulation",
            "x_attn_dim": "x_block_attn", "x_mlp_dim": "x_block_mlp", "x_mod_dim": "x_block_adaLN_modulation",
        },
        {"train_block_indices": ("joint_blocks", 38)},
        "emb_dims",
    ),
}  # fmt: skip
_OF_FLUX = ("train_blocks", "network_reg_dims")
REG_LRS = "network_reg_lrs"
_LAST_BLOCK = 998
"""No number of a block is larger."""
_SMALLER_SD3 = 24
"""Blocks of SD3 medium and SD3.5 medium."""


def ranks(reading: Reading, arguments: dict[str, Any], family: str, rank: int) -> dict[str, Any]:
    """Take the arguments by layer out of the network arguments, and set the ranks that they say.

    Args:
        reading: that the recipe is put into.
        arguments: of the network.
        family: as the config's program has it.
        rank: of other layers.

    Returns:
        The argument that learning rates are made from.
    """
    known = _FAMILIES.get(family)
    if known is None or reading.text("network_module") != f"networks.lora_{family}":
        return {}
    names = (*known.types, *known.choices, known.others, *(_OF_FLUX if family == "flux" else ()))
    given = {name: arguments.pop(name) for name in names if name in arguments}
    rates = {REG_LRS: arguments.pop(REG_LRS)} if family == "flux" and REG_LRS in arguments else {}
    if reading.flag("network_train_text_encoder_only"):
        for name in (*given, *rates):
            reading.unused(f"network_args: {name}", "the denoiser is not trained.")
        return {}
    try:
        table = _table(reading, known, given, rank)
    except (ValueError, re.error) as error:
        reading.lost(f"network_args: {', '.join(given)}", f"a value in it {error}: sd-scripts stops with an error.")
        return rates
    used = ", ".join(name for name in given if name != known.others)
    if table:
        reading.put("adapter.block_rank", table, f"network_args: {used}", "as patterns of layer names")
    alpha = reading.number("network_alpha")
    if alpha != 0 and any(found not in (0, rank) for found in table.values()):
        strengths = {pattern: 1.0 if alpha is None else alpha for pattern, found in table.items() if found}
        what = "layers of other ranks are scaled by network_alpha / rank of each"
        reading.put("adapter.block_alpha", strengths, f"network_args: {used}", what)
    return rates


def _table(reading: Reading, family: _Family, given: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Ranks by pattern, in the order in which sd-scripts looks: layers that are left out, by expression, by block, by kind."""
    table: dict[str, int] = {}
    blocks = str(given.get("train_blocks") or "all")
    if blocks in ("single", "double"):
        table["double_blocks_" if blocks == "single" else "single_blocks_"] = 0
    for pattern, value in pairs(given.get("network_reg_dims")).items():
        if any(re.search(pattern, layer.names[0]) for layer in flux_layers()):
            table[pattern] = _values.whole(value)
        else:
            reading.unused("network_args: network_reg_dims", f"{pattern} is in no name of a layer.")
    for name, (prefix, count) in family.choices.items():
        if given.get(name) is not None and (pattern := _unchosen(reading, given[name], prefix, count)):
            table[pattern] = 0
    for name, pattern in family.types.items():
        if not _values.is_nothing(given.get(name)) and (own := _values.whole(given[name])) != rank:
            table[pattern] = own
    around = given.get(family.others)
    if not _values.is_nothing(around) and any(_values.numbers(around)):
        reading.lost(
            f"network_args: {family.others}", "layers in front of the blocks and behind them are not trained here."
        )
    return table


def _unchosen(reading: Reading, value: Any, prefix: str, count: int) -> str:
    """A pattern of the blocks that are not chosen by ``0-3,5``, ``all`` or ``none``; "" where all are.

    Raises:
        ValueError: it is no such choice.
    """
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()
    if text == "all":
        return ""
    chosen: set[int] = set()
    for piece in text.split(",") if text not in ("", "none") else ():
        first, _, last = (part.strip() for part in piece.partition("-"))
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) > _LAST_BLOCK:
            raise ValueError(f"'{_values.shown(piece)}' is no number of a block and no span of them")
        chosen |= set(range(int(first), int(last or first) + 1))
    base = str(reading.get("model.base") or "").lower()
    whole = count if prefix != "joint_blocks" or "large" in base else _SMALLER_SD3
    if chosen >= set(range(whole)):
        return ""
    return rf"{prefix}_(?!({'|'.join(map(str, sorted(chosen)))})_)" if chosen else f"{prefix}_"


def pairs(value: Any) -> dict[str, str]:
    """``"img_attn=4,single=8"`` by pattern. What is no pair is left out, as there."""
    if _values.is_nothing(value):
        return {}
    found = (piece.strip().partition("=") for piece in str(value).split(","))
    return {pattern.strip(): number.strip() for pattern, equals, number in found if equals}


def rates(reading: Reading, value: Any) -> None:
    """Set what ``network_reg_lrs`` says: learning rates by expression, which take the place of a part's own."""
    key = f"network_args: {REG_LRS}"
    factors: dict[str, float] = {}
    none: dict[str, int] = {}
    left = list(flux_layers())
    for pattern, text in pairs(value).items():
        try:
            rate, expression = _values.number(text), re.compile(pattern)
        except (ValueError, re.error):
            reading.unused(key, f"{pattern}={text}: sd-scripts leaves it out, as no number belongs to an expression.")
            continue
        every = [layer for layer in flux_layers() if expression.search(layer.names[0])]
        first = [layer for layer in every if layer in left]
        left = [layer for layer in left if layer not in first]
        bases = {base for layer in first if (base := _base(reading, layer))}
        if not bases:
            reading.unused(key, f"{pattern}: no layer that is trained has it in its name.")
        elif rate == 0 and len(first) < len(every):
            reading.lost(
                key, f"{pattern}=0 leaves out only those that no expression before it has. Give adapter.block_rank."
            )
        elif rate == 0:
            none[pattern] = 0
        elif len(bases) > 1:
            reading.lost(
                key,
                f"{pattern} is in names of parts with rates of their own, and a recipe has factors on those. Give optimizer.block_lr.",
            )
        else:
            factors[pattern] = rate / bases.pop()
    if factors:
        reading.put("optimizer.block_lr", factors, key, "each / the part's own rate")
    if none:
        reading.put(
            "adapter.block_rank",
            {**none, **(reading.get("adapter.block_rank") or {})},
            key,
            "a rate of 0 leaves a layer out",
        )


def _base(reading: Reading, layer: Named) -> float:
    """The rate of the part that a layer is in; 0 if it is not trained."""
    if decide(reading.get("adapter.block_rank"), layer.names) == 0:
        return 0.0
    text = reading.get("optimizer.text_encoder_lr")
    found = (text[0] if isinstance(text, list) else text) if layer.kind == "text" else reading.get("optimizer.lr")
    return float(found or 0.0)
