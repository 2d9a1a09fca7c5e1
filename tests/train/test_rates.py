"""Which weights learn at which rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import Problems, UserError
from lorabake.base.events import Event, Events
from lorabake.recipe import check_values
from lorabake.recipe.sections import RateSettings
from lorabake.recipe.toml import to_toml
from lorabake.train.bake import Bake
from lorabake.train.loop import run_loop
from lorabake.train.prepare import prepare
from lorabake.train.rates import rates_by_part
from lorabake.train.state import Progress, read_state, save_state, states_of


def values(dataset: Path, **rates: Any) -> dict[str, Any]:
    return {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "4 steps"},
        "optimizer": rates,
    }


def bake(dataset: Path, **rates: Any) -> Bake:
    return prepare(check_values(values(dataset, **rates)), Events())


def rates_of(baked: Bake) -> dict[str, float]:
    """The rate of every trained weight, by its name in the file."""
    by_place = {
        parameter.data_ptr(): name for named in baked.graft.parameters().values() for name, parameter in named.items()
    }
    found = {}
    for group, rate in zip(baked.groups, baked.base_rates, strict=True):
        start, size = group.values.data_ptr(), group.values.numel() * 4
        found.update({name: rate for place, name in by_place.items() if start <= place < start + size})
    assert len(found) == len(by_place)
    return found


def test_blocks_have_factors(dataset: Path) -> None:
    table = {"mid_block": 0.5, "attn1": 2.0, r"encoder\.layers\.0\b": 0.1}
    baked = bake(dataset, lr=1e-3, text_encoder_lr=1e-4, block_lr=table)
    for name, rate in rates_of(baked).items():
        expected = 1e-3 if name.startswith("lora_unet") else 1e-4
        expected *= 0.5 if "mid_block" in name else 2.0 if "attn1" in name else 0.1 if "layers_0_" in name else 1
        assert rate == pytest.approx(expected), name
    names = [group.name for group in baked.groups]
    assert sorted(names) == ["denoiser", "denoiser x0.5", "denoiser x2", "text_encoder", "text_encoder x0.1"]


def test_lora_plus_hurries_what_begins_at_zero(dataset: Path) -> None:
    baked = bake(dataset, lr=1e-3, text_encoder_lr=0.0, lora_plus_ratio=16.0)
    rates = rates_of(baked)
    assert {name.endswith("lora_up.weight") for name in rates} == {True, False}
    assert all(
        rate == pytest.approx(16e-3 if name.endswith("lora_up.weight") else 1e-3) for name, rate in rates.items()
    )
    told: list[Event] = []
    before = {group.name: group.values.detach().clone() for group in baked.groups}
    run_loop(baked, 0, Events(told.append), lambda step: True)
    assert told[0]["lr"] == {"denoiser": pytest.approx(1e-3), "denoiser up": pytest.approx(16e-3)}
    moved = {group.name: float((group.values - before[group.name]).abs().max().detach()) for group in baked.groups}
    assert moved["denoiser up"] == pytest.approx(16e-3, rel=0.01), "AdamW's first step is the rate itself"


def test_many_groups_are_restored_to_the_bit(dataset: Path, tmp_path: Path) -> None:
    rates = {"lr": 1e-3, "lora_plus_ratio": 4.0, "block_lr": {"mid_block": 0.25}}
    whole, first, second = (bake(dataset, **rates) for _ in range(3))
    run_loop(whole, 0, Events(), lambda step: False)
    run_loop(first, 0, Events(), lambda step: step == 2)
    save_state(tmp_path, Progress(2, 0), first.groups, first.optimizer)
    assert read_state(states_of(tmp_path)[-1], second.groups, second.optimizer)
    run_loop(second, 2, Events(), lambda step: False)
    assert len(whole.groups) == 6
    assert all(torch.equal(a.values, b.values) for a, b in zip(whole.groups, second.groups, strict=True))


def test_without_any_of_it_nothing_is_split(dataset: Path) -> None:
    assert [group.name for group in bake(dataset).groups] == ["denoiser", "text_encoder"]


def test_each_text_encoder_has_its_rate() -> None:
    parts = ("text_encoder", "text_encoder_2", "denoiser")
    assert rates_by_part(RateSettings(lr=1e-3, text_encoder_lr=(1e-4, 2e-4)), parts) == {
        "text_encoder": 1e-4, "text_encoder_2": 2e-4, "denoiser": 1e-3,
    }  # fmt: skip
    assert rates_by_part(RateSettings(lr=1e-3, text_encoder_lr=(0.0, 2e-4)), parts) == {
        "text_encoder_2": 2e-4, "denoiser": 1e-3,
    }  # fmt: skip
    assert rates_by_part(RateSettings(lr=0.0, text_encoder_lr=1e-4), parts) == {
        "text_encoder": 1e-4, "text_encoder_2": 1e-4,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"has 1 values, and the model has 2 text encoders"):
        rates_by_part(RateSettings(lr=1e-3, text_encoder_lr=(1e-4,)), parts)


@pytest.mark.parametrize(
    ("optimizer", "where", "what"),
    [
        (
            {"text_encoder_lr": [1e-4, 0.0]},
            "optimizer.text_encoder_lr",
            "has 2 values, and the model has 1 text encoder.",
        ),
        ({"lr": 0, "text_encoder_lr": [0.0]}, "optimizer.lr", "nothing would be trained"),
        ({"text_encoder_lr": [-1.0]}, "optimizer.text_encoder_lr", "greater than or equal to 0"),
        ({"block_lr": {"mid": 0}}, "optimizer.block_lr", "the factor of 'mid' is 0: it must be above 0"),
        ({"block_lr": {"(mid": 1.0}}, "optimizer.block_lr", "'(mid' is no regular expression"),
        ({"lora_plus_ratio": 1.0}, "optimizer.lora_plus_ratio", "greater than 1"),
        ({"name": "prodigy", "lora_plus_ratio": 4.0}, "optimizer.lora_plus_ratio", "one learning rate for all"),
        ({"name": "dadapt-adam", "block_lr": {"mid": 2.0}}, "optimizer.block_lr", "one learning rate for all"),
        ({"name": "prodigy", "text_encoder_lr": [0.5]}, "optimizer.text_encoder_lr", "[0.5], and lr is 1"),
    ],
    ids=str,
)
def test_what_cannot_be(dataset: Path, optimizer: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(Problems) as caught:
        check_values(values(dataset, **optimizer))
    assert {problem.where: problem.what for problem in caught.value.problems}[where].find(what) >= 0, str(caught.value)


def test_what_fits_nothing_is_refused_before_the_first_step(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.block_lr: 'middle' is in no name .* such as 'lora_unet_"):
        bake(dataset, text_encoder_lr=0.0, block_lr={"mid_block": 0.5, "middle": 2.0})
    raw = values(dataset, lora_plus_ratio=4.0)
    with pytest.raises(UserError, match="'full' is none"):
        prepare(check_values({**raw, "adapter": {"name": "full"}}), Events())


def test_tables_come_back_from_the_written_recipe(dataset: Path, tmp_path: Path) -> None:
    table = {r"^denoiser\.mid": 0.5, "down_blocks.0": 2.0, "plain": 1.5}
    recipe = check_values(values(dataset, block_lr=table, text_encoder_lr=[1e-4])).recipe
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    from lorabake.recipe import check

    again = check(tmp_path / "recipe.toml").recipe
    assert again.rates.block_lr == table and list(again.rates.block_lr or ()) == list(table)
    assert again == recipe
