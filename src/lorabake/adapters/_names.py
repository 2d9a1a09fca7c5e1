"""Which layers a file's names mean: a layer's own name, another that it has elsewhere, or those of pieces that make one layer here.

Pieces are put together as one low-rank change: with pieces (A₁, B₁), (A₂, B₂) of a layer's rows it is A = [A₁; A₂] and
B = diag(B₁, B₂), each B already scaled by its alpha / rank. Ranks add up, and nothing is rounded away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.protocols.family import Alias, Layer

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"

Tensors = Mapping[str, Tensor]
"""Of one layer, by suffix."""


def by_layer(layers: Sequence[Layer], given: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """A file's tensors under the keys of ``layers``.

    Args:
        layers: of the model.
        given: tensors by any name of a layer, or of a piece of one.

    Raises:
        UserError: names that no layer has; one layer under two names; pieces that are not LoRA, not whole or of other shapes.
    """
    own = {layer.key for layer in layers}
    pieces: dict[str, list[tuple[Layer, Alias]]] = {}
    for layer in layers:
        for alias in layer.aliases:
            pieces.setdefault(alias.key, []).append((layer, alias))
    if unknown := sorted(given.keys() - own - pieces.keys()):
        raise UserError(
            f"The adapter does not fit this base model: {len(unknown)} of its {len(given)} layers are not in it, such as {', '.join(unknown[:3])}."
        )
    found: dict[str, Tensors] = {key: tensors for key, tensors in given.items() if key in own}
    parts: dict[str, list[Alias]] = {}
    owners: dict[str, Layer] = {}
    for key in given.keys() - own:
        for layer, alias in pieces[key]:
            parts.setdefault(layer.key, []).append(alias)
            owners[layer.key] = layer
    for layer_key in sorted(parts):
        aliases = sorted(parts[layer_key], key=lambda alias: (alias.rows or (0, 0), alias.key))
        whole = [alias for alias in aliases if alias.rows is None]
        if layer_key in found or (whole and len(aliases) > 1):
            names = [layer_key] * (layer_key in found) + [alias.key for alias in aliases]
            raise UserError(f"The adapter file holds one layer under several names: {', '.join(names[:4])}.")
        found[layer_key] = given[whole[0].key] if whole else _joined(owners[layer_key], aliases, given)
    return found


def _joined(layer: Layer, aliases: Sequence[Alias], given: Mapping[str, Tensors]) -> dict[str, Tensor]:
    """One low-rank change that does to the layer's rows what those of its pieces do to them."""
    outputs, inputs = layer.module.get_parameter("weight").shape
    downs, ups = [], []
    for key in dict.fromkeys(alias.key for alias in aliases):
        down_RI, up_OR, alpha = _pair(layer, key, given[key])
        rows = [alias for alias in aliases if alias.key == key]
        expected = sum(last - first for first, last in (alias.rows for alias in rows if alias.rows))
        rank = max(down_RI.shape[:1].numel(), 1)
        for name, tensor, shape in ((_DOWN, down_RI, (rank, inputs)), (_UP, up_OR, (expected, rank))):
            if tensor.shape != shape:
                raise UserError(
                    f"The adapter file does not fit: '{key}.{name}' is {tuple(tensor.shape)}, expected {shape}."
                )
        block_OR = torch.zeros(outputs, rank)
        for alias in rows:
            assert alias.rows is not None, "the whole layer is no piece"
            block_OR[slice(*alias.rows)] = up_OR[slice(*(alias.its_rows or (0, expected)))] * (alpha / rank)
        downs.append(down_RI)
        ups.append(block_OR)
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    return {_DOWN: down, _UP: up, _ALPHA: torch.tensor(float(len(down)))}


def _pair(layer: Layer, key: str, tensors: Tensors) -> tuple[Tensor, Tensor, float]:
    if odd := sorted(tensors.keys() - {_DOWN, _UP, _ALPHA}):
        raise UserError(
            f"The adapter file holds '{key}.{odd[0]}'. In this model '{key}' is only a part of '{layer.key}', and only plain LoRA of parts "
            "can be put together."
        )
    for name in (_DOWN, _UP):
        if name not in tensors:
            raise UserError(f"The adapter file is not whole: '{key}.{name}' is missing.")
    down = tensors[_DOWN].float()
    alpha = tensors.get(_ALPHA)
    return down, tensors[_UP].float(), float(down.shape[:1].numel() if alpha is None else alpha)
