"""Ranks and learning rates by layer, which a recipe gives as patterns of layer names, as sd-scripts' lists by block or expressions."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorabake.base.errors import UserError
from lorabake.base.patterns import decide, idle
from lorabake.families import inspect_model
from lorabake.recipe.exports._writing import Writing
from lorabake.recipe.imports._layer_names import UNETS, Name, Named, flux_layers, unet_layers
from lorabake.recipe.imports.kohya import is_sdxl_name

_RANKS, _ALPHAS, _RATES = "adapter.block_rank", "adapter.block_alpha", "optimizer.block_lr"
_UNTOLD = "whether the base is SD or SDXL, whose blocks are not the same, is told neither by a file nor by its name."


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What says the rank and alpha of a layer."""

    rank: int
    alpha: float | None
    conv_rank: int | None
    conv_alpha: float | None
    stabilized: bool
    table: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, layer: Named) -> int:
        """0 for a layer that is left alone."""
        chosen = decide(self.table, layer.names)
        if chosen is not None:
            return chosen
        return self.usual(layer) or 0

    def usual(self, layer: Named) -> int | None:
        """Its rank without the table; None if it is left alone."""
        if layer.kind in ("resnet", "convolution") and self.conv_rank is None:
            return None
        return self.conv_rank if layer.kind == "convolution" else self.rank

    def alpha_of(self, layer: Named) -> float:
        """Its alpha, as files have it."""
        rank, chosen = self.rank_of(layer), decide(self.alphas, layer.names)
        if chosen is None:
            return self.alpha_at(rank, convolution=layer.kind == "convolution")
        return chosen * (math.sqrt(rank) if self.stabilized else 1.0)

    def tables(self) -> list[str]:
        """The settings of its own that there are."""
        return [setting for setting, table in ((_RANKS, self.table), (_ALPHAS, self.alphas)) if table]

    def alpha_at(self, rank: int, *, convolution: bool) -> float:
        """As files have it: scaled along with the rank."""
        usual, alpha = (self.conv_rank, self.conv_alpha) if convolution else (self.rank, self.alpha)
        scale = 1.0 if alpha is None or not usual else alpha / usual
        return scale * (rank or usual or 1) * (math.sqrt(rank or usual or 1) if self.stabilized else 1.0)


def blocks(writing: Writing, family: str, lr: float, trains_text: bool) -> list[str]:
    """Network arguments for the tables by pattern. What they cannot say is told.

    Args:
        writing: added to.
        family: ``sd`` (with SDXL), ``sd3`` or ``flux``.
        lr: the denoiser's learning rate.
        trains_text: whether text encoders are trained.
    """
    ranks, alphas, rates = (writing.get(setting) or {} for setting in (_RANKS, _ALPHAS, _RATES))
    adapter = _Adapter(
        writing.get("adapter.rank") or 4,
        writing.get("adapter.alpha"),
        writing.get("adapter.conv_rank"),
        writing.get("adapter.conv_alpha"),
        bool(writing.get("adapter.rank_stabilized")),
        ranks,
        alphas,
    )
    tables = [*adapter.tables(), *([_RATES] if rates else [])]
    if not tables:
        return []
    if family == "flux":
        return _expressions(writing, adapter, rates, lr, trains_text)
    name = _unet(writing, ranks, alphas, rates) if family == "sd" else None
    if name is None:
        for setting in tables:
            writing.lost(setting, _UNTOLD if family == "sd" else "sd-scripts has no such setting for SD3.")
        return []
    layers = [layer for layer in unet_layers(name) if trains_text or layer.kind != "text"]
    return [*_rates(writing, name, adapter, rates, layers), *_ranks(writing, name, adapter, layers)]


