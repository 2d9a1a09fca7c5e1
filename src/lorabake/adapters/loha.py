"""LoHa: W + s·(A1 B1) ∘ (A2 B2), the elementwise product of two low-rank matrices: rank R² from twice the numbers of rank R.

Source: Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098; names of the file's tensors, initial values and Tucker's form as in LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorabake.adapters._ranks import DecomposedSettings
from lorabake.adapters._weight import WeightType
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


class LohaSettings(DecomposedSettings):
    """Settings of ``loha``."""

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it."""
        told = super().metadata()
        return {**told, "network_args": {"algo": "loha", **told["network_args"]}}


class Loha(WeightType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of LoHa."""

    def create(
        self, layer: Layer, settings: LohaSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Normally distributed with deviations 0.1 and 1 (``_a`` and ``_b``); ``hada_w2_a`` zero."""
        rank, frozen = settings.rank_for(layer), layer.module.weight
        assert rank is not None and isinstance(frozen, torch.Tensor)
        outputs, inputs, *kernel = frozen.shape
        born: dict[str, Tensor] = {}
        for half in ("1", "2"):
            if settings.is_tucker(layer):
                born[f"hada_t{half}"] = torch.empty(rank, rank, *kernel).normal_(0, 0.1, generator=generator)
                shapes = (rank, outputs), (rank, inputs)
            else:
                shapes = (outputs, rank), (rank, frozen[0].numel())
            born[f"hada_w{half}_a"] = torch.empty(shapes[0]).normal_(0, 0.1, generator=generator)
            born[f"hada_w{half}_b"] = torch.empty(shapes[1]).normal_(0, 1, generator=generator)
        born["hada_w2_a"].zero_()
        return {**born, **settings.magnitudes(frozen)}, {"alpha": torch.tensor(settings.alpha_for(layer))}

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """s·(A1 B1) ∘ (A2 B2)."""
        a1, b1, a2, b2 = (tensors[f"hada_w{half}_{side}"] for half in "12" for side in "ab")
        scale = float(tensors["alpha"]) / b1.shape[-2]
        if "hada_t1" in tensors:
            halves = [
                torch.einsum("...ijhw,...jr,...ip->...prhw", tensors[f"hada_t{half}"], b, a)
                for half, a, b in (("1", a1, b1), ("2", a2, b2))
            ]
            return halves[0] * halves[1] * scale
        return kernels.hadamard(a1 * scale, b1, a2, b2).view(weight.shape)

    def thin(self, base: nn.Module, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """On linear layers: the product has the rank R² factors (rows of A1 times rows of A2, columns of B1 times columns of B2)."""
        if not isinstance(base, nn.Linear):
            return None
        a1, b1, a2, b2 = (tensors[f"hada_w{half}_{side}"] for half in "12" for side in "ab")
        (outputs, rank), inputs = a1.shape, b1.shape[1]
        if not _thin_pays(x.numel() // inputs, inputs, outputs, rank, torch.is_grad_enabled()):
            return None
        scale = float(tensors["alpha"]) / rank
        up_OR = (a1[:, :, None] * scale * a2[:, None, :]).flatten(1)
        down_RI = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
        return kernels.low_rank_product(x, down_RI, up_OR)

    def settings_of(self, weights: Mapping[str, Tensor]) -> LohaSettings:
        """Rank, form and alpha as the tensors have them."""
        return LohaSettings.of_file(weights["hada_w1_b"].shape[0], weights, tucker="hada_t1" in weights)


def _thin_pays(rows: int, inputs: int, outputs: int, rank: int, learning: bool) -> bool:
    """Whether products of rank R² take fewer multiplications than a weight of its own, whose gradient is one product more."""
    thin, build = rank * rank * (inputs + outputs), 2 * rank * inputs * outputs
    return 3 * (rows + 1) * thin < rows * inputs * outputs + 4 * build if learning else rows * thin < build


CARD = AdapterCard(
    kind="adapter",
    name="loha",
    summary="Elementwise product of two low-rank changes: high rank in a small file, for styles and several concepts at once.",
    code="lorabake.adapters.loha:Loha",
    settings=LohaSettings,
    network_module="lycoris.kohya",
)
