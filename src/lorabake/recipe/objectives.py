"""Which objective a base model calls for, and what its rules can be. The lists are the cards' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from lorabake.base.cards import Settings, cards
from lorabake.base.errors import Problem, nearest
from lorabake.objectives._settings import ObjectiveSettings
from lorabake.protocols.family import Prediction
from lorabake.protocols.objective import RULES, ObjectiveCard, RuleCard
from lorabake.recipe.recipe import Choice

_USUAL: Prediction = "epsilon"
"""What is assumed of a model that is not known yet, so that its recipe can be read at all."""
_STRICT = frozenset({"noise"})
"""Kinds of rules that other trainers choose by their numbers alone: a number that no chosen rule goes by is refused, not only warned of."""


def default_objective(prediction: Prediction | None) -> str:
    """The objective for models that predict this; None is a model that is not known."""
    return next(name for name, card in _objectives().items() if (prediction or _USUAL) in card.predictions)


def objective_problems(choice: Choice, prediction: Prediction | None) -> Iterator[Problem]:
    """An objective or a rule of it that is not there, or not for models that predict this. None is a model that is not known."""
    objectives = _objectives()
    if prediction is not None and prediction not in objectives[choice.name].predictions:
        what = _unfit(choice.name, objectives, prediction)
        yield Problem("objective.name", f"{what} Leave the name out to train what the model was made for.")
        return
    for kind in RULES:
        known, given = _rules(kind), getattr(choice.settings, kind, None)
        if given is None:
            continue
        if given not in known:
            yield Problem(f"objective.{kind}", f"'{given}' is not known. {nearest(str(given), known)}")
        elif prediction is not None and prediction not in known[given].predictions:
            yield Problem(
                f"objective.{kind}", f"{_unfit(given, known, prediction)} Leave it out, or choose one of these."
            )
    for name, value, kind, why in _idle(choice):
        if kind in _STRICT:
            what = f"{value} would do nothing: {why}. Choose that, or leave {name} out; there is one {kind} at a time."
            yield Problem(f"objective.{name}", what)
    if prediction is not None and isinstance(choice.settings, ObjectiveSettings):
        yield from (Problem(f"objective.{name}", what) for name, what in choice.settings.unfit(prediction))


def reads(choice: Choice, name: str) -> bool:
    """Whether a rule that is chosen goes by the objective's setting ``name``."""
    return isinstance(choice.settings, ObjectiveSettings) and choice.settings.reads(name)


def objective_warnings(choice: Choice, prediction: Prediction, batch_size: int) -> tuple[str, ...]:
    """What is allowed and probably not meant: settings and rules that do nothing, or harm a model which predicts this."""
    settings = choice.settings
    idle = [f"{name} = {value} does nothing: {why}." for name, value, kind, why in _idle(choice) if kind not in _STRICT]
    if not isinstance(settings, ObjectiveSettings):
        return tuple(idle)
    cautions = [
        f"{card.kind} = {card.name}: {text}"
        for card in settings.rules()
        for about, text in [*card.cautions.items(), ("", card.alone if batch_size == 1 else "")]
        if text and (about in ("", prediction) or getattr(settings, about, False))
    ]
    if batch_size == 1 and settings.stratified and settings.reads("stratified"):
        idle.append(
            "stratified = true does nothing: a batch of one picture has nothing to spread. Give train.batch_size 2 or more."
        )
    return (*idle, *settings.doubts(), *cautions)


def _idle(choice: Choice) -> Iterator[tuple[str, Any, str, str]]:
    """Settings that were given and that no chosen rule goes by: name, value, the kind of rule that would, and why it does not."""
    for name, value in choice.settings.changed().items():
        if not reads(choice, name) and (found := _why_idle(choice.settings, name)):
            yield name, value, *found


def _why_idle(settings: Settings, name: str) -> tuple[str, str] | None:
    """The kind of rule that goes by a setting, and why no chosen one does; None if it is not for rules."""
    for kind in RULES:
        readers = [rule for rule, card in _rules(kind).items() if name in card.reads]
        if readers and (chosen := getattr(settings, kind, None)) is not None:
            if chosen in readers:  # which are for another rule, that is not chosen
                return _why_idle(settings, kind)
            return kind, f"it is for {kind} {_listed(readers)}, and {kind} is '{chosen}'"
    return None


def _unfit(given: str, known: Mapping[str, ObjectiveCard] | Mapping[str, RuleCard], prediction: Prediction) -> str:
    allowed = [name for name, card in known.items() if prediction in card.predictions]
    return (
        f"'{given}' is for models that predict {' or '.join(known[given].predictions)}; the base model predicts {prediction}. "
        f"Allowed: {', '.join(allowed)}."
    )


def _listed(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _objectives() -> Mapping[str, ObjectiveCard]:
    return cast(Mapping[str, ObjectiveCard], cards("objective"))


def _rules(kind: str) -> Mapping[str, RuleCard]:
    return cast(Mapping[str, RuleCard], cards(kind))
