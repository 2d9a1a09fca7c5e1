"""Putting layer-by-layer network types onto a model and taking them off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorabake.adapters._ahead import Stack, make, stacks_of
from lorabake.adapters._kernels import with_weight
from lorabake.adapters._names import by_layer
from lorabake.base import patterns
from lorabake.base.cards import Settings
from lorabake.base.errors import UserError
from lorabake.base.streams import torch_stream
from lorabake.protocols.adapter import AdapterCard, ByLayer, FreezingLayerType, LayerType
from lorabake.protocols.family import Layer, Model, Part


@dataclass(frozen=True, slots=True)
class Change:
    """What a network type does to one layer: its settings there, its weights and what is fixed."""

    layer: Layer
    settings: Settings
    weights: dict[str, nn.Parameter]
    """Those that the network type freezes among them."""
    constants: dict[str, Tensor]


class GraftedLayer(nn.Module):
    """Stands where a layer stood and holds it unchanged. ``origin`` is the model's own layer, below any other grafts."""

    def __init__(self, graft: LayerGraft, base: nn.Module, change: Change) -> None:
        super().__init__()
        self.base = base
        self.change = change
        self.changed_weight: Tensor | None = None
        """What is computed with, while :meth:`LayerGraft.ahead` has made it."""
        self._tensors: dict[str, Tensor] = {**change.weights, **change.constants}
        self._graft = (graft,)  # in a tuple: a module would register its owner as a child

    @property
    def origin(self) -> nn.Module:
        """The model's own layer."""
        return self.change.layer.module

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Weights and constants of the change, live."""
        return self._tensors

    @property
    def settings(self) -> Settings:
        """Of the change."""
        return self.change.settings

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output, changed."""
        if self.changed_weight is not None:
            return with_weight(self.base, x, self.changed_weight)  # pyright: ignore[reportArgumentType]
        (graft,) = self._graft
        if graft.multiplier == 0:
            return self.base(x)
        return graft.layer_type.forward(
            self.base, x, self._tensors, graft.multiplier, self.change.settings, graft.training
        )


