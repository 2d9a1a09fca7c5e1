"""LoKr: W + s·(W1 ⊗ W2), the Kronecker product of a small matrix and a larger one, which may itself be of low rank.

A weight of (a·b, c·d) is changed by W1 (a, c) times W2 (b, d): few numbers, full rank. It is applied without ever being formed: an input
row is a c x d matrix X, and its output W1 X W2ᵀ.
Source: Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; names of the file's tensors, factors, initial values and Tucker's form as in LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PrivateAttr, field_validator

from lorabake.adapters._ranks import SHAPES, DecomposedSettings
from lorabake.adapters._weight import WeightType
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Generator, Tensor, nn

    from lorabake.adapters import _kernels as kernels
else:
    torch, F, nn = lazy_module("torch"), lazy_module("torch.nn.functional"), lazy_module("torch.nn")
    kernels = lazy_module("lorabake.adapters._kernels")


class LokrSettings(DecomposedSettings):
    """Settings of ``lokr``."""

    factor: Annotated[int, SHAPES] = Field(default=-1, le=1024)
    """Rows and columns of the small matrix: 8 gives 8 x 8 where they divide the layer's. -1: as near to the square root as possible, the smallest
    files. 4 to 16 learn more."""
    full_matrix: Annotated[bool, SHAPES] = False
    """Leave the larger matrix whole, whatever the rank; rank and alpha then do nothing. Used with a factor of 4 to 16, to learn much."""
    decompose_both: Annotated[bool, SHAPES] = False
    """Make the small matrix of low rank, too, where it is larger than twice the rank. For the smallest files."""

    _outer: tuple[int, int] | None = PrivateAttr(default=None)
    """Of a file: rows and columns of the small matrix."""
    _whole: tuple[bool, bool] = PrivateAttr(default=(True, False))
    """Of a file: which of the matrices are not of low rank."""

    @field_validator("factor")
    @classmethod
    def _splits(cls, factor: int) -> int:
        if factor != -1 and factor < 2:
            raise ValueError(f"{factor} is no number to split by: give 2 or more, or -1 for the nearest to a square")
        return factor

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it."""
        told = super().metadata()
        own = {name: value for name in ("full_matrix", "decompose_both") if (value := getattr(self, name))}
        return {**told, "network_args": {"algo": "lokr", "factor": self.factor, **own, **told["network_args"]}}

    def sizes(self, outputs: int, inputs: int) -> tuple[int, int, int, int]:
        """a, b, c and d of a layer."""
        if self._outer:
            (a, c) = self._outer
            return a, max(1, outputs // a), c, max(1, inputs // c)
        return *factors(outputs, self.factor), *factors(inputs, self.factor)

    def whole(self, rank: int, sizes: tuple[int, int, int, int]) -> tuple[bool, bool]:
        """Whether the small and the larger matrix are whole, and not of low rank."""
        if self._outer:
            return self._whole
        a, b, c, d = sizes
        small = self.full_matrix or not self.decompose_both or rank >= max(a, c) / 2
        return small, self.full_matrix or rank >= max(b, d) / 2


class Lokr(WeightType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of LoKr."""

    def create(
        self, layer: Layer, settings: LokrSettings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Uniform in ±1/sqrt(fan in) (Kaiming with a = sqrt 5); zero is ``lokr_w2``, or else ``lokr_w2_b``."""
        rank, frozen = settings.rank_for(layer), layer.module.weight
        assert rank is not None and isinstance(frozen, torch.Tensor)
        a, b, c, d = sizes = settings.sizes(frozen.shape[0], frozen.shape[1])
        kernel, cells = frozen.shape[2:], frozen[0, 0].numel()
        small_whole, large_whole = settings.whole(rank, sizes)
        shapes: dict[str, tuple[int, ...]] = (
            {"lokr_w1": (a, c)} if small_whole else {"lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c)}
        )
        if large_whole:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif settings.is_tucker(layer):
            shapes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d)}
        else:
            shapes |= {"lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * cells)}
        born = {name: torch.empty(shape) for name, shape in shapes.items()}
        for tensor in born.values():
            bound = 1 / math.sqrt(tensor[0].numel())
            tensor.uniform_(-bound, bound, generator=generator)
        born["lokr_w2" if large_whole else "lokr_w2_b"].zero_()
        alpha = float(rank) if small_whole and large_whole else settings.alpha_for(layer)
        return {**born, **settings.magnitudes(frozen)}, {"alpha": torch.tensor(alpha)}

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """s·(W1 ⊗ W2)."""
        small, large = _small(tensors) * _scale(tensors), _large(tensors, weight)
        small = small[..., :, None, :, None]
        large = large[..., None, :, None, :, :, :] if weight.dim() > 3 else large[..., None, :, None, :]
        if weight.dim() > 3:
            small = small[..., None, None]
        return (small * large).reshape(weight.shape)

    def thin(self, base: nn.Module, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """W1 X W2ᵀ for every row or cell X; on larger convolutions, W2 is the kernel."""
        weight: Any = base.weight
        small = (_small(tensors) * _scale(tensors)).to(x.dtype)
        if isinstance(base, nn.Linear):
            return _of_rows(x, small, tensors)
        if kernels.is_pointwise(base, x):
            return _of_rows(x.movedim(1, -1), small, tensors).movedim(-1, 1)
        assert isinstance(base, nn.Conv2d)
        if base.groups != 1:
            return None
        large = _large(tensors, weight).to(x.dtype)
        a, c = small.shape
        of_parts = F.conv2d(
            x.reshape(-1, large.shape[1], *x.shape[2:]), large, None, base.stride, base.padding, base.dilation
        )
        mixed = torch.bmm(small.expand(len(x), a, c), of_parts.view(len(x), c, -1))
        return mixed.view(len(x), a * large.shape[0], *of_parts.shape[2:])

    def rescaled(self, weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The factor goes into what is zero at birth. Whole matrices have no use for alpha: nothing changes."""
        if "lokr_w2" in weights and "lokr_w1" in weights:
            return dict(weights)
        name = "lokr_w2" if "lokr_w2" in weights else "lokr_w2_b"
        return {**weights, name: weights[name] * factor}

    def settings_of(self, weights: Mapping[str, Tensor]) -> LokrSettings:
        """Sizes, rank, form and alpha as the tensors have them."""
        whole = "lokr_w1_a" not in weights, "lokr_w2_a" not in weights
        small = (
            weights["lokr_w1"].shape if whole[0] else (*weights["lokr_w1_a"].shape[:1], weights["lokr_w1_b"].shape[1])
        )
        tucker = "lokr_t2" in weights
        rank = 1 if all(whole) else _rank(weights)
        settings = LokrSettings.of_file(rank, weights, tucker=tucker)
        settings._outer, settings._whole = (small[0], small[1]), whole
        return settings


def factors(size: int, factor: int) -> tuple[int, int]:
    """``size`` as a product m·n with m ≤ n: m is ``factor`` if that divides it, or else the largest divisor that is neither above it nor above n.

    -1 sets no limit. As LyCORIS splits.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = min(math.isqrt(size), factor if factor > 0 else size)
    small = next(m for m in range(limit, 0, -1) if size % m == 0)
    return small, size // small


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """Of the matrix that is of low rank."""
    if "lokr_t2" in tensors:
        return tensors["lokr_t2"].shape[-3]
    return tensors["lokr_w2_b" if "lokr_w2_b" in tensors else "lokr_w1_b"].shape[-2]


def _scale(tensors: Mapping[str, Tensor]) -> float:
    """alpha / rank, or 1 where nothing has a rank."""
    if "lokr_w1" in tensors and "lokr_w2" in tensors:
        return 1.0
    return float(tensors["alpha"]) / _rank(tensors)


def _small(tensors: Mapping[str, Tensor]) -> Tensor:
    """W1, ac."""
    return tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]


def _large(tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """W2: bd, or bdhw for a convolution's ``weight``."""
    if "lokr_w2" in tensors:
        return tensors["lokr_w2"]
    a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    if "lokr_t2" in tensors:
        return torch.einsum("...ijhw,...ip,...jr->...prhw", tensors["lokr_t2"], a, b)
    product = a @ b
    return product.unflatten(-1, (-1, *weight.shape[-2:])) if weight.dim() > 3 else product


def _of_rows(x: Tensor, small_AC: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """W1 X W2ᵀ of every row X of ``x``, (…, c·d) -> (…, a·b). The small matrix is applied where the rows are narrowest."""
    x_CND = x.reshape(-1, small_AC.shape[1], x.shape[-1] // small_AC.shape[1]).transpose(0, 1)
    if "lokr_w2_b" in tensors:
        first, second = tensors["lokr_w2_b"].flatten(1).to(x.dtype), tensors["lokr_w2_a"].to(x.dtype)
    else:
        first, second = tensors["lokr_w2"].flatten(1).to(x.dtype), None
    narrow_CNR = torch.bmm(
        x_CND, first.t().expand(len(x_CND), -1, -1)
    )  # matmul would choose its way by what is trained
    mixed_ANR = (small_AC @ narrow_CNR.flatten(1)).view(-1, *narrow_CNR.shape[1:])
    out_ANB = mixed_ANR if second is None else (mixed_ANR.flatten(0, 1) @ second.t()).unflatten(0, mixed_ANR.shape[:2])
    return out_ANB.transpose(0, 1).reshape(*x.shape[:-1], -1)


CARD = AdapterCard(
    kind="adapter",
    name="lokr",
    summary="Kronecker product of a small and a larger matrix: the smallest files, and with a small factor nearly full fine-tuning.",
    code="lorabake.adapters.lokr:Lokr",
    settings=LokrSettings,
    network_module="lycoris.kohya",
)
