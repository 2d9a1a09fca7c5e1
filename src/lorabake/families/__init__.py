"""Model families: one folder each, with the facts in ``card.py`` and the working model in ``model.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.protocols.family import FamilyCard, Model, ModelFacts


def inspect_model(base: str | Path) -> ModelFacts:
    """Facts of the base model at ``base`` (a path, or ``pocket`` for the embedded one), without reading weights.

    Raises:
        UserError: there is nothing there, or no family recognises it.
    """
    path = POCKET_MODEL if str(base) == "pocket" else Path(base).expanduser()
    if not path.exists():
        raise UserError(
            f"'{base}' does not exist. Give a model folder in diffusers layout, or 'pocket' for the embedded model."
        )
    if path.is_file():
        raise UserError(
            f"'{base}' is a file. Give a model folder in diffusers layout (model_index.json beside unet/, vae/ …), or 'pocket'."
        )
    for card in cards("family").values():
        if facts := cast(FamilyCard, card).recognise(path):
            return facts
    raise UserError(
        f"'{base}' is not a model folder that is understood: no family of {', '.join(cards('family'))} recognised it. "
        "A diffusers folder has model_index.json beside unet/, vae/, text_encoder/ and tokenizer/."
    )


def load_model(facts: ModelFacts | str | Path, **options: Any) -> Model:
    """Load the model that ``facts`` (or a path, or ``pocket``) describes. Options are the family's: dtype, device, clip_skip …"""
    if not isinstance(facts, ModelFacts):
        facts = inspect_model(facts)
    return cards("family")[facts.family].load()(facts, **options)
