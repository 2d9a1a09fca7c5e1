"""GLoRA: W + s·(W A1 A2 + B1 B2), two low-rank changes, of what a layer gets and of what it gives.

Source: Chavan et al. 2023, arXiv 2306.07967; order of the factors and names of the file's tensors as in LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorabake.adapters._ranks import RankSettings
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

_A1, _A2, _B1, _B2, _CORE = "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"


class GloraSettings(RankSettings):
    """Settings of ``glora``. Grouped convolutions are left alone: LyCORIS' shapes have no meaning there."""

    cored: ClassVar[bool] = False
    """Whether B has a core (Tucker's form). Only ever so in a file."""

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it."""
        told = super().metadata()
        return {**told, "network_args": {"algo": "glora", **told["network_args"]}}


class _Cored(GloraSettings):
    """A file's, with a core."""

    cored: ClassVar[bool] = True


class Glora(WeightType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of GLoRA."""

    def fits(self, layer: Layer, settings: GloraSettings) -> bool:
        """Linear layers and ungrouped convolutions that the settings give a rank."""
        return settings.reaches(layer) and getattr(layer.module, "groups", 1) == 1

    def create(
        self, layer: Layer, settings: GloraSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``a1`` and ``b1`` uniform in ±1/sqrt(rank) (Kaiming with a = sqrt 5), ``a2`` and ``b2`` zero."""
        rank, frozen = settings.rank_for(layer), layer.module.weight
        assert rank is not None and isinstance(frozen, torch.Tensor)
        outputs, inputs, *kernel = frozen.shape
        point = [1 for _ in kernel]
        bound = 1 / math.sqrt(rank)
        born = {
            _A1: torch.empty(inputs, rank, *point).uniform_(-bound, bound, generator=generator),
            _A2: torch.zeros(rank, inputs, *point),
            _B1: torch.empty(outputs, rank, *point).uniform_(-bound, bound, generator=generator),
            _B2: torch.zeros(rank, inputs, *(point if settings.cored else kernel)),
        }
        if settings.cored:
            born[_CORE] = torch.empty(rank, rank, *kernel).uniform_(-bound, bound, generator=generator)
        return born, {"alpha": torch.tensor(settings.alpha_for(layer))}

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """s·(W A1 A2 + B1 B2)."""
        flat = weight.dim() in (2, 3)
        a1, a2, b1, b2 = (tensors[name] for name in (_A1, _A2, _B1, _B2))
        scale = float(tensors["alpha"]) / b1.shape[-1 if flat else -3]
        if flat:
            return ((weight @ a1) @ a2 + b1 @ b2) * scale
        a1, a2, b1 = (tensor.flatten(-3) for tensor in (a1, a2, b1))  # (…, in, rank), (…, rank, in), (…, out, rank)
        of_inputs = torch.einsum("...oihw,...ir,...rj->...ojhw", weight, a1, a2)
        if _CORE in tensors:
            b2 = torch.einsum("...rqhw,...qi->...rihw", tensors[_CORE], b2.flatten(-3))
        return (of_inputs + torch.einsum("...or,...rihw->...oihw", b1, b2)) * scale

    def thin(self, base: nn.Module, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """On linear layers: a low-rank change of rank 2R, of which one factor has a piece W A1."""
        if not isinstance(base, nn.Linear):
            return None
        a1, a2, b1, b2 = (tensors[name] for name in (_A1, _A2, _B1, _B2))
        (outputs, rank), inputs = b1.shape, a1.shape[0]
        if not _thin_pays(x.numel() // inputs, inputs, outputs, rank, torch.is_grad_enabled()):
            return None
        scale = float(tensors["alpha"]) / rank
        moved_OR = base.weight.to(x.dtype) @ (a1 * scale).to(x.dtype)
        up_OR = torch.cat([moved_OR, (b1 * scale).to(x.dtype)], dim=1)
        return kernels.low_rank_product(x, torch.cat([a2, b2]), up_OR)

    def rescaled(self, weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The factor goes into A2 and B2, which are zero at birth."""
        return {**weights, _A2: weights[_A2] * factor, _B2: weights[_B2] * factor}

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖s·(W A1 A2 + B1 B2)‖."""
        frozen: Any = base.weight
        return torch.linalg.vector_norm(self.change(frozen.float(), weights))

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """Both halves by the square root; a core stays."""
        root = factor.sqrt()
        for name in (_A1, _A2, _B1, _B2):
            weights[name].mul_(root)

    def settings_of(self, weights: Mapping[str, Tensor]) -> GloraSettings:
        """Rank and alpha as the tensors have them; a file without alpha means alpha = rank."""
        rank = weights[_B1].shape[1]
        alpha = float(weights["alpha"]) if "alpha" in weights else float(rank)
        kind = _Cored if _CORE in weights else GloraSettings
        return kind.model_construct(rank=rank, alpha=alpha, conv_rank=rank, conv_alpha=alpha)


def _thin_pays(rows: int, inputs: int, outputs: int, rank: int, learning: bool) -> bool:
    """Whether products of rank 2R take fewer multiplications than a weight of its own, whose gradient is one product more."""
    thin, moved, build = 2 * rank * rows * (inputs + outputs), rank * inputs * outputs, 3 * rank * inputs * outputs
    return 3 * thin + 2 * moved < rows * inputs * outputs + 3 * build if learning else thin + moved < build


CARD = AdapterCard(
    kind="adapter",
    name="glora",
    summary="Two low-rank changes, of what a layer gets and of what it gives: twice a LoRA's size at equal rank, and learns more of it.",
    code="lorabake.adapters.glora:Glora",
    settings=GloraSettings,
    network_module="lycoris.kohya",
    usual_lr=5e-5,
)
