"""Regularisation pictures in a run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.pocket.world import draw, sample
from lorabake.recipe import check_values
from lorabake.sampling.infotext import save_png
from lorabake.train import loop
from lorabake.train.bake import Bake
from lorabake.train.loop import batch_inputs, batch_loss
from lorabake.train.prepare import prepare
from lorabake.train.run import train


@pytest.fixture
def girls(tmp_path: Path) -> Path:
    """Fifteen pictures of a class; one of them wide."""
    import random

    rng = random.Random(9)
    for index in range(15):
        image = draw(sample(rng), index, 64).image
        save_png(image.resize((192, 64)) if index == 4 else image, tmp_path / "reg" / "1_girl" / f"{index:03d}.png")
    return tmp_path / "reg"


def recipe(dataset: Path, girls: Path | None, **data: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset), **({"regularisation": str(girls)} if girls else {}), **data},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "4 epochs"},
        "output": {"name": "mira"},
    }


def baked(*arguments: Any, **data: Any) -> Bake:
    return prepare(check_values(recipe(*arguments, **data)), Events())


def test_what_an_epoch_takes_is_stated(dataset: Path, girls: Path) -> None:
    checked = check_values(recipe(dataset, girls))
    assert checked.length.images_per_epoch == 6 + 6 + 1, "the only wide one is not left out"
    assert checked.length.steps_per_epoch == 6 + 1
    assert (
        "data.regularisation: 15 pictures (15 with repeats). Every epoch takes 7 of them, in turn, beside 6 training pictures: 13 in all. "
        "In 4 epochs each is seen 1.87 times on average."
    ) in checked.warnings
    assert any(
        note.startswith("data.regularisation: 15 of 15 pictures have no caption file") for note in checked.warnings
    )


def test_epochs_hold_both_and_have_equally_many_steps(
    dataset: Path, girls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, steps = baked(dataset, girls), list[Any]()
    monkeypatch.setattr(
        loop, "optimizer_step", lambda bake, step, batches: steps.append(batches) or loop.Step(0.1, 0.1, 1)
    )
    loop.run_loop(given, 0, Events(), lambda step: False)
    assert len(steps) == given.total_steps == 4 * given.steps_per_epoch
    seen: Counter[int] = Counter()
    for epoch in range(4):
        entries = [
            index
            for batches in steps[epoch * given.steps_per_epoch :][: given.steps_per_epoch]
            for batch in batches
            for index in batch
        ]
        assert sorted(index for index in entries if index < 6) == list(range(6))
        seen.update(index for index in entries if index >= 6)
    assert set(seen) == set(range(6, 21)), "none is left out"
    whole = list(steps)
    for start in (1, 7, 13):
        steps.clear()
        loop.run_loop(given, start, Events(), lambda step: False)
        assert steps == whole[start:]


def test_their_loss_is_weighed(dataset: Path, girls: Path) -> None:
    plain, light = baked(dataset, girls), baked(dataset, girls, prior_loss_weight=0.25)
    assert "weight_B" not in batch_inputs(plain, 0, 0, (0, 7))
    assert batch_inputs(light, 0, 0, (0, 7))["weight_B"].tolist() == [1.0, 0.25]
    with torch.no_grad():
        own, other, both = (float(batch_loss(light, 3, 0, batch)) for batch in ((0,), (7,), (0, 0)))
        full_own, full_other = (float(batch_loss(plain, 3, 0, batch)) for batch in ((0,), (7,)))
    assert own == full_own and other == pytest.approx(full_other / 4, rel=1e-6) and both > 0


def test_their_captions_are_the_class_without_prefix(dataset: Path, girls: Path) -> None:
    given = baked(dataset, girls, captions={"prefix": "mira,", "suffix": "style"})
    heard: list[Any] = []
    import dataclasses

    listening = dataclasses.replace(given, text=lambda captions: heard.append(captions) or given.text(captions))
    batch_inputs(listening, 0, 0, (0, 7))
    assert heard[0][0].startswith("mira, ") and heard[0][0].endswith(" style") and heard[0][1] == "girl"


def test_what_files_say_of_it(dataset: Path, girls: Path, tmp_path: Path) -> None:
    raw = recipe(dataset, girls, prior_loss_weight=0.5)
    raw["train"]["length"] = "2 steps"
    train(check_values(raw), tmp_path / "run", Events())
    with safe_open(tmp_path / "run" / "checkpoints" / "mira.safetensors", framework="pt") as file:
        said = file.metadata()
    assert said["ss_num_reg_images"] == "15" and said["ss_prior_loss_weight"] == "0.5"
    assert json.loads(said["ss_reg_dataset_dirs"]) == {"1_girl": {"n_repeats": 1, "img_count": 15}}
    pictures = json.loads((tmp_path / "run" / "pictures.json").read_text())
    assert len(pictures) == 21 and "regularisation: 1_girl/000.png" in pictures
    assert (girls / ".lorabake" / "latents").exists(), "kept where other datasets find them"


def test_without_the_folder_it_is_the_run_it_was(dataset: Path, girls: Path) -> None:
    given, with_them = baked(dataset, None), baked(dataset, girls)
    assert given.turns is None and not given.more_inputs
    assert len(with_them.samples) == 21 and with_them.trained == 6
    for first, second in zip(given.latents, with_them.latents, strict=False):
        assert torch.equal(first[0], second[0])


def test_what_is_wrong_is_told_before_the_run(dataset: Path, girls: Path, tmp_path: Path) -> None:
    with pytest.raises(Problems, match=r"data\.regularisation .*is the folder of the training pictures"):
        check_values(recipe(dataset, dataset))
    with pytest.raises(Problems, match=r"lies inside the folder of the training pictures"):
        check_values(recipe(dataset, dataset / "1_mira"))
    with pytest.raises(Problems, match=r"holds the folder of the training pictures"):
        check_values(recipe(dataset, tmp_path))
    with pytest.raises(Problems, match=r"there is no such folder"):
        check_values(recipe(dataset, tmp_path / "nowhere"))
    (girls / "1_girl" / "same.png").write_bytes((dataset / "1_mira" / "000.png").read_bytes())
    with pytest.raises(Problems, match=r"1 of reg's pictures are training pictures too: reg/1_girl/same\.png"):
        check_values(recipe(dataset, girls))


def test_held_out_pictures_are_not_trained_as_regularisation_pictures(
    dataset: Path, girls: Path, tmp_path: Path
) -> None:
    raw = recipe(dataset, girls)
    (tmp_path / "apart" / "1_mira").mkdir(parents=True)
    (tmp_path / "apart" / "1_mira" / "same.png").write_bytes((girls / "1_girl" / "003.png").read_bytes())
    raw["validation"] = {"folder": str(tmp_path / "apart")}
    with pytest.raises(Problems, match=r"apart/1_mira/same\.png \(as reg/1_girl/003\.png\)"):
        check_values(raw)
    raw["validation"] = {"share": 0.4}
    (home,) = {sample.name for sample in check_values(raw).held_out.samples[:1]}  # pyright: ignore[reportOptionalMemberAccess]
    (girls / "1_girl" / "twin.png").write_bytes((dataset / home).read_bytes())
    with pytest.raises(
        Problems, match=r"held-out pictures are regularisation pictures too: .*\(as reg/1_girl/twin\.png\)"
    ):
        check_values(raw)


def test_idle_settings_and_pictures_that_never_come_are_told(dataset: Path, girls: Path) -> None:
    told = check_values(recipe(dataset, None, prior_loss_weight=0.5, regularisation_ratio=2.0)).warnings
    assert "data.prior_loss_weight = 0.5 does nothing: data.regularisation names no folder." in told
    assert "data.regularisation_ratio = 2.0 does nothing: data.regularisation names no folder." in told
    raw = recipe(dataset, girls)
    raw["train"]["length"] = "1 epochs"
    assert any("pictures are never seen in 1 epochs" in note for note in check_values(raw).warnings)
