"""Optimizers that find their rate, average or limit themselves: what goes with them, and what is told."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems
from lorabake.recipe import Checked, check_values


def checked(dataset: Path, name: str, /, **sections: dict[str, Any]) -> Checked:
    raw: dict[str, dict[str, Any]] = {"data": {"folder": str(dataset)}, "train": {"device": "cpu"}, **sections}
    return check_values({**raw, "optimizer": {"name": name, **sections.get("optimizer", {})}})


def notes(found: Checked, setting: str) -> list[str]:
    return [warning for warning in found.warnings if warning.startswith(setting)]


@pytest.mark.parametrize("name", ["prodigy", "dadapt-adam", "prodigy-schedule-free"])
def test_who_finds_the_rate_is_given_one(dataset: Path, name: str) -> None:
    found = checked(dataset, name)
    assert (found.recipe.rates.lr, found.recipe.rates.text_encoder_lr) == (1.0, 1.0)
    assert "finds the learning rate itself" in found.recipe.why("optimizer.lr")
    assert notes(found, "optimizer.") == []


@pytest.mark.parametrize("name", ["prodigy", "dadapt-adam", "prodigy-schedule-free"])
def test_another_rate_is_told_of(dataset: Path, name: str) -> None:
    found = checked(dataset, name, optimizer={"lr": 1e-4})
    assert found.recipe.rates.text_encoder_lr == 1e-4
    (lr, text) = notes(found, "optimizer.")
    assert lr.startswith("optimizer.lr = 0.0001:") and text.startswith("optimizer.text_encoder_lr = 0.0001:")
    assert ("d_coef" in lr) == (name != "dadapt-adam")
    assert notes(checked(dataset, name, optimizer={"text_encoder_lr": 0.0}), "optimizer.") == []


@pytest.mark.parametrize(
    "rates",
    [{"lr": 1.0, "text_encoder_lr": 0.5}, {"text_encoder_lr": 0.5}, {"lr": 0.5, "text_encoder_lr": 1.0}],
    ids=str,
)
def test_one_rate_for_all(dataset: Path, rates: dict[str, float]) -> None:
    for name in ("prodigy", "dadapt-adam"):
        with pytest.raises(Problems, match=f"optimizer.text_encoder_lr .*'{name}' finds one learning rate for all"):
            checked(dataset, name, optimizer=rates)
    checked(dataset, "prodigy-schedule-free", optimizer=rates)
    checked(dataset, "lion", optimizer=rates)


def test_rates_that_belong_to_an_optimizer(dataset: Path) -> None:
    assert checked(dataset, "adamw").recipe.rates.lr == 1.5e-3
    assert checked(dataset, "adamw-8bit").recipe.rates.lr == 1.5e-3
    lion = checked(dataset, "lion").recipe
    assert (lion.rates.lr, lion.rates.text_encoder_lr) == (3e-4, 1.5e-4)
    assert lion.why("optimizer.lr").startswith("0.2 times what AdamW takes: ")
    assert checked(dataset, "muon", optimizer={"lr": 1e-3}).recipe.rates.lr == 1e-3


@pytest.mark.parametrize("name", ["adamw-schedule-free", "prodigy-schedule-free"])
def test_who_averages_needs_no_schedule(dataset: Path, name: str) -> None:
    found = checked(dataset, name)
    assert found.recipe.schedule.name == "constant" and "averages" in found.recipe.why("schedule.name")
    assert notes(found, "schedule") == []
    told = notes(checked(dataset, name, schedule={"name": "cosine"}), "schedule.name = 'cosine'")
    assert len(told) == 1 and "averages instead" in told[0]
    assert notes(checked(dataset, name, schedule={"warmup": 0.1}), "schedule") == []
    assert checked(dataset, "adamw").recipe.schedule.name == "cosine"


def test_who_limits_its_updates_is_not_given_cut_gradients(dataset: Path) -> None:
    found = checked(dataset, "prodigy-schedule-free")
    assert found.recipe.train.max_grad_norm == 0 and "limits its updates" in found.recipe.why("train.max_grad_norm")
    assert notes(found, "train") == []
    given = checked(dataset, "prodigy-schedule-free", train={"max_grad_norm": 1.0, "device": "cpu"})
    assert given.recipe.train.max_grad_norm == 1 and len(notes(given, "train.max_grad_norm = 1:")) == 1
    assert checked(dataset, "prodigy").recipe.train.max_grad_norm == 1


def test_a_warm_up_misleads_the_search(dataset: Path) -> None:
    warm = {"warmup": 0.1}
    assert notes(checked(dataset, "prodigy", schedule=warm), "schedule") == []
    bare = checked(dataset, "prodigy", schedule=warm, optimizer={"safeguard_warmup": False})
    assert "Set optimizer.safeguard_warmup = true" in notes(bare, "schedule.warmup")[0]
    assert (
        "begins with tiny steps anyway" in notes(checked(dataset, "dadapt-adam", schedule=warm), "schedule.warmup")[0]
    )


def test_a_package_that_is_not_there_is_missed_with_everything_else(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "prodigyopt" else real(name, *rest)
    )
    with pytest.raises(Problems) as caught:
        checked(dataset, "prodigy", optimizer={"d_ceof": 2}, schedule={"name": "cosin"})
    told = {problem.where: problem.what for problem in caught.value.problems}
    assert "pip install 'lorabake[optimizers]'" in told["optimizer.name"]
    assert "Did you mean 'd_coef'?" in told["optimizer.d_ceof"] and "cosine" in told["schedule.name"]


def test_the_frozen_recipe_says_the_same(dataset: Path) -> None:
    """What was derived for an optimizer is what a run's own recipe gives again."""
    first = checked(dataset, "prodigy-schedule-free").recipe
    again = check_values(first.to_dict()).recipe
    assert again.to_dict() == first.to_dict()
