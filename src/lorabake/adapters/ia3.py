"""(IA)³: every output of a layer, or every input, is scaled by 1 + w with a number of its own. W' = (1 + w) ∘ W; biases stay.

Source: Liu et al. 2022, arXiv 2205.05638; names and shapes of the file's tensors as in LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import field_validator

from lorabake.adapters._outputs import OutputType
from lorabake.adapters._ranks import CONVOLUTIONS, SHAPES, LayerSettings, is_spatial
from lorabake.base import patterns
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard, ByLayer
from lorabake.protocols.family import Layer

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")


class Ia3Settings(LayerSettings):
    """Settings of ``ia3``."""

    side: Annotated[Literal["outputs", "inputs"], SHAPES] = "outputs"
    """What of a layer is scaled: what it gives, or what it gets."""
    block_side: Annotated[dict[str, Literal["outputs", "inputs", "neither"]] | None, SHAPES, ByLayer()] = None
    """Table of sides for some layers: pattern = side; neither leaves them alone. A pattern is a piece of a layer's name (mid_block, to_k) or a
    regular expression; the first that is found decides. The paper scales keys, values, and inputs of the second feed-forward layer: in Stable
    Diffusion {"to_[kv]|[kv]_proj" = "outputs", "net.2|fc2" = "inputs", "." = "neither"}."""
    convolutions: Annotated[bool, SHAPES, CONVOLUTIONS] = False
    """Also change convolutions and residual blocks. Adds little to the file; helps styles and textures."""

    @field_validator("block_side")
    @classmethod
    def _has_patterns(cls, table: dict[str, str] | None) -> dict[str, str] | None:
        patterns.checked(table)
        return table

    def metadata(self) -> dict[str, Any]:
        """As LyCORIS tells it."""
        arguments = {
            "algo": "ia3",
            "train_on_input": self.side == "inputs",
            "block_side": self.block_side,
            "module_dropout": self.module_dropout,
        }
        return {"network_args": {name: value for name, value in arguments.items() if value}}

    def side_of(self, layer: Layer) -> str:
        """What is scaled of a layer: outputs, inputs or neither."""
        if not isinstance(layer.module, nn.Linear | nn.Conv2d) or layer.group == "other":
            return "neither"
        chosen = patterns.decide(self.block_side, layer.names)
        if chosen is None and not self.convolutions and (layer.group == "resnet" or is_spatial(layer.module)):
            return "neither"
        return chosen or self.side


class Ia3(OutputType):
    """The :class:`~lorabake.protocols.adapter.LayerType` of (IA)³."""

    def fits(self, layer: Layer, settings: Ia3Settings) -> bool:
        """Linear layers and convolutions of which a side is chosen. A grouped convolution's inputs have no place in the file."""
        side = settings.side_of(layer)
        return side == "outputs" or (side == "inputs" and getattr(layer.module, "groups", 1) == 1)

    def create(
        self, layer: Layer, settings: Ia3Settings, generator: Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All zero: scaled by one."""
        weight: Any = layer.module.weight
        on_input = settings.side_of(layer) == "inputs"
        numbers = torch.zeros(weight.shape[1 if on_input else 0])
        if weight.dim() > 2:
            numbers = numbers.view(1, -1, *(1 for _ in weight.shape[2:]))
        return {"weight": numbers}, {"on_input": torch.tensor(int(on_input))}

    def added(self, rows: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """Rows times m·w, for outputs."""
        return rows * (_column(tensors["weight"]) * multiplier).to(rows.dtype)

    def work(self, tensors: Mapping[str, Tensor]) -> int:
        """A pass over the numbers, and two backward."""
        return 20

    def change(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """w ∘ W."""
        numbers = tensors["weight"]
        if not tensors["on_input"]:
            return super().change(weight, tensors)
        return weight * (numbers.unsqueeze(-2) if weight.dim() in (2, 3) else numbers)

    def changed(self, weight: Tensor, tensors: Mapping[str, Tensor], multiplier: float) -> Tensor:
        """(1 + m·w) ∘ W, float32."""
        return torch.add(weight.float(), self.change(weight.float(), tensors), alpha=multiplier)

    def forward(
        self,
        base: nn.Module,
        x: Tensor,
        weights: Mapping[str, Tensor],
        multiplier: float,
        settings: Any,
        training: bool,
    ) -> Tensor:
        """The output scaled without its bias; or what is made of the scaled input."""
        if not weights["on_input"]:
            return super().forward(base, x, weights, multiplier, settings, training)
        if training and settings.module_dropout and torch.rand(()) < settings.module_dropout:
            return base(x)
        origin: Any = getattr(base, "origin", base)  # below other adapters, if there are any
        numbers = weights["weight"] * multiplier
        if base is origin and x.dtype == torch.float32:
            return base(x * (1 + numbers))
        # A small w would be rounded away beside 1 in half precision, and other adapters must get the input as it is.
        scaled = x * numbers.to(x.dtype)
        change = origin(scaled)
        if origin.bias is not None:
            change = change - origin.bias.view((-1, 1, 1) if isinstance(origin, nn.Conv2d) else (-1,)).to(change.dtype)
        return base(x) + change

    def change_norm(self, base: nn.Module, weights: Mapping[str, Tensor]) -> Tensor:
        """‖w ∘ W‖."""
        frozen: Any = base.weight
        return torch.linalg.vector_norm(self.change(frozen.float(), weights))

    def scale_change(self, weights: Mapping[str, Tensor], factor: Tensor) -> None:
        """The numbers times the factor."""
        weights["weight"].mul_(factor)

    def settings_of(self, weights: Mapping[str, Tensor]) -> Ia3Settings:
        """The side as the tensors have it."""
        on_input, _ = weights["on_input"], weights["weight"]
        return Ia3Settings.model_construct(side="inputs" if on_input else "outputs", convolutions=True)


def _column(numbers: Tensor) -> Tensor:
    """w beside the rows of a weight, (…, out, 1): it is (out) or (1, out, 1, 1), each behind an axis of layers if there is one."""
    return (numbers if numbers.dim() < 3 else numbers.flatten(-4)).unsqueeze(-1)


CARD = AdapterCard(
    kind="adapter",
    name="ia3",
    summary="Scales each output or input of a layer by one number: files of some hundred KB, for styles; ComfyUI cannot read them.",
    code="lorabake.adapters.ia3:Ia3",
    settings=Ia3Settings,
    network_module="lycoris.kohya",
    usual_lr=5e-3,
)
