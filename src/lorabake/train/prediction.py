"""Whether the base model predicts what it is said to: a look at it before the first step.

A model trained as something else than it is (v as ε, say) gives no error, only a LoRA that spoils pictures. It shows at once in the
untrained model's own loss, read in each way, as a share of the loss of answering nothing (0): a reading is right if that is well
below 1, and no reading is if the model knows nothing yet.

Each reading is asked at two amounts of noise, ᾱ = 0.7 and 0.2, and the two are averaged. There the readings of a trained model are
far apart: at less noise ε and v are nearly the same, and with more even a trained v model knows little. The pocket model on its own
kind of pictures, the same weights made to answer v = (ε − √(1 − ᾱ) x_t) / √ᾱ, the same weights made to answer as a flow model, and
the same network with random weights:

    model        read as ε       v      flow
    ε              0.06        0.82     0.60
    v              0.75        0.15     0.34
    flow           1.02        0.38     0.14
    random         1.08        1.06     1.03

So a model is refused only if another reading explains more than half (below ``_RIGHT``) at both amounts and the declared reading is
``_TIMES`` as wrong. For an honest model every other reading is at least twice as wrong as its own, and a network that knows nothing
has no reading below 1. Simply handing back a part of the noisy latents, the most that a network can do without knowing pictures,
leaves 0.67 of ε at ᾱ = 0.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.streams import torch_stream
from lorabake.objectives.diffusion import Diffusion, DiffusionSettings
from lorabake.objectives.flow import Flow, FlowSettings
from lorabake.protocols.family import Framing, Model, Prediction
from lorabake.protocols.objective import Objective
from lorabake.train.text import TextSource, conditioning_of

_LEVELS = (0.7, 0.2)
"""ᾱ, the picture's share of the variance, at which the model is asked."""
_SURE = 0.25
"""A declared reading below it needs no second look."""
_RIGHT = 0.5
_TIMES = 2.0
ASKED = 2
"""Pictures that the model is asked about."""
_NAMES: Mapping[Prediction, str] = {"epsilon": "noise (epsilon)", "v": "v", "flow": "flow"}


@torch.no_grad()
def check_prediction(
    model: Model,
    latents: Sequence[Tensor],
    captions: Sequence[str],
    framings: Sequence[Framing],
    text: TextSource | None = None,
) -> None:
    """Ask the model about the first two pictures of one size: one forward pass of four rows, and a second one if that looks wrong.

    Reads and moves no random stream of a run. A flow model has no noise schedule to be read in another way with, and is not asked.

    Args:
        model: the base, or with an adapter that changes nothing yet and drops nothing out.
        latents: of each picture, CHW.
        text: knows what is told of captions, where they have been encoded before.

    Raises:
        UserError: it clearly predicts something else than ``model.facts.prediction``.
    """
    if model.betas_T is None or not latents:
        return
    declared = model.facts.prediction
    alike = [index for index, found in enumerate(latents) if found.shape == latents[0].shape][:ASKED]
    rows = [index for index in alike for _ in _LEVELS]
    latents_BCHW = torch.stack([latents[index] for index in rows]).to(model.device)
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=torch_stream(0, "prediction")).to(model.device)
    told = text or model.tokenize
    asked = {name: tensor.to(model.device) for name, tensor in told([captions[index] for index in alike]).items()}
    conditioning = conditioning_of(model, asked)
    conditioning |= model.frame([framings[index] for index in alike])
    conditioning = {name: tensor.repeat_interleave(len(_LEVELS), 0) for name, tensor in conditioning.items()}
    alpha_bars_T = (1 - model.betas_T).cumprod(0)
    levels_T = torch.tensor([int((alpha_bars_T > level).sum()) for level in _LEVELS]).clamp(max=len(alpha_bars_T) - 1)

    def read(timesteps_T: Tensor, objectives: Mapping[Prediction, Objective]) -> dict[Prediction, Tensor]:
        """Loss of each reading as a share of answering nothing, one for each amount of noise."""
        timesteps_B = timesteps_T.repeat(len(alike)).to(model.device)
        noisy_BCHW = next(iter(objectives.values())).corrupt(latents_BCHW, noise_BCHW, timesteps_B)
        output_BCHW = model.predict(noisy_BCHW, timesteps_B, conditioning).float()
        found: dict[Prediction, Tensor] = {}
        for name, objective in objectives.items():
            target_BCHW = objective.target(latents_BCHW, noise_BCHW, timesteps_B)
            found[name] = _by_level(output_BCHW - target_BCHW) / _by_level(target_BCHW)
        return found

    settings = DiffusionSettings(weighting="none")
    names: tuple[Prediction, ...] = ("epsilon", "v")
    found = read(levels_T, {name: Diffusion(settings, model.betas_T, name, model.device) for name in names})
    if found[declared].mean() < _SURE:
        return
    noise_ratio_T = (1 / alpha_bars_T[levels_T] - 1).sqrt()
    found |= read((1000 * noise_ratio_T / (1 + noise_ratio_T)).float(), {"flow": Flow(FlowSettings(), {})})
    measured = min(found, key=lambda name: float(found[name].mean()))
    if float(found[measured].max()) < _RIGHT and found[declared].mean() > _TIMES * found[measured].mean():
        raise UserError(_message(model.facts.name, declared, measured, found))


def _by_level(errors_BCHW: Tensor) -> Tensor:
    """Mean square for each of the levels, which take turns in the batch."""
    return errors_BCHW.square().mean((1, 2, 3)).view(-1, len(_LEVELS)).mean(0)


def _message(model: str, declared: Prediction, measured: Prediction, found: Mapping[Prediction, Tensor]) -> str:
    shares = ", ".join(f"{float(losses.mean()):.2f} read as {name}" for name, losses in found.items())
    todo = (
        f'Set model.prediction = "{measured}".'
        if measured != "flow"
        else "Flow models of its kind cannot be trained here."
    )
    return (
        f"{model} is declared to predict {_NAMES[declared]}, but it answers as a model that predicts {_NAMES[measured]} would: its loss "
        f"before training, in shares of answering nothing, is {shares}. Training it as declared would spoil it. {todo} "
        "Nothing was started."
    )
