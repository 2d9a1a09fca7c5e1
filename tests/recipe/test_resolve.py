"""What a recipe leaves open is filled in, with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorabake.families import inspect_model
from lorabake.protocols.family import ModelFacts
from lorabake.recipe.load import parse_sections
from lorabake.recipe.recipe import Recipe
from lorabake.recipe.resolve import resolve

FACTS = inspect_model("pocket")
LARGE = replace(FACTS, name="sd15", resolution=768, pixel_step=32, small=False)


def recipe(**raw: Any) -> Recipe:
    problems: list = []
    values = parse_sections({"data": {"folder": "mira"}, **raw}, problems)
    assert problems == []
    return Recipe(**values)


@pytest.mark.parametrize("facts", [FACTS, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    "raw", [{}, {"adapter": {"name": "full"}}, {"optimizer": {"lr": 2e-4}}, {"train": {"device": "cuda"}}], ids=str
)
def test_nothing_is_left_open_and_everything_has_a_reason(facts: ModelFacts, raw: dict[str, Any]) -> None:
    before = recipe(**raw)
    after = resolve(before, facts)
    assert resolve(after, facts) == after
    changed = {
        name.rpartition(".")[0] if name.startswith("data.buckets.") else name
        for name, _, _ in after.differences(before.to_dict())
    }
    assert changed == after.reasons.keys()
    assert all(reason and not reason.endswith(".") for reason in after.reasons.values())
    for section, name in (("optimizer", "lr"), ("optimizer", "text_encoder_lr"), ("train", "device"), ("train", "precision"),
                          ("train", "threads"), ("output", "name")):  # fmt: skip
        assert after.to_dict()[section][name] is not None


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("optimizer", "lr", 3e-4),
        ("optimizer", "text_encoder_lr", 0.0),
        ("train", "precision", "bf16"),
        ("train", "device", "cpu"),
        ("train", "threads", 3),
        ("output", "name", "other"),
        ("data", "buckets", {"resolution": 128, "step": 64}),
    ],
)
def test_what_was_given_stays_and_has_no_reason_of_ours(section: str, name: str, value: Any) -> None:
    given = {"data": {"folder": "mira"}}
    given[section] = {**given.get(section, {}), name: value}
    after = resolve(recipe(**given), FACTS)
    kept = after.to_dict()[section][name]
    assert kept == value or {key: kept[key] for key in value} == value
    assert f"{section}.{name}" not in after.reasons
    assert "given in the recipe" in after.why(f"{section}.{name}")


def test_values() -> None:
    small, large = resolve(recipe(), FACTS), resolve(recipe(), LARGE)
    assert (small.rates.lr, large.rates.lr) == (1.5e-3, 1e-4)
    assert small.rates.text_encoder_lr == pytest.approx(0.75e-3)
    assert resolve(recipe(adapter={"name": "full"}), LARGE).rates.lr == 1e-5
    assert large.data.buckets.resolution == 768 and large.data.buckets.step == 32
    assert small.train.threads == 1
    assert "narrow" in small.why("optimizer.lr")


def test_one_bucket_setting_leaves_the_others_to_the_model() -> None:
    after = resolve(recipe(data={"folder": "mira", "buckets": {"upscale": False}}), LARGE)
    assert (after.data.buckets.resolution, after.data.buckets.step, after.data.buckets.upscale) == (768, 32, False)


@pytest.mark.parametrize(
    ("folder", "name"), [("a:b", "a_b"), (".hidden", "hidden"), ("/", "lora"), ("mira ", "mira"), ("すず", "すず")]
)
def test_any_folders_name_makes_a_file_name(folder: str, name: str) -> None:
    after = resolve(recipe(data={"folder": str(Path("/x") / folder)}), FACTS)
    assert after.output.name == name
    recipe(output={"name": name})  # it would be accepted if given


def test_differences_name_the_settings() -> None:
    ours, theirs = recipe(adapter={"rank": 8}), recipe(adapter={"rank": 4, "dropout": 0.1})
    assert ours.differences(theirs.to_dict()) == [("adapter.dropout", 0.0, 0.1), ("adapter.rank", 8, 4)]
    assert ours.differences(ours.to_dict()) == []
