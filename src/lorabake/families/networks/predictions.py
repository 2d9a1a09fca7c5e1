"""What the denoiser of a model predicts, as its files say it. No torch here.

Single files say it in metadata (``modelspec.*`` as in https://github.com/Stability-AI/ModelSpec, ``ss_*`` as kohya's scripts
write it) or by empty marker tensors called ``v_pred`` and ``ztsnr``; most say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lorabake.base.errors import UserError
from lorabake.families.networks.weights import Weights
from lorabake.protocols.family import Prediction

NAMES: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}
"""diffusers' names."""
_WORDS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v",
    "v_prediction": "v",
    "v-prediction": "v",
}


class Said(NamedTuple):
    """What is to be believed."""

    prediction: Prediction
    zero_terminal_snr: bool = False
    notes: tuple[str, ...] = ()


def said_by(weights: Weights, given: Prediction | None, default: tuple[Prediction, str | None]) -> Said:
    """What a single file predicts: what its user says, else what the file says, else a default.

    Args:
        weights: all of the file.
        given: what the user says.
        default: for files that say nothing, with a note where it may be wrong.

    Raises:
        UserError: the file, or the user, says something else than noise or v.
    """
    own = declared(weights)
    _supported(given, weights.subject)
    if given is not None:
        contradicted = own is not None and own != given
        note = f"model.prediction is '{given}'; the file itself says '{own}'. The setting is believed."
        return Said(given, given == "v" and "ztsnr" in weights, (note,) if contradicted else ())
    prediction, note = (own, None) if own is not None else default
    return Said(prediction, prediction == "v" and "ztsnr" in weights, (note,) if note else ())


def declared(weights: Weights) -> Prediction | None:
    """What a single file says of itself; None if nothing.

    Raises:
        UserError: something else than noise or v.
    """
    if "v_pred" in weights:
        return "v"
    texts = weights.metadata
    if word := texts.get("modelspec.prediction_type", "").strip().lower():
        if word not in _WORDS:
            raise UserError(
                f"{weights.subject} says that it predicts '{word[:40]}' (modelspec.prediction_type). Supported: epsilon, v. "
                "Set model.prediction if that is wrong."
            )
        return _WORDS[word]
    if (architecture := texts.get("modelspec.architecture", "")).startswith("stable-diffusion-v2-"):
        return "v" if architecture.startswith("stable-diffusion-v2-768-v") else "epsilon"
    if version := texts.get("ss_base_model_version"):
        return "v" if version.endswith("_v") else "epsilon"
    return None


def said_in_folder(scheduler: Mapping[str, Any], where: str, given: Prediction | None) -> Said:
    """The same for a diffusers folder, whose scheduler says it.

    Raises:
        UserError: neither the user nor the scheduler names one that is supported.
    """
    own = scheduler.get("prediction_type", "epsilon")
    _supported(given, where)
    if given is not None:
        note = f"model.prediction is '{given}'; the scheduler of {where} says '{own}'. The setting is believed."
        return Said(given, notes=(note,) if NAMES.get(given) != own else ())
    for prediction, name in NAMES.items():
        if name == own:
            return Said(prediction)
    raise UserError(f"{where}: prediction type '{own}' is not supported. Allowed: {', '.join(NAMES.values())}.")


def _supported(given: Prediction | None, where: str) -> None:
    if given is not None and given not in NAMES:
        raise UserError(
            f"model.prediction is '{given}', but {where} is a U-Net with a noise schedule. Allowed: {', '.join(NAMES)}."
        )


def prediction_of(scheduler: Mapping[str, Any]) -> Prediction:
    """What ``scheduler_config.json`` says, after it has been checked."""
    return next(prediction for prediction, name in NAMES.items() if name == scheduler["prediction_type"])
