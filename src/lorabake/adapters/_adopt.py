"""Training a file on: a newborn adapter takes over exactly what a file's adapter does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorabake.adapters._graft import Change, LayerGraft
from lorabake.adapters._names import Tensors, by_layer
from lorabake.base.errors import Problem, Problems
from lorabake.protocols.adapter import LayerType, RescalableLayerType

_TOLD = 4
"""Layers that a message names."""


@torch.no_grad()
def adopt(graft: LayerGraft, given: Mapping[str, Tensors]) -> int:
    """Copy a file's values into ``graft``; returns how many of its layers are not in the file and stay newborn.

    Where a layer's alpha is not the graft's, the weights are scaled, so that the change is the same.

    Args:
        graft: a newborn adapter.
        given: the file's tensors by layer, under any of a layer's names.

    Raises:
        Problems: the file holds layers that are not trained, or others than the graft's ranks and tensors.
        UserError: the file is for another model, or not whole.
    """
    named = by_layer(graft.model.layers(), given)
    own = {change.layer.key: change for change in graft.changes}
    problems = []
    if untrained := sorted(named.keys() - own.keys()):
        what = (
            f"{len(untrained)} of {len(named)} layers of the file are not trained with this recipe, and their change would be lost: "
            f"{', '.join(untrained[:_TOLD])}. Train them too (optimizer.text_encoder_lr, adapter.conv_rank …)."
        )
        problems.append(Problem("layers", what))
    found: dict[str, dict[str, Tensor]] = {}
    wrong: dict[str, list[str]] = {}
    for key in own.keys() & named.keys():
        try:
            found[key] = _fitted(graft.layer_type, own[key], named[key])
        except _Misfit as misfit:
            wrong.setdefault(str(misfit), []).append(key)
    problems += [Problem(_such(keys), what) for what, keys in sorted(wrong.items())]
    if problems:
        raise Problems("The file to start from", problems)
    for key, tensors in found.items():
        for name, weight in own[key].weights.items():
            weight.copy_(tensors[name])
    return len(own.keys() - named.keys())


class _Misfit(Exception):
    """Why a layer of the file cannot be taken over; equal for all layers with the same trouble."""


def _fitted(layer_type: LayerType, change: Change, tensors: Tensors) -> dict[str, Tensor]:
    """The file's weights of one layer, float32, for the graft's own constants."""
    if odd := sorted(tensors.keys() - change.weights.keys() - change.constants.keys()):
        raise _Misfit(f"has '{odd[0]}', which the recipe's adapter has not.")
    if missing := sorted(change.weights.keys() - tensors.keys()):
        raise _Misfit(f"lacks '{missing[0]}', which the recipe's adapter has.")
    theirs, ours = layer_type.settings_of(tensors), layer_type.settings_of({**change.weights, **change.constants})
    ranks = getattr(theirs, "rank", None), getattr(ours, "rank", None)
    for name, weight in change.weights.items():
        if tensors[name].shape != weight.shape:
            told = f"rank {ranks[0]} in the file, {ranks[1]} in the recipe" if ranks[0] != ranks[1] else ""
            shapes = f"'{name}' is {tuple(tensors[name].shape)} in the file, {tuple(weight.shape)} with the recipe"
            raise _Misfit(f"{told or shapes}. Set the recipe's as the file has it.")
    weights = {name: tensors[name].to(change.weights[name].device, torch.float32) for name in change.weights}
    for name, value in change.constants.items():
        default = getattr(theirs, "alpha", None) if name == "alpha" else None  # a file without alpha has a usual one
        told = tensors.get(name, value if default is None else torch.tensor(float(default)))
        if torch.equal(told.float().cpu(), value.float().cpu()):
            continue
        if name != "alpha" or not isinstance(layer_type, RescalableLayerType):
            raise _Misfit(
                f"{name} {told.tolist()} in the file, {value.tolist()} in the recipe. Set it as the file has it."
            )
        weights = layer_type.rescaled(weights, float(told) / float(value))
    return weights


def _such(keys: list[str]) -> str:
    keys = sorted(keys)
    return keys[0] if len(keys) == 1 else f"{len(keys)} layers, such as {keys[0]}"
