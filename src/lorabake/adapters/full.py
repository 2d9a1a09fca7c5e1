"""Full fine-tuning as an adapter: the base's own weights are trained, and its checkpoints are whole model folders.

The frozen originals are kept aside, so that taking it off gives the base back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from lorabake.base.cards import Settings
from lorabake.base.errors import UserError
from lorabake.base.lazy import lazy_module
from lorabake.protocols.adapter import AdapterCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lorabake.protocols.family import Model, Part
else:
    torch, nn = lazy_module("torch"), lazy_module("torch.nn")


class FullSettings(Settings):
    """``full`` has no settings of its own."""


class FullGraft:
    """Every weight of the chosen parts, trainable; see :class:`lorabake.protocols.adapter.Graft`.

    A part of which every layer is in the group that network types leave alone is left alone here too: T5, that is.

    Raises:
        UserError: that leaves nothing to train.
    """

    def __init__(self, card: AdapterCard, model: Model, parts: tuple[Part, ...]) -> None:
        self.card, self.model = card, model
        self.multiplier, self.training = 1.0, False
        trainable = {layer.part for layer in model.layers() if layer.group != "other"}
        parts = tuple(part for part in parts if part in trainable)
        if not parts:
            raise UserError(
                f"'{card.name}' finds nothing to train in what was chosen. Give the denoiser a learning rate."
            )
        self._parts = parts
        self._originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        for part in parts:
            for module in model.parts[part].modules():
                for name, original in list(module.named_parameters(recurse=False)):
                    self._originals.append((module, name, original))
                    setattr(module, name, nn.Parameter(original.detach().clone().float()))

    def parameters(self) -> dict[Part, dict[str, nn.Parameter]]:
        """What is trained, by part and by the weight's own name."""
        return {
            part: {f"{part}.{name}": parameter for name, parameter in self.model.parts[part].named_parameters()}
            for part in self._parts
        }

    def tensors(self) -> dict[str, Tensor]:
        """All trained weights, detached, sharing memory with the live ones."""
        return {name: parameter.detach() for named in self.parameters().values() for name, parameter in named.items()}

    def ahead(self) -> AbstractContextManager[None]:
        """Nothing is computed of the weights before a pass."""
        return nullcontext()

    @contextmanager
    def off(self) -> Iterator[None]:
        """The originals, where they were."""
        trained = [(module, name, getattr(module, name)) for module, name, _ in self._originals]
        try:
            for module, name, original in self._originals:
                setattr(module, name, original)
            yield
        finally:
            for module, name, parameter in trained:
                setattr(module, name, parameter)

    def lifted(self) -> AbstractContextManager[None]:
        """It is the model."""
        return nullcontext()

    def remove(self) -> None:
        """Put the originals back."""
        for module, name, original in self._originals:
            setattr(module, name, original)
        self._originals.clear()


CARD = AdapterCard(
    kind="adapter",
    name="full",
    summary="Trains every weight of the model itself (full fine-tuning); saves model folders, not LoRA files.",
    code="lorabake.adapters.full:FullGraft",
    settings=FullSettings,
    saves="model",
    usual_lr=1e-5,
)
