"""What goes with an optimizer and what does not, as its card has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from lorabake.base.cards import find
from lorabake.base.errors import Problem
from lorabake.optimizers.schedules import ScheduleSettings
from lorabake.protocols.optimizer import OptimizerCard
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.sections import RateSettings, TrainSettings


def optimizer_card(choice: Choice) -> OptimizerCard:
    """The card of the chosen optimizer."""
    return cast(OptimizerCard, find("optimizer", choice.name))


def optimizer_problems(choice: Choice, rates: RateSettings, train: TrainSettings | None) -> Iterator[Problem]:
    """What the optimizer cannot do: keep rates apart, or live with weights that somebody else changes."""
    card = optimizer_card(choice)
    if card.one_rate:
        lr = 1.0 if rates.lr is None else rates.lr
        different = [rate for rate in rates.text_encoder_lrs if rate and lr and rate != lr]
        among = {rate for rate in rates.text_encoder_lrs if rate}
        if different or len(among) > 1:
            yield Problem(
                "optimizer.text_encoder_lr",
                f"{_shown(rates.text_encoder_lr)}, and lr is {lr:g}: '{choice.name}' finds one learning rate for all. "
                "Give all the same, or 0 to leave one untrained.",
            )
        for setting in ("block_lr", "lora_plus_ratio"):
            if getattr(rates, setting) is not None:
                yield Problem(f"optimizer.{setting}", f"'{choice.name}' finds one learning rate for all. Leave it out.")
    if train is None:
        return
    if train.max_weight_norm is not None and (card.adapts or card.averages):
        why = "finds the learning rate from how far the weights have gone" if card.adapts else "averages the weights"
        yield Problem(
            "train.max_weight_norm", f"'{choice.name}' {why}, and weights that are scaled mislead it. Leave it out."
        )
    if train.ema and card.averages:
        yield Problem(
            "train.ema", f"'{choice.name}' averages the weights itself. Leave it out, or choose another optimizer."
        )


def schedule_problems(recipe: Recipe, total_steps: int) -> Iterator[Problem]:
    """A warm-up that the run is too short for."""
    warmup = cast(ScheduleSettings, recipe.schedule.settings).warmup
    if warmup.count is not None and warmup.count >= total_steps:  # a share is never all of it
        what = f"{warmup}, and the whole run has {total_steps}: the learning rate would never be reached. Shorten it, or lengthen the run."
        yield Problem("schedule.warmup", what)


def optimizer_warnings(recipe: Recipe) -> Iterator[str]:
    """What is allowed and probably not meant."""
    name, card, schedule = recipe.optimizer.name, optimizer_card(recipe.optimizer), recipe.schedule
    if card.adapts:
        for setting, rates in (("lr", (recipe.rates.lr,)), ("text_encoder_lr", recipe.rates.text_encoder_lrs)):
            if any(rate not in (None, 0, 1) for rate in rates):
                dial = (
                    "; to turn it up or down there is optimizer.d_coef"
                    if "d_coef" in card.settings.model_fields
                    else ""
                )
                yield (
                    f"optimizer.{setting} = {_shown(getattr(recipe.rates, setting))}: '{name}' finds the learning rate itself, "
                    f"and this multiplies what it finds. 1 is usual{dial}."
                )
    if card.averages and schedule.name != "constant":
        yield (
            f"schedule.name = '{schedule.name}': '{name}' averages instead of letting the rate decay, and both together learn too little. "
            "Leave schedule.name out, or set 'constant'."
        )
    if card.limits_updates and recipe.train.max_grad_norm:
        yield (
            f"train.max_grad_norm = {recipe.train.max_grad_norm:g}: '{name}' limits its updates itself, and gradients that were scaled down "
            "mislead its search for the rate. Leave it out, or set 0."
        )
    guarded = card.averages or (card.warmup_guard and getattr(recipe.optimizer.settings, card.warmup_guard))
    if card.adapts and not guarded and getattr(schedule.settings, "warmup", 0):
        guard = f"Set optimizer.{card.warmup_guard} = true"
        remedy = guard if card.warmup_guard else "It begins with tiny steps anyway"
        yield f"schedule.warmup: small steps mislead '{name}' in its search for the learning rate. {remedy}, or leave schedule.warmup out."


def _shown(rates: float | tuple[float, ...] | None) -> str:
    return f"[{', '.join(f'{rate:g}' for rate in rates)}]" if isinstance(rates, tuple) else f"{rates or 0:g}"
