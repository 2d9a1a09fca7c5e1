"""What a recipe on a Flux.1 model holds when nothing is left open, and how the model is used with it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.adapters import graft
from lorabake.adapters.full import FullSettings
from lorabake.base.errors import UserError
from lorabake.base.events import Events
from lorabake.families import load_model
from lorabake.families.networks.flow_schedule import shift_of
from lorabake.pocket.world import draw, sample
from lorabake.recipe import Checked, check_values
from lorabake.sampling.infotext import save_png
from lorabake.train.prepare import prepare

pytestmark = pytest.mark.slow  # the models are written by diffusers, whose import takes seconds

Check = Callable[..., Checked]


@pytest.fixture
def check(tmp_path: Path, dev_folder: Path) -> Check:
    """Checks a recipe about two pictures; settings by section."""
    rng = random.Random(1)
    for index in range(2):
        path = tmp_path / "mira" / f"{index:03d}.png"
        save_png(draw(sample(rng), index, 64).image, path)
        path.with_suffix(".txt").write_text("a red girl, " * (10 + 20 * index))

    def check(base: Path = dev_folder, **sections: dict[str, Any]) -> Checked:
        model = {"base": str(base), **sections.pop("model", {})}
        data = {"folder": str(tmp_path / "mira"), "buckets": {"resolution": 64}}
        train = {"device": "cpu", "length": "1 steps", **sections.pop("train", {})}
        return check_values({"model": model, "data": data, "train": train, **sections})

    return check


def test_t5s_length_is_in_the_recipe(check: Check) -> None:
    recipe = check().recipe
    assert recipe.model.t5_tokens == 512 and "trained with as many" in recipe.why("model.t5_tokens")
    assert recipe.to_dict()["model"]["t5_tokens"] == 512
    given = check(model={"t5_tokens": 60})
    assert given.recipe.model.t5_tokens == 60 and "model.t5_tokens" not in given.recipe.reasons
    (cut,) = [caption for caption in given.captions if caption.is_cut]
    assert cut.readings["text_encoder_2"].room == 59
    assert any(f"model.t5_tokens = {cut.tokens + 1} takes it." in warning for warning in given.warnings)


def test_the_model_reads_as_many(check: Check) -> None:
    model = prepare(check(model={"t5_tokens": 60}), Events()).model
    assert model.tokenize(["a girl"])["text_encoder_2"].shape == (1, 60)


def test_the_shift_is_the_models_own(check: Check, dev_folder: Path, tmp_path: Path) -> None:
    recipe = check().recipe
    assert recipe.objective.settings.model_dump()["shift"] == 3.0
    assert recipe.why("objective.shift").endswith("'s own schedule")
    schedule = json.loads((dev_folder / "scheduler" / "scheduler_config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(dev_folder, other)
    for said, expected in ((1.5, 1.5), (None, 3.0)):
        (other / "scheduler" / "scheduler_config.json").write_text(json.dumps({**schedule, "shift": said}))
        assert check(other).recipe.objective.settings.model_dump()["shift"] == expected


@pytest.mark.parametrize("said", ["3", 0, -1.0, 1000, True, []])
def test_a_shift_that_is_no_number_is_refused(said: Any) -> None:
    with pytest.raises(UserError, match="folder: the scheduler's shift is"):
        shift_of({"shift": said}, "folder")


def test_full_fine_tuning_leaves_t5_alone(check: Check, dev_folder: Path) -> None:
    checked = check(adapter={"name": "full"}, optimizer={"lr": 1e-5, "text_encoder_lr": 1e-5})
    bake = prepare(checked, Events())
    assert [group.name for group in bake.groups] == ["denoiser", "text_encoder"]
    frozen = bake.model.parts["text_encoder_2"]
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    bake.graft.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


def test_full_fine_tuning_of_t5_alone_is_refused(dev_folder: Path) -> None:
    with pytest.raises(UserError, match="'full' finds nothing to train"):
        graft(load_model(dev_folder), "full", FullSettings(), seed=1, parts=("text_encoder_2",))
