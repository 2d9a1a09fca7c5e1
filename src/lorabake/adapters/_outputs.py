"""Network types whose change is made of what a layer gives: ΔW x is a function of W x alone, and so never needs a product of its own.

Weights and products are treated alike, as rows: (…, out, cells), a row for each output. What turns a weight's rows turns a product's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorabake.adapters._weight import WeightType
from lorabake.base.lazy import lazy_module
from lorabake.protocols.family import ComputedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


class OutputType(WeightType):
    """A :class:`~lorabake.adapters._weight.WeightType` that says what is added to the rows of a weight or of a product."""

    @abstractmethod
    def added(self, rows: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """What is added to rows (…, out, cells) at a multiplier, of their shape and type; differentiable.

        Args:
            rows: of a weight or of a product, behind an axis of layers if the tensors have one.
            tensors: of the layer, by name in the file.
            multiplier: zero is nothing added.
        """

    @abstractmethod
    def work(self, tensors: Mapping[str, Tensor]) -> int:
        """What it takes to change one number of the rows, forward and backward, in multiplications of a dense product that take as long."""

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What is added to the rows of the weight."""
        return _of_weight(self.added(kernels.rows_of(weight), tensors, 1.0), weight)

    def changed(self, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """The weight with what is added to its rows, float32."""
        weight = weight.float()
        rows = kernels.rows_of(weight)
        return _of_weight(rows + self.added(rows, tensors, multiplier), weight)

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor:
        """The changed layer's output: the base's, and what is added to its product without the bias; or the weight's, where that is less work."""
        origin: Any = getattr(base, "origin", base)  # below other adapters, if there are any
        # A row of a grouped convolution's weight is for its group's inputs: rows of two groups mix otherwise than what they give.
        if getattr(origin, "groups", 1) != 1 or _weight_pays(base, origin, x, self.work(weights)):
            return super().forward(base, x, weights, multiplier, settings, training)
        if training and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        out = base(x)
        product = out if base is origin else origin(x)
        spatial = isinstance(origin, nn.Conv2d)
        if origin.bias is not None:
            bias = origin.bias.view(-1, 1, 1) if spatial else origin.bias
            product = product - bias.to(product.dtype)
        if not spatial or product.is_contiguous(memory_format=torch.channels_last):
            last = product.movedim(1, -1) if spatial else product
            rows_OC = last.reshape(-1, last.shape[-1]).t()
            added = self.added(rows_OC, weights, multiplier).t().reshape(last.shape)
            return out + (added.movedim(-1, 1) if spatial else added)
        return out + self.added(product.flatten(2), weights, multiplier).view(product.shape)


def _of_weight(rows: Tensor, weight: Tensor) -> Tensor:
    return kernels.weights_of(rows, weight if weight.dim() in (2, 4) else weight[0])


def _weight_pays(base: nn.Module, origin: Any, x: Tensor, work: int) -> bool:
    """Whether to change the weight's columns instead of the product's, which may be many more.

    A changed weight takes a gradient, which is one dense product more; and a second product forward where it cannot be used in the base's
    place, as in half precision, where small changes would be rounded away (:meth:`WeightType.forward`).
    """
    if isinstance(origin, nn.Linear):
        columns, cells = origin.in_features, x.numel() // origin.in_features
    else:
        columns, cells = origin.weight[0].numel(), x[:, 0].numel() // (origin.stride[0] * origin.stride[1])
    merges = (
        base is origin and not isinstance(origin, ComputedWeight) and x.dtype == origin.weight.dtype == torch.float32
    )
    products = torch.is_grad_enabled() + (not merges)
    return work * (cells - columns) > products * cells * columns
