"""A model that is declared to predict something else than it does is found out before the first step; an honest one never is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.base.events import Events
from lorabake.families import load_model
from lorabake.protocols.family import Conditioning, Framing, Model, Prediction
from lorabake.recipe import Checked, check_values
from lorabake.train import run
from lorabake.train.prediction import check_prediction
from lorabake.train.prepare import prepare

Answer = Callable[[Model, Tensor, Tensor, Conditioning], Tensor]


class Twin:
    """The pocket model with another mouth: whatever is not said here is its own."""

    def __init__(self, model: Model, declared: Prediction, answer: Answer) -> None:
        self._model, self._answer = model, answer
        self.facts = dataclasses.replace(model.facts, prediction=declared)
        self.betas_T = None if declared == "flow" else model.betas_T
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows.append(len(latents_BCHW))
        return self._answer(self._model, latents_BCHW, timesteps_B, conditioning)


def alpha_bars(model: Model) -> Tensor:
    assert model.betas_T is not None
    return (1 - model.betas_T).cumprod(0).float()


def epsilon(model: Model, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """As it was trained."""
    return model.predict(x, t, conditioning)


def v(model: Model, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """v = √ᾱ ε − √(1 − ᾱ) x0 of the same ε, which is (ε − √(1 − ᾱ) x) / √ᾱ."""
    share = alpha_bars(model)[t.long()][:, None, None, None]
    return (model.predict(x, t, conditioning) - (1 - share).sqrt() * x) / share.sqrt()


def flow(model: Model, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """ε − x0 of the same ε, asked at the timestep that has the same ratio of noise to picture, with the input at that scale."""
    s = t.float()[:, None, None, None] / 1000
    scale = ((1 - s).square() + s.square()).sqrt()
    wanted_B = ((1 - s) / scale).square().flatten()
    nearest_B = (alpha_bars(model)[None] - wanted_B[:, None]).abs().argmin(1)
    noise = model.predict(x / scale, nearest_B, conditioning)
    return noise - (x - s * noise) / (1 - s)


ANSWERS: dict[Prediction, Answer] = {"epsilon": epsilon, "v": v, "flow": flow}


@pytest.fixture(scope="module")
def pocket() -> Model:
    return load_model("pocket")


@pytest.fixture(scope="module")
def pictures(pocket: Model, drawings: list[tuple[Any, str]]) -> list[tuple[Tensor, str, Framing]]:
    """Latents, caption and framing of each drawing."""

    def latents(image: Any) -> Tensor:
        pixels_HWC = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return pocket.encode_images(pixels_HWC.permute(2, 0, 1)[None])[0]

    return [(latents(image), caption, Framing((64, 64), (0, 0), (64, 64))) for image, caption in drawings]


def look(model: Any, pictures: list[Any]) -> None:
    latents, captions, framings = ([picture[part] for picture in pictures] for part in range(3))
    check_prediction(model, latents, captions, framings)


@pytest.mark.parametrize("declared", ["epsilon", "v"])
def test_an_honest_model_is_asked_once_and_left_in_peace(pocket: Model, pictures: list, declared: Prediction) -> None:
    for start in (0, 2, 4):
        twin = Twin(pocket, declared, ANSWERS[declared])
        look(twin, pictures[start:])
        assert twin.rows == [4]


def test_a_flow_model_is_not_asked(pocket: Model, pictures: list) -> None:
    for answer in ANSWERS.values():
        twin = Twin(pocket, "flow", answer)
        look(twin, pictures)
        assert twin.rows == []


@pytest.mark.parametrize(("declared", "real"), [("epsilon", "v"), ("v", "epsilon"), ("epsilon", "flow"), ("v", "flow")])
def test_the_wrong_name_is_found_out(pocket: Model, pictures: list, declared: Prediction, real: Prediction) -> None:
    names = {"epsilon": "noise (epsilon)", "v": "v", "flow": "flow"}
    todo = f'Set model.prediction = "{real}".' if real != "flow" else "Flow models of its kind cannot be trained here."
    for start in (0, 2, 4):
        twin = Twin(pocket, declared, ANSWERS[real])
        with pytest.raises(UserError) as caught:
            look(twin, pictures[start:])
        said = str(caught.value)
        assert f"pocket is declared to predict {names[declared]}, but it answers as a model that predicts {names[real]} would" in said  # fmt: skip
        assert f"read as {real}" in said and f"read as {declared}" in said
        assert todo in said and said.endswith("Nothing was started.")
        assert twin.rows == [4, 4], "at most two forward passes"


@pytest.mark.parametrize("share", [0.0, 1.0, 0.8, 0.6, 0.3, -1.0])
@pytest.mark.parametrize("declared", ["epsilon", "v"])
def test_a_network_that_knows_nothing_is_not_judged(
    pocket: Model, pictures: list, declared: Prediction, share: float
) -> None:
    """It hands back a part of what it is given: without knowing pictures, nothing explains more."""
    look(Twin(pocket, declared, lambda model, x, t, conditioning: share * x), pictures)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_with_random_weights_is_not_judged(pictures: list, seed: int) -> None:
    model = load_model("pocket")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.parts["denoiser"].modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    for declared in ("epsilon", "v"):
        look(Twin(model, declared, epsilon), pictures)


def test_pictures_of_other_sizes_are_left_out(pocket: Model, pictures: list) -> None:
    latents, caption, framing = pictures[0]
    wide = (torch.cat([latents, latents], dim=-1), caption, framing)
    twin = Twin(pocket, "epsilon", epsilon)
    look(twin, [pictures[0], wide, wide])
    assert twin.rows == [2]
    check_prediction(pocket, [], [], [])


def test_nothing_is_moved_by_looking(pocket: Model, pictures: list) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in pocket.parts["denoiser"].state_dict().items()}
    look(pocket, pictures)
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert all(torch.equal(weights[name], tensor) for name, tensor in pocket.parts["denoiser"].state_dict().items())


# ---- in a run


def checked(dataset: Path, declared: Prediction = "epsilon", **adapter: Any) -> Checked:
    raw = {
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 1, **adapter},
        "train": {"device": "cpu", "length": "3 steps", "threads": 1},
        "save": {"state_every": 1e-3},
    }
    found = check_values(raw)
    return dataclasses.replace(found, facts=dataclasses.replace(found.facts, prediction=declared))


def test_a_run_does_not_start_and_leaves_the_folder_to_the_right_one(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is declared to predict v, but it answers as .* noise"):
        run.train(checked(dataset, "v"), tmp_path / "run", Events())
    assert not (tmp_path / "run" / "run.json").exists()
    assert run.train(checked(dataset), tmp_path / "run", Events()).finished


def test_looking_changes_no_byte_and_is_done_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    real = run.check_prediction

    def counted(model: Model, *arguments: Any) -> None:
        looked.append(True)
        real(model, *arguments)

    monkeypatch.setattr(run, "check_prediction", counted)
    recipe = checked(dataset, dropout=0.3)
    steps: list[Any] = []
    told = Events(lambda event: steps.append(event) if event["kind"] == "step" else None)
    assert not run.train(recipe, tmp_path / "one", told, stop=lambda: bool(steps)).finished
    run.train(recipe, tmp_path / "one", Events())
    assert looked == [True], "a run that goes on has been looked at"
    monkeypatch.setattr(run, "check_prediction", lambda *arguments: None)
    run.train(recipe, tmp_path / "other", Events())
    one, other = ((tmp_path / name / "checkpoints" / "mira.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_the_adapter_is_on_again_whatever_was_found(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bake = prepare(check_values({"data": {"folder": str(dataset)}, "train": {"device": "cpu"}}), Events())

    def refused(*arguments: object) -> None:
        assert not bake.graft.training and bake.graft.multiplier == 0
        raise UserError("another prediction")

    monkeypatch.setattr(run, "check_prediction", refused)
    bake.graft.multiplier = 0.7
    with pytest.raises(UserError, match="another prediction"):
        run._check_base(bake)
    assert bake.graft.training and bake.graft.multiplier == 0.7
