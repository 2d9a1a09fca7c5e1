"""The base's own answers as targets."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.recipe import check_values
from lorabake.recipe.sections import PreservationSettings
from lorabake.train.asked import Asked
from lorabake.train.bake import Bake
from lorabake.train.capture import Captured
from lorabake.train.loop import batch_inputs, batch_loss, loss_of, optimizer_step, run_loop
from lorabake.train.prepare import prepare
from lorabake.train.preservation import KeptInputs

TRIGGER = "mira"


@pytest.fixture
def called(dataset: Path) -> Path:
    """The dataset with a trigger in every caption but the last."""
    for path in sorted(dataset.rglob("*.txt"))[:-1]:
        path.write_text(f"{TRIGGER}, {path.read_text()}")
    return dataset


def recipe(dataset: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "3 steps"},
        "output": {"trigger": TRIGGER},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    raw["adapter"] = {name: value for name, value in raw["adapter"].items() if value is not None}
    return raw


def bake(dataset: Path, **sections: dict[str, Any]) -> Bake:
    return prepare(check_values(recipe(dataset, **sections)), Events())


KINDS: dict[str, dict[str, Any]] = {
    "kept text": {"optimizer": {"text_encoder_lr": 0.0}},
    "trained text": {},
    "shuffled": {"data": {"captions": {"shuffle": True}}, "optimizer": {"text_encoder_lr": 0.0}},
    "a whole model": {"adapter": {"name": "full", "rank": None}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(called: Path, kind: str) -> None:
    """The plain loss, plus the weighed difference between adapter and base on the caption without the trigger."""
    sections = {**KINDS[kind], "preservation": {"weight": 0.5}}
    baked = moved(bake(called, **sections))
    inputs = batch_inputs(baked, 2, 0, (0, 1))
    plain = {name: tensor for name, tensor in inputs.items() if not name.startswith("kept.")}
    kept = {name.removeprefix("kept."): tensor for name, tensor in inputs.items() if name.startswith("kept.")}
    assert kept.pop("weight_B").tolist() == [0.5, 0.5]
    with torch.no_grad():
        whole, own = (float(loss_of(baked.model, baked.objective, given, baked.graft)) for given in (inputs, plain))
        noisy = baked.objective.corrupt(inputs["latents_BCHW"], inputs["noise_BCHW"], inputs["timesteps_B"])
        answers: list[Tensor] = []
        for off in (False, True):
            multiplier, taken = baked.graft.multiplier, baked.graft.off() if off else None
            if taken:
                taken.__enter__()
            told = baked.model.encode_text({**kept}) if "text_BLD" not in kept else kept
            answers.append(baked.model.predict(noisy, inputs["timesteps_B"], told))
            if taken:
                taken.__exit__(None, None, None)
            assert baked.graft.multiplier == multiplier
    difference_B = (answers[0] - answers[1]).square().mean((1, 2, 3))
    expected = own + 0.5 * float(baked.objective.weigh(difference_B, inputs["timesteps_B"]).mean())
    assert whole == pytest.approx(expected, rel=1e-5) and whole > own * 1.0001


def moved(baked: Bake) -> Bake:
    """Trained weights that are not the base's, whatever they are."""
    generator = torch.Generator().manual_seed(3)
    for group in baked.groups:
        scale = 0.02 if baked.graft.card.saves == "model" else 0.1
        group.values.data.add_(scale * torch.randn(group.values.shape, generator=generator))
    return baked


def test_a_newborn_adapter_has_nothing_to_answer_for(called: Path) -> None:
    """Where adapter and base agree, the first step is the plain one, to the last bit."""
    plain, keeping = bake(called), bake(called, preservation={"weight": 3.0})
    assert optimizer_step(plain, 0, [(0, 1)]) == optimizer_step(keeping, 0, [(0, 1)])
    assert optimizer_step(plain, 1, [(2, 3)]).loss < optimizer_step(keeping, 1, [(2, 3)]).loss


