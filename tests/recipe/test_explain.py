"""Every setting, section and part can be asked about."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorabake.base.cards import ROOMS, cards
from lorabake.base.errors import UserError
from lorabake.recipe.explain import explain
from lorabake.recipe.sections import PARTS, SECTIONS

SETTINGS = sorted({entry["name"] for section in [*SECTIONS, *PARTS] for entry in explain(section)})


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_explained(name: str) -> None:
    for entry in explain(name):
        assert entry["name"] == name and entry["text"].endswith(".")
        assert entry["type"] and isinstance(entry["allowed"], str)
        assert entry["default"] is None or isinstance(entry["default"], int | float | str)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (kind, name)
        for kind in ROOMS
        for name in cards(kind)
        if kind not in PARTS or cards(kind)[name].settings.model_fields
    ],
)
def test_every_part_is_explained(kind: str, part: str) -> None:
    assert explain(part)


def test_settings_of_every_section_are_there() -> None:
    assert {"adapter.rank", "adapter.name", "optimizer.lr", "optimizer.betas", "data.buckets.resolution", "data.captions.shuffle",
            "train.length", "save.every", "sample.prompts", "output.name", "model.base", "schedule.warmup"} <= set(SETTINGS)  # fmt: skip


def test_one_in_full() -> None:
    (entry,) = (entry for entry in explain("lora") if entry["name"] == "adapter.rank")
    assert entry | {"text": ""} == {
        "name": "adapter.rank", "part": "lora", "type": "whole number", "default": 16, "allowed": "≥ 1, ≤ 1024", "text": ""
    }  # fmt: skip
    (entry,) = explain("train.length")
    assert entry["type"] == '"N epochs" or "N steps"' and entry["default"] == "10 epochs"
    (entry,) = explain("save.dtype")
    assert entry["type"] == "text" and entry["allowed"] == "one of fp16, bf16, fp32"


def test_what_several_parts_have_alike_is_told_once() -> None:
    (entry,) = explain("adapter.module_dropout")
    assert {"loha", "lora"} <= set(entry["part"].split(", "))


def test_rules_are_named_where_one_is_chosen() -> None:
    for entry in explain("objective.loss"):
        assert entry["allowed"] == "one of huber, l1, l2, smooth-l1"


def test_what_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"'adapter.rnak' is not a setting, section or part\. Did you mean 'adapter.rank'\?"
    ):
        explain("adapter.rnak")


def test_the_order_is_always_the_same() -> None:
    """Sets of text are ordered by a number that every process draws anew."""
    code = (
        "from lorabake.recipe.explain import _entries; print([(entry['name'], entry['part']) for entry in _entries()])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1
