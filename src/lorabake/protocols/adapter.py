"""What a network type offers, and what a grafted adapter can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from lorabake.base.cards import Card, Settings
from lorabake.protocols.family import Layer, LayerGroup, Model, Part

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class AdapterCard(Card):
    """A network type's card. ``code`` names a :class:`LayerType`, or for ``whole_model`` types a ``graft`` function."""

    saves: Literal["lora", "model"] = "lora"
    """What its checkpoints are: a LoRA file, or a whole model folder."""
    network_module: str = "networks.lora"
    """``ss_network_module`` as clients know it."""
    also_called: tuple[str, ...] = ()
    """Names that other tools give to files this type reads."""
    writes: str = ""
    """The network type that its files are of, where that is another: those are read as what they are."""
    usual_lr: float = 1e-4
    """Learning rate for AdamW on a full-size model."""
    linear: bool = True
    """Whether a multiplier scales ΔW. Where it does not, ``delta`` tells of a multiplier of 1 alone."""

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights are trained, and not something beside them."""
        return self.saves == "model"


@dataclass(frozen=True, slots=True)
class ForLayers:
    """A mark on a network type's setting (in its ``Annotated`` type): it is for layers of this group alone."""

    group: LayerGroup
    called: str
    """What people call them: with a model that has none, they are told that the setting does nothing."""


@dataclass(frozen=True, slots=True)
class ByLayer:
    """A mark on a network type's setting: a table whose keys are patterns of layers' names. A pattern that is in none is refused."""


class LayerType(Protocol):
    """A network type that changes layers one by one. One file in ``adapters/`` offers exactly this."""

    def fits(self, layer: Layer, settings: Any) -> bool:
        """Whether ``layer`` gets an adapter under these settings."""
        ...

    def create(self, layer: Layer, settings: Any, generator: Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trainable weights and constants at birth, named as in the file (``lora_down.weight``, ``alpha``); the change is zero."""
        ...

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
        ...

    def delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """ΔW in the shape of ``base.weight``: the change at multiplier 1."""
        ...

    def settings_of(self, weights: Mapping[str, Tensor]) -> Settings:
        """Settings that make a layer able to hold these weights, read from a file's tensors."""
        ...


@runtime_checkable
class StackingLayerType(Protocol):
    """A network type whose changed layer is the base layer with another weight, made for many layers of one shape at once."""

    def changed_weights(
        self,
        weights_L: Tensor,
        tensors: Sequence[Mapping[str, Tensor]],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor | None:
        """W + m·ΔW of L layers with the same shapes, constants and settings, differentiable; None where that is not the whole change.

        ``weights_L`` is (L, out, in) or (L, out, in, height, width), channels last in memory.
        """
        ...


@runtime_checkable
class RescalableLayerType(Protocol):
    """A network type whose change can be made larger or smaller in its weights, so that another alpha gives the same change."""

    def rescaled(self, weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Weights whose change is ``factor`` times that of ``weights`` under the same alpha."""
        ...


@runtime_checkable
class NormedLayerType(Protocol):
    """A network type whose change of a layer has a size that can be told and scaled. Neither is differentiated."""

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖ΔW‖, the square root of the sum of squares, at multiplier 1; 0-d."""
        ...

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """Change the weights in place so that ΔW becomes ``factor`` (0-d, above 0) times what it was."""
        ...


@runtime_checkable
class FreezingLayerType(Protocol):
    """A network type of whose weights some stay as they were at birth, or in the file that is trained on."""

    frozen: frozenset[str]
    """Their names in the file, without the layer's."""


@runtime_checkable
class BiasedLayerType(Protocol):
    """A network type that changes biases as well."""

    def bias_delta(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Δb in the shape of ``base.bias``: the change at multiplier 1. None if this layer's is not changed."""
        ...


class Graft(Protocol):
    """An adapter on a model. Removing it leaves the base bit-identical."""

    card: AdapterCard
    model: Model
    multiplier: float
    training: bool

    def parameters(self) -> dict[Part, dict[str, nn.Parameter]]:
        """What is trained, by part and by name in the file."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything the file holds: weights and constants by full key."""
        ...

    def ahead(self) -> AbstractContextManager[None]:
        """For one pass forward and backward: what the pass needs of the adapter's weights alone may be computed before it, once."""
        ...

    def off(self) -> AbstractContextManager[None]:
        """While it lasts, the model answers as the base alone, bit for bit; also within :meth:`ahead`. Nothing may be trained through it."""
        ...

    def lifted(self) -> AbstractContextManager[None]:
        """Off the model for a while, and back on as it was. A graft that trains the model itself stays."""
        ...

    def remove(self) -> None:
        """Take the adapter off."""
        ...
