"""Network types that say what becomes of a layer's weight; here is what a layer computes then.

Three ways, the cheapest that is exact is taken: *beside*, where a type knows how to apply its change to an input without ever forming it;
*merged*, one product with W + m·ΔW; and *apart*, base and change one after the other, where the base is in half precision (small changes
would be rounded away), in fewer bits, or below another adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorabake.base.lazy import lazy_module
from lorabake.protocols.family import ComputedWeight, Layer

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, F, nn = lazy_module("torch"), lazy_module("torch.nn.functional"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


class WeightType(ABC):
    """A :class:`~lorabake.protocols.adapter.LayerType` but for ``create``, ``settings_of`` and the change itself.

    Everything that :meth:`change` needs is in the tensors of a layer, so that a file's change is that of the training. Tensors and weights
    may have a first axis of layers (L): the change is then that of each.
    """

    def fits(self, layer: Layer, settings: Any) -> bool:
        """Linear layers and convolutions that the settings give a rank."""
        return settings.reaches(layer)

    @abstractmethod
    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """ΔW at multiplier 1, float32, differentiable in the tensors.

        Args:
            weight: W, (out, in) or (out, in, height, width), behind an axis of layers if the tensors have one.
            tensors: of the layer, by name in the file. Scalars have no axis of layers.
        """

    def thin(self, base: nn.Module, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """ΔW applied to an input without forming it, in the type of ``x``; None where forming it is cheaper or cannot be helped.

        Args:
            base: the model's own layer.
            x: what it is applied to.
            tensors: of the layer, without an axis of layers.
        """
        return None

    def changed(self, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """W + m·ΔW, float32."""
        weight = weight.float()
        if (magnitudes := tensors.get("dora_scale")) is None:
            return torch.add(weight, self.change(weight, tensors), alpha=multiplier)
        whole = weight + self.change(weight, tensors)
        return torch.lerp(weight, whole * (magnitudes / norms_of(whole.detach(), magnitudes)), multiplier)

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor:
        """The changed layer's output."""
        if training and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        origin: Any = getattr(base, "origin", base)  # below other adapters, if there are any
        change = None if of_inputs(weights, origin) else self.thin(origin, x, weights)
        if change is not None:
            return self.beside(base, origin, x, change, weights, multiplier)
        if base is origin and not isinstance(base, ComputedWeight) and x.dtype == origin.weight.dtype == torch.float32:
            return kernels.with_weight(origin, x, self.changed(origin.weight, weights, multiplier))
        frozen = origin.weight.float()
        moved = (self.changed(frozen, weights, multiplier) - frozen).to(x.dtype)
        return base(x) + kernels.with_weight(origin, x, moved, bias=False)

    def beside(
        self,
        base: nn.Module,
        origin: Any,
        x: Tensor,
        change: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
    ) -> Tensor:
        """With DoRA every output of W + ΔW has a gain g: what is added to the base is m·((g - 1)·W x + g·ΔW x)."""
        if (magnitudes := weights.get("dora_scale")) is None:
            return torch.add(base(x), change, alpha=multiplier)
        with torch.no_grad():
            norms = self.norms(origin.weight.float(), weights)
        axes = (-1, *(1 for _ in x.shape[2:])) if isinstance(origin, nn.Conv2d) else (-1,)
        gain = (magnitudes / norms).view(axes)
        of_change = (gain * multiplier).to(x.dtype)
        computed = issubclass(type(origin), ComputedWeight)
        if base is not origin or computed:
            own = origin(x) if origin.bias is None else origin(x) - origin.bias.view(axes)
            return base(x).addcmul(own, ((gain - 1) * multiplier).to(x.dtype)).addcmul(change, of_change)
        own = kernels.with_weight(origin, x, origin.weight, bias=False) * torch.lerp(
            torch.ones_like(gain), gain, multiplier
        ).to(x.dtype)
        out = own if origin.bias is None else own + origin.bias.view(axes)
        return out.addcmul(change, of_change)

    def norms(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of W + ΔW, in the shape of DoRA's magnitudes, which are those of outputs. Not differentiated."""
        return norms_of(weight + self.change(weight, tensors), tensors["dora_scale"])

    def changed_weights(
        self,
        weights_L: Tensor,
        tensors: Sequence[Mapping[str, Tensor]],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor | None:
        """W + m·ΔW of all layers at once; None where a layer may be left out."""
        if training and settings.module_dropout:
            return None
        own = {
            name: tensor if tensor.ndim == 0 else torch.stack([of[name] for of in tensors])
            for name, tensor in tensors[0].items()
        }
        return self.changed(weights_L, own, multiplier)

    def delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """ΔW in the shape of the base's weight."""
        frozen: Any = base.weight
        frozen = frozen.float()
        if "dora_scale" in weights:
            return self.changed(frozen, weights, 1.0) - frozen
        return self.change(frozen, weights)


def norms_of(weight: Tensor, magnitudes: Tensor) -> Tensor:
    """Norms of a weight along the axes of which DoRA's magnitudes have one value: of what makes each output, or in old files each input.

    They are not differentiated (Liu et al. 2024, arXiv 2402.09353, section 4.3).
    """
    axes = [axis for axis, size in enumerate(magnitudes.shape) if size == 1]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def of_inputs(tensors: Mapping[str, Tensor], origin: Any) -> bool:
    """Whether its magnitudes are those of inputs, as LyCORIS wrote them before version 3.2."""
    magnitudes = tensors.get("dora_scale")
    return magnitudes is not None and magnitudes.shape[0] != origin.weight.shape[0]