def test_nothing_is_taught_to_the_base(called: Path) -> None:
    baked = moved(bake(called, preservation={"weight": 1.0}))
    frozen = {name: tensor.clone() for part in baked.model.parts.values() for name, tensor in part.state_dict().items()}
    for group in baked.groups:
        group.zero_gradient()
    batch_loss(baked, 0, 0, (0, 1)).backward()
    assert all(float(group.gradient.norm()) > 0 for group in baked.groups)
    trained = {id(p) for named in baked.graft.parameters().values() for p in named.values()}
    assert all(p.grad is None for part in baked.model.parts.values() for p in part.parameters() if id(p) not in trained)
    after = {name: tensor for part in baked.model.parts.values() for name, tensor in part.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_it_drifts_less(called: Path) -> None:
    drifts: list[float] = []
    for weight in (0.0, 20.0):
        baked = bake(called, train={"length": "12 steps"}, **({"preservation": {"weight": weight}} if weight else {}))
        run_loop(baked, 0, Events(), lambda step: False)
        with torch.no_grad():
            latents, steps = (
                torch.randn(2, *baked.latents[0][0].shape, generator=torch.Generator().manual_seed(1)),
                torch.tensor([300, 700]),
            )
            answers: list[Tensor] = []
            for multiplier in (1.0, 0.0):
                baked.graft.multiplier = multiplier
                told = baked.model.encode_text(baked.model.tokenize(["1girl, smile", "1girl, beach"]))
                answers.append(baked.model.predict(latents, steps, told))
            drifts.append(float((answers[0] - answers[1]).square().mean()))
    assert drifts[1] < 0.7 * drifts[0]


# ---- whose turn it is


def ask(settings: PreservationSettings, captions: list[str], step: int = 0) -> tuple[list[float], list[str]]:
    told: list[str] = []

    def text(given: Any) -> dict[str, Tensor]:
        told.extend(given)
        return {"text_BLD": torch.zeros(len(given), 1)}

    source: Any = text
    inputs = KeptInputs(source, settings, 7)(Asked(step, 0, [(0, 0)] * len(captions), captions))
    return inputs["kept.weight_B"].tolist() if inputs else [], told


def test_captions_without_the_trigger_are_not_asked() -> None:
    settings = PreservationSettings(weight=2.0, trigger="mira, red dress", class_words="a woman")
    captions = ["Mira, red_dress, smile", "admiral, smile", ""]
    assert ask(settings, captions) == ([2.0, 0.0, 0.0], ["a woman, a woman, smile", "admiral, smile", ""])
    assert ask(settings, captions[1:]) == ([], [])


def test_another_text_can_be_kept() -> None:
    assert ask(PreservationSettings(weight=1.0, caption=""), ["mira", ""]) == ([1.0, 0.0], ["", ""])
    assert ask(PreservationSettings(weight=1.0, caption="1girl"), ["mira"]) == ([1.0], ["1girl"])


def test_a_share_of_the_batches_pulls_as_strongly() -> None:
    settings = PreservationSettings(weight=1.0, share=0.25, trigger="mira")
    answers = [ask(settings, ["mira, hat"], step) for step in range(600)]
    turns = [counts for counts, told in answers if told]
    assert 0.2 < len(turns) / 600 < 0.3 and all(counts == [4.0] for counts in turns)
    assert answers == [ask(settings, ["mira, hat"], step) for step in range(600)]


# ---- outside of masks


def test_outside_of_masks_the_base_is_kept(called: Path) -> None:
    for path in called.rglob("*.png"):
        mask = Image.new("L", (64, 64), "black")
        mask.paste("white", (32, 0, 64, 64))
        (path.parent.parent / "masks").mkdir(exist_ok=True)
        mask.save(path.parent.parent / "masks" / path.name)
    masks: dict[str, Any] = {"data": {"masks": {"source": "files"}}}
    for more, expected in (({}, 1.0), ({"normalise": "none"}, 0.5)):
        masks["data"]["masks"] = {"source": "files", **more}
        config = recipe(called, preservation={"outside_masks": 3.0})
        config["data"]["masks"] = masks["data"]["masks"]
        baked = moved(prepare(check_values(config), Events()))
        inputs = batch_inputs(baked, 0, 0, (0, 1))
        assert float(inputs["outside_B1HW"].mean()) == pytest.approx(3.0 * expected)
        assert not (inputs["outside_B1HW"] * inputs["mask_B1HW"]).any()
        plain = {name: tensor for name, tensor in inputs.items() if name != "outside_B1HW"}
        with torch.no_grad():
            whole, own = (float(loss_of(baked.model, baked.objective, given, baked.graft)) for given in (inputs, plain))
        assert whole > own
        baked.graft.multiplier = 0.0
        with torch.no_grad():
            base, base_own = (
                float(loss_of(baked.model, baked.objective, given, baked.graft)) for given in (inputs, plain)
            )
        assert base == base_own, "the base answers as the base does"


# ---- recordings, and what is wrong


def test_from_recordings_it_is_the_same_to_the_last_bit(called: Path) -> None:
    losses: list[list[Any]] = []
    for recorded in (False, True):
        baked = bake(called, preservation={"weight": 1.0, "share": 0.5}, train={"length": "6 steps"})
        if recorded:
            of_inputs = partial(loss_of, baked.model, baked.objective, graft=baked.graft, noted_2B=baked.noted_2B)
            captured = Captured(
                of_inputs, baked.groups, torch.device("cpu"), lambda step: step, around=baked.graft.ahead
            )
            baked = dataclasses.replace(baked, captured=captured)
        seen: list[Any] = []
        run_loop(baked, 0, Events(seen.append), lambda step: False)
        losses.append(seen)
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_without_weight_nothing_is_added(called: Path) -> None:
    assert not bake(called).more_inputs
    told = check_values(recipe(called, preservation={"trigger": "x", "share": 0.5})).warnings
    assert "preservation.share = 0.5 does nothing: preservation.weight is 0." in told
    assert "preservation.trigger = x does nothing: preservation.weight is 0." in told


def test_the_trigger_is_the_files_and_the_time_is_told(called: Path) -> None:
    checked = check_values(recipe(called, preservation={"weight": 1.0}))
    assert (
        checked.recipe.preservation.trigger == TRIGGER
        and checked.recipe.why("preservation.trigger") == "output.trigger"
    )
    assert "preservation: every step asks the base model too, and takes about 2.3 times as long." in checked.warnings
    assert (
        "preservation: 1 of 6 captions do not hold 'mira' and are not asked of the base: 1_mira/005.png."
        in checked.warnings
    )


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"output": {"trigger": None}, "preservation": {"weight": 1.0}},
            r"preservation\.trigger +is needed and not given",
        ),
        ({"preservation": {"weight": 1.0, "trigger": "suzu"}}, r"'suzu' is in none of the 6 captions"),
        ({"preservation": {"outside_masks": 1.0}}, r"preservation\.outside_masks +1, but no masks are used"),
    ],
)
def test_what_is_wrong_is_told_before_the_run(called: Path, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(Problems, match=told):
        check_values(recipe(called, **sections))
