"""Ranks and learning rates by block of a U-Net, which sd-scripts gives as lists and a recipe as patterns of layer names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._layer_names import UNETS, UNet
from lorabake.recipe.imports._reading import Reading

RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
KEYS = (*RATES, "block_lr_zero_threshold", *LISTS)
"""Network arguments that this module takes."""
_MODULES = ("networks.lora", "networks.lora_fa")
"""Network modules that look at them."""
_CURVES = ("cosine", "sine", "linear", "reverse_linear", "zeros")


@dataclass(frozen=True, slots=True)
class Usual:
    """What layers of other blocks have."""

    rank: int
    alpha: float
    conv_rank: int | None
    conv_alpha: float


def weights(reading: Reading, arguments: dict[str, Any], family: str, rank: int, alpha: float) -> None:
    """Take the lists by block out of the network arguments, and set what they say.

    Args:
        reading: that the recipe is put into; adapter.conv_rank is set where convolutions are trained.
        arguments: of the network.
        family: as the config's program has it, where the lists' lengths do not tell it.
        rank, alpha: of linear layers.
    """
    found = {name: arguments.pop(name, None) for name in KEYS}
    given = {name: value for name, value in found.items() if not _values.is_nothing(value)}
    if not given:
        return
    key, module = f"network_args: {', '.join(given)}", reading.text("network_module") or _MODULES[0]
    if idle := _why_idle(reading, given, family, module):
        reading.unused(key, idle)
        return
    try:
        lists = {
            name: [_whole_or_number(name, item) for item in _values.numbers(given[name])]
            for name in LISTS
            if name in given
        }
        read = {name: _factors(name, given[name]) for name in RATES if name in given}
        threshold = _values.number(given.get("block_lr_zero_threshold", 0.0))
    except ValueError as error:
        reading.lost(key, f"a value in it {error}: sd-scripts stops with an error.")
        return
    unet = _unet_of(lists, read, family)
    if wrong := [f"{len(found)} in {name}" for name, found in lists.items() if len(found) != unet.count]:
        sizes = f"it takes {UNETS['sd'].count} for SD and {UNETS['sdxl'].count} for SDXL"
        reading.lost(key, f"sd-scripts stops with an error: {', '.join(wrong)}, and {sizes}.")
        return
    if "conv_block_alphas" in lists and "conv_block_dims" not in lists:
        del lists["conv_block_alphas"]
        reading.unused("network_args: conv_block_alphas", "there is no conv_block_dims.")
    factors = _by_block(reading, unet, read, threshold) if read else [1.0] * unet.count
    told = f"network_args: {', '.join(lists or read)}"
    trained = _ranks(reading, unet, lists, factors, _usual(reading, unet, lists, rank, alpha), told)
    table = {pattern: factor for pattern, factor in zip(trained, factors, strict=True) if pattern and factor != 1}
    told = f"network_args: {', '.join(read)}"
    convolutions = reading.get("adapter.conv_rank") is not None
    if table:
        reading.put("optimizer.block_lr", table, told, f"{unet.title}'s blocks as patterns of layer names")
    elif read and 0 not in factors:
        reading.say("same", told, "optimizer.block_lr", None, "all blocks have the usual rate")
    elif read and not any(
        pattern and factor == 0 for pattern, factor in zip(unet.patterns(convolutions), factors, strict=True)
    ):
        reading.unused(told, "those blocks have no layers that are trained.")
    elif read and lists:
        reading.say("converted", told, "adapter.block_rank", None, "a rate of 0 leaves a block out")


def _why_idle(reading: Reading, given: Mapping[str, Any], family: str, module: str) -> str:
    """Why the lists do nothing; "" if they do something."""
    if family not in UNETS or module not in _MODULES:
        return f"{module} does not look at it."
    if reading.flag("network_train_text_encoder_only"):
        return "the U-Net is not trained."
    if not {"block_dims", *RATES} & given.keys():
        return "sd-scripts looks at it beside block_dims, down_lr_weight, mid_lr_weight or up_lr_weight alone."
    return ""


def _whole_or_number(name: str, value: float) -> float:
    return _values.whole(value) if name.endswith("dims") else value


def absolute(reading: Reading, lr: float) -> None:
    """``block_lr`` of sdxl_train.py: 23 rates, which take the place of learning_rate.

    Args:
        reading: that the recipe is put into.
        lr: the denoiser's rate, which a recipe's factors are on.
    """
    unet, key = UNETS["sdxl"], "block_lr"
    rates = reading.take(key, _values.numbers)
    if rates is None:
        return
    if reading.has("network_module"):
        reading.unused(
            key,
            "it is for sdxl_train.py, which trains all weights. For a LoRA: network_args' down_lr_weight, mid_lr_weight, up_lr_weight.",
        )
    elif len(rates) != unet.count:
        reading.lost(
            key, f"sd-scripts stops with an error: it has {len(rates)} numbers, and SDXL has {unet.count} blocks."
        )
    elif lr == 0:
        reading.unused(key, "the U-Net is not trained: learning_rate is 0.")
    else:
        patterns = unet.patterns(reading.get("adapter.conv_rank") is not None)
        factors = {pattern: rate / lr for pattern, rate in zip(patterns, rates, strict=True) if pattern}
        others = ((pattern, factor) for pattern, factor in factors.items() if factor not in (0, 1))
        _put(reading, "optimizer.block_lr", others, key, f"each / {lr:g}, which is optimizer.lr")
        none = ((pattern, 0) for pattern, factor in factors.items() if factor == 0)
        _put(reading, "adapter.block_rank", none, key, "a rate of 0 leaves a block out")
        reading.warnings.append(
            "block_lr is for sdxl_train.py, which trains all weights; the recipe trains a LoRA. For all weights: adapter.name = 'full'."
        )


def _put(reading: Reading, setting: str, pairs: Iterable[tuple[str, float]], key: str, note: str) -> None:
    if table := dict(pairs):
        reading.put(setting, {**(reading.get(setting) or {}), **table}, key, note)


# ---- learning rates ----


def _factors(name: str, value: Any) -> str | list[float]:
    """Numbers, of which empty ones are 0, or a curve by name, which blocks in the middle have not."""
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, list | tuple):
        return [_values.number(item) for item in value]
    text = str(value).strip()
    if name != "mid_lr_weight" and "," not in text and not text[:1].isdigit() and not text.startswith((".", "-")):
        return text
    return [_values.number(item) if item.strip() else 0.0 for item in text.split(",")]


def _by_block(reading: Reading, unet: UNet, read: Mapping[str, str | list[float]], threshold: float) -> list[float]:
    """The factors for all blocks: lists that are too short go on with 1, and of longer ones the end is left out."""
    found: list[float] = []
    for name, count in zip(RATES, (unet.side, unet.between, unet.side), strict=True):
        given = read.get(name)
        if given is None:
            found += [1.0] * count
            continue
        if isinstance(given, str) or (len(given) == 1 and name != "mid_lr_weight"):
            curve = _curve(given, count) if isinstance(given, str) else None
            if curve is None:
                what = f"it is none of {', '.join(_CURVES)}: sd-scripts says so, and takes 1 for all blocks or stops."
                reading.unused(f"network_args: {name}", what)
                found += [1.0] * count
                continue
            given = curve
        if len(given) != count:
            does = "goes on with 1" if len(given) < count else "leaves out the rest"
            what = (
                f"{len(given)} numbers for {count} blocks of {unet.title}: sd-scripts {does}, and so does the recipe."
            )
            reading.warnings.append(f"network_args: {name}: {what}")
        whole = (given + [1.0] * count)[:count]
        found += [factor if factor > threshold else 0.0 for factor in whole]
    return [*[1.0] * unet.ends, *found, *[1.0] * unet.ends]


def _curve(text: str, count: int) -> list[float] | None:
    """A curve over the blocks of a side, with ``+x`` raised by x; None if there is none of that name."""
    name, _, more = text.partition("+")
    try:
        base = _values.number(more) if more else 0.0
    except ValueError:
        return None
    places = [place / (count - 1) for place in range(count)]
    rising = {
        "sine": [math.sin(math.pi * place / 2) for place in places],
        "linear": places,
        "zeros": [0.0] * count,
    }
    known = {**rising, "cosine": rising["sine"][::-1], "reverse_linear": places[::-1]}
    return [value + base for value in known[name]] if name in known else None


def _unet_of(lists: Mapping[str, Sequence[float]], read: Mapping[str, str | list[float]], family: str) -> UNet:
    """Which U-Net the lists are for: as their lengths say, else as the config does."""
    counts = {len(found) for found in lists.values()}
    for name, unet in UNETS.items():
        if unet.count in counts:
            return unet
        sides = {"down_lr_weight": unet.side, "mid_lr_weight": unet.between, "up_lr_weight": unet.side}
        whole = [len(found) == sides[part] for part, found in read.items() if not isinstance(found, str)]
        if not counts and whole and all(whole) and not (set(read) == {"mid_lr_weight"} and name != family):
            return unet
    return UNETS["sdxl" if family == "sdxl" else "sd"]


# ---- ranks ----


def _ranks(
    reading: Reading, unet: UNet, lists: Mapping[str, Sequence[float]], factors: Sequence[float], usual: Usual, key: str
) -> list[str]:
    """Set the ranks; for each block the pattern of its layers, "" for one without layers that are trained."""
    convolutions = usual.conv_rank is not None
    dims = [int(rank) for rank in lists.get("block_dims", [usual.rank] * unet.count)]
    conv = [int(rank) for rank in lists.get("conv_block_dims", [usual.conv_rank or 0] * unet.count)]
    for place in (place for place, factor in enumerate(factors) if factor == 0):
        dims[place] = conv[place] = 0
    table: dict[str, int] = {}
    trained: list[str] = []
    strengths: dict[str, float] = {}
    alphas = lists.get("block_alphas", [usual.alpha] * unet.count)
    conv_alphas = lists.get("conv_block_alphas", [usual.conv_alpha] * unet.count)
    for place, (pattern, inner) in enumerate(
        zip(unet.patterns(convolutions), unet.inner_patterns(convolutions), strict=True)
    ):
        linear = dims[place] if unet.has_linear(place, convolutions) else None
        spatial = conv[place] if convolutions and unet.has_convolutions(place) else None
        table |= _entries(pattern, inner, linear, spatial, usual)
        trained.append(pattern if linear or spatial else "")
        strengths |= _strengths(
            pattern,
            inner,
            (alphas[place] or linear, linear * _scale(usual.alpha, usual.rank)) if linear else None,
            (conv_alphas[place] or spatial, spatial * _scale(usual.conv_alpha, usual.conv_rank or 1))
            if spatial
            else None,
        )
    if table:
        note = f"{unet.title}'s blocks as patterns of layer names" if lists else "a rate of 0 leaves a block out"
        reading.put("adapter.block_rank", table, key, note)
    elif lists:
        reading.say("same", key, "adapter.block_rank", None, "all blocks have the usual rank")
    if strengths:
        reading.put("adapter.block_alpha", strengths, key, "blocks with a scale of their own, alpha / rank of each")
    return trained


def _entries(pattern: str, inner: str, linear: int | None, spatial: int | None, usual: Usual) -> dict[str, int]:
    """What a table of ranks must say of a block; ``linear`` or ``spatial`` are None where it has no such layers."""
    if linear is None and spatial is None:
        return {}
    if linear is None or spatial is None:
        rank, of_others = (linear, usual.rank) if spatial is None else (spatial, usual.conv_rank)
        return {} if rank is None or rank == of_others else {pattern: rank}
    found: dict[str, int] = {}
    if spatial != (usual.conv_rank if linear == usual.rank else linear):
        found[inner] = spatial  # in front of the block's own, which says it for all its layers
    if linear != usual.rank:
        found[pattern] = linear
    return found


def _strengths(
    pattern: str, inner: str, linear: tuple[float, float] | None, spatial: tuple[float, float] | None
) -> dict[str, float]:
    """What a table of alphas must say of a block, given the alpha of each kind of layers and the one that they have without; None for a kind
    that has none or is not trained."""
    if linear is None or spatial is None:
        own = linear or spatial
        return {} if own is None or math.isclose(*own) else {pattern: own[0]}
    found: dict[str, float] = {}
    if not math.isclose(spatial[0], spatial[1] if math.isclose(*linear) else linear[0]):
        found[inner] = spatial[0]  # in front of the block's own, which says it for all its layers
    if not math.isclose(*linear):
        found[pattern] = linear[0]
    return found


def _usual(reading: Reading, unet: UNet, lists: Mapping[str, Sequence[float]], rank: int, alpha: float) -> Usual:
    """What the layers outside of the lists have; ``conv_block_dims`` alone has convolutions trained too."""
    if reading.get("adapter.conv_rank") is None and "conv_block_dims" in lists:
        dims, alphas = lists["conv_block_dims"], lists.get("conv_block_alphas", [1.0] * unet.count)
        counts = Counter(
            (dim, scale)
            for place, (dim, scale) in enumerate(zip(dims, alphas, strict=False))
            if dim and unet.has_convolutions(place)
        )
        (conv, scale), _ = counts.most_common(1)[0] if counts else ((1, 1.0), 0)
        key = "network_args: conv_block_dims"
        reading.put("adapter.conv_rank", int(conv), key, "what most blocks have; the others by adapter.block_rank")
        if scale:
            reading.put("adapter.conv_alpha", scale, key, "of the same blocks")
    return Usual(rank, alpha, reading.get("adapter.conv_rank"), reading.get("adapter.conv_alpha") or 0.0)


def _scale(alpha: float, rank: float) -> float:
    """What a change is multiplied by: an alpha of 0 is the rank."""
    return alpha / rank if alpha else 1.0
