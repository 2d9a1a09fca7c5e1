"""What a recipe leaves open is filled in, with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import UserError
from lorabake.dataset.augment import USUAL_VIEWS
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
    changed = {name for name, _, _ in after.differences(before.to_dict())}
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
        ("data", "augment", {"random_crop": True, "views": 3}),
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


@pytest.mark.parametrize(
    ("adapter", "small", "large"),
    [("boft", 3e-4, 2e-5), ("glora", 7.5e-4, 5e-5), ("oft", 1.5e-3, 1e-4), ("ia3", 5e-3, 5e-3)],
)
def test_a_small_model_takes_a_higher_rate_within_reason(adapter: str, small: float, large: float) -> None:
    made = recipe(adapter={"name": adapter})
    assert (resolve(made, FACTS).rates.lr, resolve(made, LARGE).rates.lr) == (small, large)


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


def test_inside_a_table_each_value_has_its_own_reason() -> None:
    after = resolve(recipe(data={"folder": "mira", "buckets": {"step": 64}, "augment": {"random_crop": True}}), LARGE)
    assert after.why("data.buckets.resolution") == "sd15 works at 768 px"
    assert "given in the recipe" in after.why("data.buckets.step")
    assert "given in the recipe" in after.why("data.buckets.upscale")
    assert after.why("data.augment.views").startswith(f"{USUAL_VIEWS} views of each picture")
    assert after.why("data.buckets") == "resolution: sd15 works at 768 px"
    several = resolve(recipe(data={"folder": "mira", "buckets": {"resolutions": [512, 640]}}), LARGE)
    assert several.why("data.buckets.resolution") == "the largest of resolutions"
    assert several.why("data.buckets.step") == "sd15 takes sides in such steps"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("optimizer.lrr", "optimizer.lr"), ("data.buckets.resolutoin", "data.buckets.resolution"), ("tain", "train")],
)
def test_reasons_of_what_is_no_setting(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"The recipe has no setting '{name}'. Did you mean '{meant}'"):
        resolve(recipe(), FACTS).why(name)


def test_every_setting_can_be_asked_about() -> None:
    after = resolve(recipe(), FACTS)
    for section, values in after.to_dict().items():
        for name in values:
            assert after.why(f"{section}.{name}")
    assert "given in the recipe" in after.why("train.max_weight_norm"), "one that has no value, too"
