"""Model families: one folder each, with the facts in ``card.py`` and the working model in ``model.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorabake.base.cards import cards
from lorabake.base.errors import Problem, Problems, UserError
from lorabake.base.machine import Device, Precision, check_device, usual_device, usual_precision
from lorabake.base.places import POCKET_MODEL, expanded
from lorabake.families.networks.describe import describe
from lorabake.protocols.family import FamilyCard, Model, ModelFacts, ModelSource, Part, Prediction, Reader, TextOptions

if TYPE_CHECKING:
    from lorabake.families.networks.footprint import Footprint

_BASES = "Give a .safetensors file, a model folder in diffusers layout, or 'pocket' for the embedded model."
_PARTS = "Give a .safetensors file or a folder."


def inspect_model(
    base: str | Path,
    vae: str | Path | None = None,
    text_encoders: Sequence[str | Path] = (),
    prediction: Prediction | None = None,
) -> ModelFacts:
    """Facts of a base model, without reading its weights.

    Args:
        base: a single ``.safetensors`` file, a folder in diffusers layout, or ``pocket`` for the embedded model.
        vae: an autoencoder to use in place of its own, a file or folder.
        text_encoders: text encoders to use in place of its own, files or folders.
        prediction: what it predicts, where the files do not say it or are wrong.

    Raises:
        Problems: a path does not exist; all of them are named.
        UserError: no family recognises the base, or the one that does cannot use it; the message says what it is.
    """
    source = ModelSource(
        base=POCKET_MODEL if str(base) == "pocket" else expanded(base),
        vae=expanded(vae) if vae is not None else None,
        text_encoders=tuple(expanded(path) for path in text_encoders),
        prediction=prediction,
    )
    named = [("base", source.base), ("vae", source.vae), *(("text_encoders", path) for path in source.text_encoders)]
    if missing := [
        Problem(name, f"'{path}' does not exist. {_BASES if name == 'base' else _PARTS}")
        for name, path in named
        if path and not path.exists()
    ]:
        raise Problems("The model", missing)
    for card in cards("family").values():
        if facts := cast(FamilyCard, card).recognise(source):
            return facts
    raise UserError(f"'{base}' cannot be trained on: {describe(source.base)}")


def load_model(facts: ModelFacts | str | Path, *, late: bool = False, **options: Any) -> Model:
    """Load the model that ``facts`` (or a path, or ``pocket``) describes. Options are the family's: dtype, device, clip_skip …

    With ``late``, all of it rests at first: weights are read when they are needed (:meth:`~lorabake.protocols.family.Model.wake`).
    """
    if not isinstance(facts, ModelFacts):
        facts = inspect_model(facts)
    load = family_card(facts).load()
    if not late:
        return load(facts, **options)
    from lorabake.families.networks.residence import late as rested

    with rested():
        return load(facts, **options)


def load_on(
    facts: ModelFacts,
    device: Device | None = None,
    precision: Precision | None = None,
    *,
    blocks_to_swap: int = 0,
    on_note: Callable[[str], None] = lambda note: None,
    **options: Any,
) -> Model:
    """Load the model that ``facts`` describe to draw with it.

    Args:
        facts: the model.
        device: where; None is the GPU if there is one.
        precision: of its weights and activations; None is what is usual there.
        blocks_to_swap: so many of the denoiser's blocks wait in main memory until their turn, 0 or at least 3.
        on_note: told how much waits, and where that saves nothing.
        **options: the family's other options: clip_skip …

    Raises:
        UserError: there is no such device, or there are too few blocks to swap.
    """
    import torch

    device = device or usual_device()[0]
    check_device(device, "device")
    if why := too_few_to_swap(blocks_to_swap):
        raise UserError(f"blocks_to_swap is {why}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision or usual_precision(device)[0]]
    if not blocks_to_swap:
        return load_model(facts, device=device, dtype=dtype, **options)
    model = load_model(facts, late=True, device=device, dtype=dtype, **options)
    told = model.swap_blocks(blocks_to_swap)  # before any weight is read: there may be no room for all of them
    model.wake([*model.parts, "vae"])
    on_note(f"blocks_to_swap: {told()}{' On a CPU that saves nothing.' if device == 'cpu' else ''}")
    return model


def footprint(facts: ModelFacts, precision: str = "fp32", **options: Any) -> Footprint:
    """Bytes of the weights of the model that ``facts`` describe, as they are and in fewer bits; no weight is read.

    Args:
        facts: the model.
        precision: of its weights, ``fp32``, ``bf16`` or ``fp16``.
        **options: the family's other options: clip_skip …

    Raises:
        Problems: the files' tensors are not the network's; all of them are named.
    """
    import torch

    from lorabake.families.networks.footprint import footprint as of

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return of(load_model(facts, late=True, dtype=dtype, device="cpu", **options))


def too_few_to_swap(count: int) -> str:
    """What is wrong with a number of blocks that are to wait in main memory; empty where nothing is."""
    if count == 0 or count > 2:
        return ""
    return f"{count}: two blocks are on the card at any time, so that fewer than 3 save nothing. Give 3 or more, or 0."


def family_card(facts: ModelFacts) -> FamilyCard:
    """The card of the family that recognised a model."""
    return cast(FamilyCard, cards("family")[facts.family])


def caption_readers(facts: ModelFacts, options: TextOptions | None = None) -> Mapping[Part, Reader]:
    """What each text encoder of the model that ``facts`` describes sees of captions; no weights are read.

    Args:
        facts: the model.
        options: it would be loaded with.

    Raises:
        UserError: the model's tokenizer files are missing or broken.
    """
    return family_card(facts).readers(facts, options or {})
