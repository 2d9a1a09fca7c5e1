"""Limits on how much any one layer is changed: kohya's ``scale_weight_norms``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorabake.adapters._graft import LayerGraft
from lorabake.base.errors import UserError
from lorabake.protocols.adapter import Graft, NormedLayerType

Limit = Callable[[], dict[str, float]]
"""Scales what is too large; returns how many layers that were, and mean and largest norm afterwards."""


def norm_limit(graft: Graft, largest: float) -> Limit:
    """Keeps ‖ΔW‖ of every layer at ``largest`` or below.

    Raises:
        UserError: the network type cannot tell the size of its changes.
    """
    kind = graft.layer_type if isinstance(graft, LayerGraft) else None
    if not isinstance(graft, LayerGraft) or not isinstance(kind, NormedLayerType):
        raise UserError(
            f"train.max_weight_norm is for network types whose change can be measured layer by layer; '{graft.card.name}' cannot. "
            "Leave it out. Nothing was started."
        )

    @torch.no_grad()
    def limit() -> dict[str, float]:
        layers = [(layer.base, layer.tensors) for layer in graft.layers]
        norms_L = torch.stack([kind.change_norm(base, tensors) for base, tensors in layers])
        counted_L = norms_L.clamp(min=largest / 2)  # so that nothing is divided by zero
        factors_L = counted_L.clamp(max=largest) / counted_L
        for (_, tensors), factor in zip(layers, factors_L.unbind(), strict=True):
            kind.scale_change(tensors, factor)
        after_L = norms_L * factors_L
        scaled, mean, most = torch.stack([(factors_L < 1).sum().to(after_L), after_L.mean(), after_L.max()]).tolist()
        return {"norms_scaled": int(scaled), "norm_mean": mean, "norm_max": most}

    return limit
