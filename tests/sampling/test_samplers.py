"""Every model has a sampler, and every sampler its models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import pytest

from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.protocols.family import Prediction
from lorabake.protocols.sampler import SamplerCard
from lorabake.recipe.prompts import Prompt, samplers_for
from lorabake.sampling.samplers import fitting


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_every_model_has_its_samplers(tiny: Callable[..., Any], prediction: Prediction) -> None:
    model = tiny(prediction)
    allowed = samplers_for(prediction)
    assert allowed and fitting(None, prediction) is cards("sampler")[allowed[0]].load()
    for name, card in cards("sampler").items():
        if name not in allowed:
            with pytest.raises(UserError, match=f"'{name}' draws with models that predict .* Allowed: {allowed[0]}"):
                fitting(name, prediction)
            continue
        sampler = fitting(name, prediction)
        assert sampler is card.load()
        legs = sampler.trajectory(model, 5, 16).legs
        assert len(legs) == 5 and all(0 <= leg.timestep <= 1000 for leg in legs)


def test_no_two_are_shown_alike() -> None:
    assert len({cast(SamplerCard, card).shown for card in cards("sampler").values()}) == len(cards("sampler"))


@pytest.mark.parametrize(("prediction", "sampler"), [("epsilon", "ddim"), ("v", "ddim"), ("flow", "flow-euler")])
def test_a_model_fills_only_what_is_open(tiny: Any, prediction: str, sampler: str) -> None:
    facts = tiny(prediction).facts
    guidance = 3.5 if prediction == "flow" else None
    expected = Prompt("a", width=96, height=32, sampler=sampler, cfg=5.0, guidance=guidance)
    assert Prompt("a", width=96).on(facts) == expected
    assert Prompt("a", cfg=1.0).on(facts).cfg == 1.0
    assert Prompt("a", sampler="euler").on(facts).sampler == "euler"
    assert Prompt("a", guidance=0.0).on(facts).on(facts).guidance == 0.0
