"""What goes with an optimizer and what does not, as its card has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from lorabake.base.cards import find
from lorabake.base.errors import Problem
from lorabake.protocols.optimizer import OptimizerCard
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.sections import RateSettings


def optimizer_card(choice: Choice) -> OptimizerCard:
    """The card of the chosen optimizer."""
    return cast(OptimizerCard, find("optimizer", choice.name))


def optimizer_problems(choice: Choice, rates: RateSettings) -> Iterator[Problem]:
    """Rates that the optimizer cannot keep apart."""
    if optimizer_card(choice).one_rate:
        lr = 1.0 if rates.lr is None else rates.lr
        text = lr if rates.text_encoder_lr is None else rates.text_encoder_lr
        if lr and text and lr != text:
            yield Problem(
                "optimizer.text_encoder_lr",
                f"{text:g}, and lr is {lr:g}: '{choice.name}' finds one learning rate for all. Give both the same, or 0 to leave one untrained.",
            )


def optimizer_warnings(recipe: Recipe) -> Iterator[str]:
    """What is allowed and probably not meant."""
    name, card, schedule = recipe.optimizer.name, optimizer_card(recipe.optimizer), recipe.schedule
    if card.adapts:
        for setting, value in (("lr", recipe.rates.lr), ("text_encoder_lr", recipe.rates.text_encoder_lr)):
            if value not in (None, 0, 1):
                yield (
                    f"optimizer.{setting} = {value:g}: '{name}' finds the learning rate itself, and this multiplies what it finds. "
                    f"1 is usual{'; to turn it up or down there is optimizer.d_coef' if 'd_coef' in card.settings.model_fields else ''}."
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
    guarded = card.averages or getattr(recipe.optimizer.settings, "safeguard_warmup", False)
    if card.adapts and not guarded and getattr(schedule.settings, "warmup", 0):
        has_guard = "safeguard_warmup" in card.settings.model_fields
        remedy = "Set optimizer.safeguard_warmup = true" if has_guard else "It begins with tiny steps anyway"
        yield f"schedule.warmup: small steps mislead '{name}' in its search for the learning rate. {remedy}, or leave schedule.warmup out."
