"""The base model decides what can be trained of it, and what was said otherwise is named."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from lorabake.base.cards import cards
from lorabake.base.errors import Problem, Problems
from lorabake.families import inspect_model
from lorabake.protocols.family import Prediction
from lorabake.protocols.objective import RULES, ObjectiveCard
from lorabake.recipe import Checked, check_values, explain
from lorabake.recipe.load import parse_sections
from lorabake.recipe.objectives import default_objective

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
OBJECTIVES = cast("dict[str, ObjectiveCard]", cards("objective"))


def parsed(prediction: Prediction | None, **objective: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Sections of a recipe with this objective, and what is wrong with them by place."""
    found: list[Problem] = []
    values = parse_sections({"data": {"folder": "x"}, "objective": objective}, found, prediction)
    assert len({problem.where for problem in found}) == len(found), "one problem a place"
    return values, {problem.where: problem.what for problem in found}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_gets_the_objective_that_serves_it(prediction: Prediction) -> None:
    values, wrong = parsed(prediction)
    assert wrong == {}
    assert prediction in OBJECTIVES[values["objective"].name].predictions
    assert values["reasons"] == {"objective.name": f"the base model predicts {prediction}"}


def test_every_prediction_has_one_objective() -> None:
    served = [prediction for card in OBJECTIVES.values() for prediction in card.predictions]
    assert sorted(served) == sorted(PREDICTIONS)
    assert (default_objective("v"), default_objective("flow")) == ("diffusion", "flow")


def test_a_recipe_can_be_read_without_its_model() -> None:
    values, wrong = parsed(None)
    assert wrong == {} and values["objective"].name in OBJECTIVES and "reasons" not in values


def test_a_named_objective_has_no_reason_of_ours() -> None:
    values, wrong = parsed("flow", name="flow")
    assert wrong == {} and values["objective"].name == "flow" and "reasons" not in values


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_of_other_models_is_one_problem(prediction: Prediction, name: str) -> None:
    card = OBJECTIVES[name]
    _, wrong = parsed(prediction, name=name)
    if prediction in card.predictions:
        assert wrong == {}
        return
    (right,) = (other for other, card in OBJECTIVES.items() if prediction in card.predictions)
    assert wrong == {
        "objective.name": f"'{name}' is for models that predict {' or '.join(card.predictions)}; the base model predicts {prediction}. "
        f"Allowed: {right}. Leave the name out to train what the model was made for."
    }


@pytest.mark.parametrize(
    ("prediction", "rule", "given", "allowed"),
    [("flow", "weighting", "min-snr", "learned, none"),
     ("epsilon", "weighting", "epsilon-like", "debiased, learned, min-snr, none, p2, soft-min-snr"),
     ("epsilon", "timesteps", "flux-shift", "logit-normal, sigmoid, stratified, uniform"),
     ("v", "timesteps", "resolution-shift", "logit-normal, sigmoid, stratified, uniform")],
)  # fmt: skip
def test_a_rule_of_other_models_is_named(prediction: Prediction, rule: str, given: str, allowed: str) -> None:
    _, wrong = parsed(prediction, **{rule: given})
    assert list(wrong) == [f"objective.{rule}"]
    what = wrong[f"objective.{rule}"]
    assert f"'{given}' is for models that predict " in what and f"the base model predicts {prediction}" in what
    assert f"Allowed: {allowed}." in what


def test_every_rule_and_setting_of_the_other_objective_at_once() -> None:
    _, wrong = parsed("flow", weighting="min-snr", min_snr_gamma=3.0, timesteps="uniforn", loss="l3", logit_std=-1)
    assert wrong.keys() == {"objective.min_snr_gamma", "objective.logit_std"}
    assert wrong["objective.min_snr_gamma"].startswith("not a setting of 'flow'.")
    _, wrong = parsed("flow", weighting="min-snr", timesteps="uniforn", loss="l3", huber_schedule="snrr", noise="loud")
    assert wrong.keys() == {f"objective.{rule}" for rule in RULES}
    assert wrong["objective.timesteps"] == "'uniforn' is not known. Did you mean 'uniform'?"


