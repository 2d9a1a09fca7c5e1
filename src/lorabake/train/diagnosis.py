"""Why a step blew up, as far as can be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lorabake.dataset.order import Batch

if TYPE_CHECKING:
    from lorabake.train.bake import Bake


def diagnosis(bake: Bake, step: int, batches: Sequence[Batch], loss: float) -> str:
    """Which step, which pictures and the likely cause."""
    names = sorted({bake.samples[index].name for batch in batches for index in batch})
    where = f"Step {step + 1}: the {'gradient' if torch.isfinite(torch.tensor(loss)) else 'loss'} is not finite"
    pictures = f"Pictures in it: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."
    bad = [name for group in bake.groups if not bool(torch.isfinite(group.values).all()) for name in [group.name]]
    if bad:
        cause = f"The trained weights of {' and '.join(bad)} are already not finite"
    elif bake.model.dtype != torch.float32:
        better = "bf16 or fp32" if bake.model.dtype == torch.float16 else "fp32"
        cause = f"Likely an overflow in {bake.model.dtype}: train with precision {better}"
    else:
        rates = ", ".join(f"{bake.rate_of(group):g}" for group in bake.optimizer.param_groups)
        cause = f"Likely a learning rate that is too high (now {rates}): try a tenth of it"
    return f"{where}. {pictures} {cause}. The last good files are kept."