def _unet(writing: Writing, *tables: Mapping[str, Any]) -> Name | None:
    """Whose blocks the lists have to count: as the model's file says, or its name, or the patterns."""
    base = str(writing.get("model.base"))
    if base != "pocket" and os.path.exists(base):
        try:
            family = inspect_model(base).family
        except UserError:
            family = ""
        for name in UNETS:
            if family == name:
                return name
    if is_sdxl_name(base):
        return "sdxl"
    fitting: list[Name] = [
        name for name in UNETS if not any(idle(table, _names(unet_layers(name))) for table in tables)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _names(layers: Iterable[Named]) -> list[tuple[str, str]]:
    return [layer.names for layer in layers]


# ---- SD and SDXL: lists by block ----


def _rates(
    writing: Writing, name: Name, adapter: _Adapter, rates: Mapping[str, float], layers: Sequence[Named]
) -> list[str]:
    if not rates:
        return []
    unet = UNETS[name]
    by_block: dict[int, set[float]] = {}
    for layer in layers:
        if adapter.rank_of(layer):
            factor = decide(rates, layer.names)
            by_block.setdefault(layer.block, set()).add(1.0 if factor is None else float(factor))
    if by_block.pop(-1, {1.0}) != {1.0}:
        writing.lost(_RATES, "sd-scripts has factors for blocks of the U-Net alone, none for layers of text encoders.")
        return []
    if any(len(found) > 1 for found in by_block.values()):
        writing.lost(
            _RATES, "sd-scripts has one factor for each block of the U-Net, and layers in a block differ here."
        )
        return []
    factors = [by_block[place].pop() if place in by_block else 1.0 for place in range(unet.count)]
    parts = {
        "down_lr_weight": factors[unet.ends : unet.before_middle],
        "mid_lr_weight": factors[unet.before_middle : unet.before_up],
        "up_lr_weight": factors[unet.before_up : unet.before_up + unet.side],
    }
    writing.say("converted", _RATES, "network_args", ", ".join(parts), f"by the blocks of {unet.title}")
    return [f"{part}={_joined(found)}" for part, found in parts.items()]


def _ranks(writing: Writing, name: Name, adapter: _Adapter, layers: Sequence[Named]) -> list[str]:
    settings = adapter.tables()
    if not settings:
        return []

    def lost(why: str) -> list[str]:
        for setting in settings:
            writing.lost(setting, why)
        return []

    unet, own = UNETS[name], (adapter.rank, adapter.alpha_at(adapter.rank, convolution=False))
    linear: dict[int, set[tuple[int, float]]] = {}
    spatial: dict[int, set[tuple[int, float]]] = {}
    for layer in layers:
        convolution = layer.kind == "convolution"
        rank = adapter.rank_of(layer)
        has = rank, adapter.alpha_of(layer) if rank else adapter.alpha_at(0, convolution=convolution)
        if layer.kind == "text" and has != own:
            return lost("sd-scripts has ranks for blocks of the U-Net alone, none for layers of text encoders.")
        if rank and adapter.usual(layer) is None:
            return lost(
                "sd-scripts trains convolutions and residual blocks in all blocks or in none: give adapter.conv_rank."
            )
        if layer.kind != "text" and adapter.usual(layer) is not None:
            (spatial if convolution else linear).setdefault(layer.block, set()).add(has)
    if any(len(found) > 1 for found in (*linear.values(), *spatial.values())):
        return lost(
            "sd-scripts has one rank and one alpha for each block of the U-Net, and layers in a block differ here."
        )
    pairs = [linear[place].pop() if place in linear else own for place in range(unet.count)]
    told = [f"block_dims={_joined(rank for rank, _ in pairs)}", f"block_alphas={_joined(alpha for _, alpha in pairs)}"]
    if adapter.conv_rank is not None:
        usual = adapter.conv_rank, adapter.alpha_at(adapter.conv_rank, convolution=True)
        conv = [spatial[place].pop() if place in spatial else usual for place in range(unet.count)]
        told.append(f"conv_block_dims={_joined(rank for rank, _ in conv)}")
        told.append(f"conv_block_alphas={_joined(alpha for _, alpha in conv)}")
    keys = ", ".join(argument.partition("=")[0] for argument in told)
    for setting in settings:
        writing.say("converted", setting, "network_args", keys, f"by the blocks of {unet.title}")
    return told


def _joined(values: Iterable[float]) -> str:
    return ",".join(map(repr, values))


# ---- Flux: expressions ----


def _expressions(
    writing: Writing, adapter: _Adapter, rates: Mapping[str, float], lr: float, trains_text: bool
) -> list[str]:
    """``network_reg_dims`` and ``network_reg_lrs``: the first expression that is found in a layer's key decides, as here."""
    layers = [layer for layer in flux_layers() if trains_text or layer.kind != "text"]
    found: list[str] = []
    keys = _as_keys(writing, _RANKS, adapter.table, layers) if adapter.table else {}
    if keys:
        found.append(
            f"network_reg_dims={','.join(f'{keys[pattern]}={rank}' for pattern, rank in adapter.table.items())}"
        )
        writing.say("converted", _RANKS, "network_args", "network_reg_dims", "expressions of the layers' keys")
    theirs = adapter.alpha_at(adapter.rank, convolution=False)
    if all(math.isclose(adapter.alpha_of(layer), theirs) for layer in layers if adapter.rank_of(layer)):
        if adapter.alphas:
            writing.say(
                "converted", _ALPHAS, "network_alpha", theirs, "divided by the rank of each layer, there as here"
            )
    elif keys or adapter.alphas:
        what = (
            "sd-scripts scales every layer by network_alpha / its rank, and alpha is not the same for all layers here."
        )
        writing.lost(adapter.tables()[-1], what)
    text = {factor for layer in layers if layer.kind == "text" if (factor := decide(rates, layer.names)) is not None}
    if rates and text:
        writing.lost(_RATES, "sd-scripts has rates by expression, and these are factors on those of several parts.")
    elif rates and (keys := _as_keys(writing, _RATES, rates, layers)):
        found.append(
            f"network_reg_lrs={','.join(f'{keys[pattern]}={lr * factor!r}' for pattern, factor in rates.items())}"
        )
        writing.say("converted", _RATES, "network_args", "network_reg_lrs", f"each × {lr:g}, which is optimizer.lr")
    return found


def _as_keys(writing: Writing, setting: str, table: Mapping[str, Any], layers: Sequence[Named]) -> dict[str, str]:
    """For each pattern an expression that decides for the same layers by their keys alone; empty if there is none, which is told."""
    found = {pattern: _as_key(pattern, layers) for pattern in table}
    keys = {expression: table[pattern] for pattern, expression in found.items() if expression is not None}
    same = all(decide(table, layer.names) == decide(keys, layer.names[:1]) for layer in layers)
    if len(keys) == len(table) and same:
        return {pattern: expression for pattern, expression in found.items() if expression is not None}
    writing.lost(
        setting,
        "sd-scripts looks for expressions in keys such as lora_unet_double_blocks_0_img_attn_qkv, without commas: give such patterns.",
    )
    return {}


def _as_key(pattern: str, layers: Sequence[Named]) -> str | None:
    """The pattern itself, or with underscores for its dots, if it is found in the same layers' keys."""
    wanted = [any(re.search(pattern, name) for name in layer.names) for layer in layers]
    for expression in (pattern, pattern.replace(r"\.", "_").removeprefix("denoiser_"), pattern.replace(".", "_")):
        if "," in expression or "=" in expression or expression != expression.strip():
            continue
        try:
            if [bool(re.search(expression, layer.names[0])) for layer in layers] == wanted:
                return expression
        except re.error:
            continue
    return None