@pytest.mark.parametrize(
    ("given", "where", "why"),
    [
        ({"noise": "pyramid", "noise_offset": 0.1}, "noise_offset", "0.1 would do nothing: it is for noise 'offset', and noise is 'pyramid'."),
        ({"noise": "offset", "pyramid_iterations": 8}, "pyramid_iterations", "8 would do nothing: it is for noise 'pyramid', and noise is 'offset'."),
        ({"noise_offset": 0.1}, "noise_offset", "0.1 would do nothing: it is for noise 'offset', and noise is 'gaussian'."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_there_is_one_kind_of_noise(prediction: Prediction, given: dict[str, Any], where: str, why: str) -> None:
    _, wrong = parsed(prediction, **given)
    tail = f"Choose that, or leave {where} out; there is one noise at a time."
    assert wrong == {f"objective.{where}": f"{why} {tail}"}


def test_zero_terminal_snr_is_for_v_alone() -> None:
    _, wrong = parsed("epsilon", zero_terminal_snr=True)
    assert list(wrong) == ["objective.zero_terminal_snr"]
    assert wrong["objective.zero_terminal_snr"].startswith(
        "true, but the base model predicts epsilon: at the last timestep "
    )
    _, wrong = parsed("flow", zero_terminal_snr=True)
    assert wrong["objective.zero_terminal_snr"].startswith("not a setting of 'flow'.")
    assert parsed("v", zero_terminal_snr=True)[1] == {}


# ---- whole recipes


@pytest.fixture
def checked(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks a recipe on the embedded model, as if that predicted something else."""

    def check(prediction: Prediction = "epsilon", **objective: Any) -> Checked:
        facts = dataclasses.replace(inspect_model("pocket"), prediction=prediction)
        module = importlib.import_module("lorabake.recipe.check")
        monkeypatch.setattr(module, "inspect_model", lambda *given, **named: facts)
        monkeypatch.setattr(module, "caption_readers", lambda *given, **named: {})
        return check_values({"data": {"folder": str(dataset)}, "objective": objective})

    return check


@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "diffusion"), ("v", "diffusion"), ("flow", "flow")])
def test_the_recipe_says_why(checked: Any, prediction: Prediction, name: str) -> None:
    recipe = checked(prediction).recipe
    assert recipe.objective.name == name
    assert recipe.why("objective.name") == f"the base model predicts {prediction}"


def test_the_shift_is_in_the_recipe(checked: Any) -> None:
    recipe = checked("flow").recipe
    assert recipe.to_dict()["objective"]["shift"] == 3.0
    assert recipe.why("objective.shift") == "what is usual: the model's files do not say theirs"
    assert recipe.objective.settings.metadata()["discrete_flow_shift"] == 3.0
    given = checked("flow", shift=2.0).recipe
    assert given.objective.settings.shift == 2.0 and "objective.shift" not in given.reasons
    for timesteps in ("uniform", "flux-shift"):
        recipe = checked("flow", timesteps=timesteps).recipe
        assert recipe.objective.settings.shift is None, "nothing reads it"
    assert "shift" not in checked("epsilon").recipe.to_dict()["objective"]


def test_settings_are_those_of_the_models_objective(checked: Any) -> None:
    assert checked("flow", shift=2.0).recipe.objective.settings.shift == 2.0
    with pytest.raises(Problems, match=r"objective\.shift +not a setting of 'diffusion'"):
        checked("epsilon", shift=2.0)


@pytest.mark.parametrize(
    ("prediction", "objective", "told"),
    [
        ("flow", {"timesteps": "uniform", "sigmoid_scale": 0.5},
         ["objective.sigmoid_scale = 0.5 does nothing: it is for timesteps 'flux-shift' or 'resolution-shift' or 'shift' or 'sigmoid', and timesteps"]),
        ("flow", {"timesteps": "flux-shift", "shift": 3.0},
         ["objective.shift = 3.0 does nothing: it is for timesteps 'resolution-shift' or 'shift', and timesteps is 'flux-shift'."]),
        ("flow", {"logit_mean": 1.0, "logit_std": 2.0}, ["objective.logit_mean = 1.0 does nothing", "objective.logit_std = 2.0 does nothing"]),
        ("epsilon", {"weighting": "none", "min_snr_gamma": 3.0},
         ["objective.min_snr_gamma = 3.0 does nothing: it is for weighting 'min-snr' or 'soft-min-snr', and weighting is 'none'."]),
        ("v", {"p2_gamma": 0.5, "learned_lr": 0.1},
         ["objective.learned_lr = 0.1 does nothing: it is for weighting 'learned', and weighting is 'min-snr'.",
          "objective.p2_gamma = 0.5 does nothing: it is for weighting 'p2', and weighting is 'min-snr'."]),
        ("flow", {"weighting": "learned", "learned_lr": 0.1}, []),
        ("v", {"huber_c": 0.2}, ["objective.huber_c = 0.2 does nothing: it is for loss 'huber' or 'smooth-l1', and loss is 'l2'."]),
        ("flow", {"loss": "l1", "huber_schedule": "constant", "huber_scale": 2.0},
         ["objective.huber_schedule = constant does nothing: it is for loss 'huber' or 'smooth-l1', and loss is 'l1'.",
          "objective.huber_scale = 2.0 does nothing: it is for loss 'huber' or 'smooth-l1', and loss is 'l1'."]),
        ("epsilon", {"loss": "huber", "huber_scale": 2.0},
         ["objective.huber_scale = 2.0 does nothing: it is for huber_schedule 'constant' or 'exponential', and huber_schedule is 'snr'."]),
        ("epsilon", {"loss": "smooth-l1", "huber_schedule": "constant", "huber_scale": 2.0, "huber_c": 0.2}, []),
        ("v", {"input_perturbation_random": True}, ["objective.input_perturbation_random does nothing: input_perturbation is 0."]),
        ("v", {"zero_terminal_snr": True}, []),
        ("v", {"zero_terminal_snr": True, "min_snr_gamma": 4.0}, ["objective.weighting = min-snr: it hardly counts the last timesteps, "]),
        ("v", {"zero_terminal_snr": True, "weighting": "min-snr", "max_timestep": 900, "noise": "offset"},
         ["objective.zero_terminal_snr is for the last timestep, and max_timestep = 900 leaves it out.",
          "objective.weighting = min-snr: it hardly counts the last timesteps, ",
          "objective.noise = offset: zero_terminal_snr mends the same, "]),
        ("v", {"zero_terminal_snr": True, "weighting": "debiased"}, []),
        ("v", {"timesteps": "stratified"}, ["objective.timesteps = stratified: a batch of one picture has nothing to spread, "]),
        ("v", {"timesteps": "sigmoid", "stratified": True}, ["objective.stratified = true does nothing: a batch of one picture has nothing to spread. "]),
        ("v", {"timesteps": "stratified", "stratified": True},
         ["objective.stratified = True does nothing: it is for timesteps 'flux-shift' or 'logit-normal' or 'resolution-shift' or 'shift' or ",
          "objective.timesteps = stratified: a batch of one picture has nothing to spread, "]),
        ("epsilon", {"logit_mean": 1.0}, ["objective.logit_mean = 1.0 does nothing: it is for timesteps 'logit-normal', and timesteps is 'uniform'."]),
        ("epsilon", {"timesteps": "sigmoid", "sigmoid_scale": 0.5}, []),
        ("flow", {"timesteps": "resolution-shift", "shift": 2.0}, []),
        ("flow", {"noise": "offset"}, ["objective.noise = offset: it mends what flow models do not have, "]),
        ("flow", {"noise": "pyramid"}, ["objective.noise = pyramid: it mends what flow models do not have, "]),
        ("epsilon", {"noise": "offset", "noise_offset": 0.1, "noise_offset_random": True, "input_perturbation": 0.1}, []),
        ("flow", {"shift": 3.0, "sigmoid_scale": 0.5}, []),
        ("flow", {"timesteps": "logit-normal", "logit_mean": 1.0}, []),
        ("v", {"min_snr_gamma": 3.0}, []),
        ("epsilon", {"weighting": "none"}, []),
        ("flow", {}, []),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_are_told_of(
    checked: Any, prediction: Prediction, objective: dict[str, Any], told: list[str]
) -> None:
    warnings = [warning for warning in checked(prediction, **objective).warnings if warning.startswith("objective.")]
    assert len(warnings) == len(told) and all(map(str.startswith, warnings, told))


def test_zero_terminal_snr_counts_the_timestep_it_mends_unless_weights_are_chosen(checked: Any) -> None:
    recipe = checked("v", zero_terminal_snr=True).recipe
    assert recipe.objective.settings.weighting == "none"
    assert (
        recipe.why("objective.weighting") == "zero_terminal_snr is for the last timestep, which min-snr does not count"
    )
    chosen = checked("v", zero_terminal_snr=True, weighting="min-snr").recipe
    assert chosen.objective.settings.weighting == "min-snr" and "objective.weighting" not in chosen.reasons
    assert checked("v").recipe.objective.settings.weighting == "min-snr"
    again = checked("v", **recipe.to_dict()["objective"])
    assert again.recipe == recipe and not [note for note in again.warnings if note.startswith("objective.")]


def test_a_frozen_recipe_is_read_back_without_warnings(checked: Any) -> None:
    before = checked("flow").recipe
    again = checked("flow", **before.to_dict()["objective"])
    assert again.recipe == before and again.warnings == ()


def test_without_a_model_nobody_is_blamed_for_an_objectives_settings(dataset: Path) -> None:
    raw: dict[str, Any] = {"data": {"folder": str(dataset)}, "model": {"base": "nowhere"}, "objective": {"shift": 2.0}}
    with pytest.raises(Problems) as caught:
        check_values(raw)
    assert [problem.where for problem in caught.value.problems] == ["model.base"]
    with pytest.raises(Problems) as caught:
        check_values({**raw, "objective": 3})
    assert [problem.where for problem in caught.value.problems] == ["objective", "model.base"]
    assert raw["objective"] == {"shift": 2.0}


def test_the_explanation_names_no_default_of_its_own() -> None:
    (entry,) = explain.explain("objective.name")
    assert entry["default"] is None and entry["text"].endswith("Default: what the base model calls for.")
    assert entry["allowed"] == "one of diffusion, flow"
