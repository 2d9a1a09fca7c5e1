"""Settings that are for what a family's models do not have: told before a run, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from lorabake.families import family_card
from lorabake.recipe import check


def test_a_setting_for_layers_that_the_model_has_not_is_told(kitchen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(kitchen.folder)
    plain = check(kitchen.recipe)
    given = check(kitchen.recipe, ["adapter.conv_rank=2", "adapter.conv_alpha=1"])
    more = [note for note in given.warnings if note not in plain.warnings]
    if "resnet" in family_card(plain.facts).groups:
        assert not more
    else:
        whole = "has no residual blocks with convolutions (its family is"
        rank, alpha = more
        assert rank.startswith("adapter.conv_rank = 2 does nothing: ") and whole in rank
        assert alpha.startswith("adapter.conv_alpha = 1.0 does nothing: ") and whole in alpha
