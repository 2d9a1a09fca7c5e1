"""What every card promises, of whatever kind."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from pydantic import BaseModel

from lorabake.base.cards import ROOMS, Card, Settings, cards
from lorabake.protocols.family import Prediction
from lorabake.protocols.objective import RULES, ObjectiveCard, RuleCard
from lorabake.protocols.sampler import SamplerCard

ALL = [card for kind in ROOMS for card in cards(kind).values()]
every = pytest.mark.parametrize("card", ALL, ids=lambda card: f"{card.kind} {card.name}")


def test_every_kind_has_a_part() -> None:
    assert {card.kind for card in ALL} == ROOMS.keys()


@every
def test_it_has_a_name_to_write_and_a_line_to_read(card: Card) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.name)
    assert card.summary.endswith(".") and card.summary[0].isupper()
    assert "\n" not in card.summary and len(card.summary) < 160


@every
def test_its_code_loads(card: Card) -> None:
    if card.extra:
        pytest.importorskip(card.code.partition(":")[0])
    code = card.load()
    assert callable(code) or (isinstance(card, SamplerCard) and callable(code.trajectory) and callable(code.step))


@every
def test_its_settings_are_usable_as_they_are(card: Card) -> None:
    settings = card.settings()
    assert card.settings.model_validate(settings.model_dump(mode="json")) == settings
    assert issubclass(card.settings, Settings)
    with pytest.raises(ValueError):
        card.settings.model_validate({"no such setting": 1})


@every
def test_its_settings_are_documented_field_by_field(card: Card) -> None:
    for name, field in card.settings.model_fields.items():
        assert field.description and field.description.strip().endswith("."), name
        assert not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)), f"{name} is nested"


@every
def test_its_settings_cannot_be_changed(card: Card) -> None:
    settings = card.settings()
    for name in card.settings.model_fields:
        with pytest.raises(ValueError):
            setattr(settings, name, None)


@every
def test_a_rule_is_for_some_models_and_reads_settings_that_are_there(card: Card) -> None:
    if card.kind not in RULES:
        return
    assert isinstance(card, RuleCard) and set(card.predictions) <= set(get_args(Prediction))
    objectives = [made for made in cards("objective").values() if isinstance(made, ObjectiveCard)]
    for prediction in card.predictions:
        (serving,) = (made for made in objectives if prediction in made.predictions)
        assert {card.kind, *card.reads} <= serving.settings.model_fields.keys()