class LayerGraft:
    """A layer-by-layer adapter on a model; see :class:`lorabake.protocols.adapter.Graft`."""

    def __init__(self, card: AdapterCard, layer_type: LayerType, model: Model, changes: Iterable[Change]) -> None:
        self.card, self.layer_type, self.model = card, layer_type, model
        self.multiplier, self.training = 1.0, False
        self._grafted: list[GraftedLayer] = []
        self._stacks: list[Stack] | None = None
        for change in changes:
            root, path = model.parts[change.layer.part], change.layer.path
            grafted = GraftedLayer(self, root.get_submodule(path), change)
            _replace(root, path, grafted)
            self._grafted.append(grafted)

    @property
    def layers(self) -> Sequence[GraftedLayer]:
        """Every changed layer, in the model's order."""
        return self._grafted

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """For one pass forward and backward: what small layers compute with is made before, for all of them at once.

        Within it neither the adapter's weights nor ``multiplier`` nor ``training`` may change.
        """
        if self._stacks is None:
            self._stacks = stacks_of(self._grafted)
        try:
            if self.multiplier:
                make(self._stacks, self.layer_type, self.multiplier, self.training)
            yield
        finally:
            for stack in self._stacks:
                for layer in stack.layers:
                    layer.changed_weight = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base alone, also where its weights have been changed ahead."""
        multiplier = self.multiplier
        ahead = [(layer, layer.changed_weight) for layer in self._grafted]
        try:
            self.multiplier = 0.0
            for layer, _ in ahead:
                layer.changed_weight = None
            yield
        finally:
            self.multiplier = multiplier
            for layer, changed in ahead:
                layer.changed_weight = changed

    @property
    def changes(self) -> Sequence[Change]:
        """What it does to each layer."""
        return [grafted.change for grafted in self._grafted]

    def parameters(self) -> dict[Part, dict[str, nn.Parameter]]:
        """What is trained, by part and by name in the file."""
        found: dict[Part, dict[str, nn.Parameter]] = {}
        frozen = _frozen(self.layer_type)
        for change in (grafted.change for grafted in self._grafted):
            trained = {name: weight for name, weight in change.weights.items() if name not in frozen}
            named = {f"{change.layer.key}.{name}": parameter for name, parameter in trained.items()}
            found.setdefault(change.layer.part, {}).update(named)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All weights and constants by full key, detached, sharing memory with the live ones."""
        found: dict[str, Tensor] = {}
        for change in (grafted.change for grafted in self._grafted):
            for name, tensor in {**change.weights, **change.constants}.items():
                found[f"{change.layer.key}.{name}"] = tensor.detach()
        return found

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Off the model for a while; what is grafted meanwhile must come off before."""
        places = [(self.model.parts[grafted.change.layer.part], grafted) for grafted in self._grafted]
        for root, grafted in places:
            assert root.get_submodule(grafted.change.layer.path) is grafted, "another graft lies on it"
            _replace(root, grafted.change.layer.path, grafted.base)
        try:
            yield
        finally:
            for root, grafted in places:
                _replace(root, grafted.change.layer.path, grafted)

    def remove(self) -> None:
        """Take the adapter off: the layers below come back as they were.

        Grafts come off in any order: one that lies under another is taken out from below it.
        """
        for grafted in self._grafted:
            layer = grafted.change.layer
            holder: nn.Module = self.model.parts[layer.part]
            path = layer.path
            while (found := holder.get_submodule(path)) is not grafted:
                holder, path = found, "base"
            _replace(holder, path, grafted.base)
        self._grafted.clear()
        self._stacks = None


def graft_newborn(
    card: AdapterCard, layer_type: LayerType, model: Model, settings: Settings, *, seed: int, parts: tuple[Part, ...]
) -> LayerGraft:
    """A new adapter on every layer of ``parts`` that the type fits; the model's output stays as it was.

    Raises:
        UserError: no layer fits.
    """
    there = [layer for layer in model.layers() if layer.part in parts]
    for name, field in type(settings).model_fields.items():
        table = getattr(settings, name) if ByLayer() in field.metadata else None
        if not (unused := patterns.idle(table, (layer.names for layer in there))):
            continue
        raise UserError(
            f"adapter.{name}: '{unused[0]}' is in no name of a layer that is trained. Names are such as "
            f"{' and '.join(repr(name) for name in there[0].names)}. Nothing was started."
        )
    layers = [layer for layer in there if layer_type.fits(layer, settings)]
    if not layers:
        raise UserError(
            f"'{card.name}' finds no layer to train in the model's {' and '.join(parts) or 'nothing'}. Check the adapter's settings."
        )

    frozen = _frozen(layer_type)

    def changes() -> Iterable[Change]:
        for index, layer in enumerate(layers):
            weights, constants = layer_type.create(layer, settings, torch_stream(seed, "adapter", index))
            yield Change(
                layer,
                settings,
                {name: nn.Parameter(tensor.to(model.device), name not in frozen) for name, tensor in weights.items()},
                constants,
            )

    return LayerGraft(card, layer_type, model, list(changes()))


def graft_tensors(
    card: AdapterCard,
    layer_type: LayerType,
    model: Model,
    tensors_by_layer: Mapping[str, Mapping[str, Tensor]],
    multiplier: float,
) -> LayerGraft:
    """An adapter from a file's tensors, each layer with the rank its own tensors have. Nothing is trained.

    Raises:
        UserError: the file has layers or shapes that this model has not, or tensors that this type has not, or lacks some.
    """
    known = {layer.key: layer for layer in model.layers()}
    named = by_layer(model.layers(), tensors_by_layer)

    def changes() -> Iterable[Change]:
        for key, tensors in named.items():
            try:
                settings = layer_type.settings_of(tensors)
            except KeyError as error:
                raise UserError(f"The adapter file is not whole: '{key}.{error.args[0]}' is missing.") from error
            newborn, constants = layer_type.create(known[key], settings, torch.Generator())
            if odd := sorted(tensors.keys() - newborn.keys() - constants.keys()):
                raise UserError(
                    f"The adapter file holds what '{card.name}' does not know: '{key}.{odd[0]}'. Applied without it, pictures would differ."
                )
            for name, tensor in newborn.items():
                if name not in tensors:
                    raise UserError(f"The adapter file is not whole: '{key}.{name}' is missing.")
                _check_shape(f"{key}.{name}", tensors[name], tensor)
            weights = {
                # Copied into newborn ones: those lie in memory as in training, and aligned. Products would differ in the last bit.
                name: nn.Parameter(tensor.copy_(tensors[name]).to(model.device), requires_grad=False)
                for name, tensor in newborn.items()
            }
            yield Change(
                known[key],
                settings,
                weights,
                {name: _constant(tensors.get(name, value)) for name, value in constants.items()},
            )

    graft = LayerGraft(card, layer_type, model, list(changes()))
    graft.multiplier = multiplier
    return graft


def _constant(tensor: Tensor) -> Tensor:
    """float32; whole numbers stay such."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _frozen(layer_type: LayerType) -> frozenset[str]:
    return layer_type.frozen if isinstance(layer_type, FreezingLayerType) else frozenset()


def _check_shape(name: str, given: Tensor, expected: Tensor) -> None:
    if given.shape != expected.shape:
        raise UserError(
            f"The adapter file does not fit: '{name}' is {tuple(given.shape)}, expected {tuple(expected.shape)}."
        )


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
