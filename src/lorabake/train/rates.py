"""Which weights share a learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lorabake.base.errors import UserError
from lorabake.base.patterns import decide, idle
from lorabake.optimizers._flat import FlatGroup
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Part
from lorabake.recipe.sections import RateSettings


def rates_by_part(rates: RateSettings, parts: Sequence[Part]) -> dict[Part, float]:
    """The learning rate of each part that is trained at all.

    Raises:
        UserError: there are rates for another number of text encoders than the model has.
    """
    encoders: list[Part] = [part for part in parts if part != "denoiser"]
    given = rates.text_encoder_lr or 0.0
    each: tuple[float, ...] = given if isinstance(given, tuple) else (given,) * len(encoders)
    if len(each) != len(encoders):
        raise UserError(
            f"optimizer.text_encoder_lr has {len(each)} values, and the model has {len(encoders)} text encoders. "
            "Give one for each, or a single one for all. Nothing was started."
        )
    found: dict[Part, float] = dict(zip(encoders, each, strict=True))
    found["denoiser"] = rates.lr or 0.0
    return {part: found[part] for part in parts if found[part] > 0}


def begins_at_zero(grafted: Graft) -> frozenset[str]:
    """Names of a newborn adapter's weights that are zero: what LoRA+ hurries."""
    every = (item for named in grafted.parameters().values() for item in named.items())
    return frozenset(name for name, parameter in every if not bool(parameter.any()))


def rate_groups(
    grafted: Graft, rates: RateSettings, by_part: Mapping[Part, float], ups: frozenset[str] = frozenset()
) -> tuple[list[FlatGroup], list[float]]:
    """Trained weights by learning rate, and the rates.

    Args:
        grafted: what is trained.
        rates: as the recipe has them.
        by_part: from :func:`rates_by_part`.
        ups: the weights that LoRA+ hurries, if it is asked for: see :func:`begins_at_zero`.

    Raises:
        UserError: a pattern fits no weight; or LoRA+ is asked for where it makes no difference.
    """
    layers = {layer.key: layer.names for layer in grafted.model.layers()}
    split: dict[tuple[Part, float, bool], dict[str, nn.Parameter]] = {}
    seen: list[Sequence[str]] = []
    for part, named in grafted.parameters().items():
        for name, parameter in named.items():
            known_as = (name, *layers.get(name.partition(".")[0], ()))
            seen.append(known_as)
            factor = decide(rates.block_lr, known_as)
            hurried = rates.lora_plus_ratio is not None and name in ups
            split.setdefault((part, 1.0 if factor is None else factor, hurried), {})[name] = parameter
    if unused := idle(rates.block_lr, seen):
        raise UserError(
            f"optimizer.block_lr: {_listed(unused)} is in no name of a trained weight. Names are such as {_listed(seen[0])}. Nothing was started."
        )
    kinds = {hurried for _, _, hurried in split}
    if rates.lora_plus_ratio is not None and (len(kinds) == 1 or grafted.card.trains_base):
        raise UserError(
            f"optimizer.lora_plus_ratio is for network types of which some weights begin at zero and some do not; '{grafted.card.name}' "
            "is none. Leave it out. Nothing was started."
        )
    groups = [FlatGroup(_group_name(*key), weights) for key, weights in split.items()]
    ratio = rates.lora_plus_ratio or 1.0
    return groups, [by_part[part] * factor * (ratio if hurried else 1.0) for part, factor, hurried in split]


def _group_name(part: Part, factor: float, hurried: bool) -> str:
    """``denoiser``, ``denoiser x0.5``, ``text_encoder up`` …"""
    return part + (f" x{factor:g}" if factor != 1 else "") + (" up" if hurried else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
