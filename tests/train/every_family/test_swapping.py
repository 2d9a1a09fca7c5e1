"""Blocks that wait in main memory, for every family: the same numbers, with two of them on the card at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.families.networks import latent_model
from lorabake.families.networks.swapping import BlockSwap, _laid_out, _put
from lorabake.recipe import check, check_values
from lorabake.recipe.load import read_raw
from lorabake.train.bake import Bake
from lorabake.train.loop import batch_loss
from lorabake.train.prepare import prepare
from lorabake.train.run import train

RECOMPUTED = "train.gradient_checkpointing=true"
ALL = ("train.blocks_to_swap=100", RECOMPUTED)


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> list[BlockSwap]:
    """Those that are made."""
    made: list[BlockSwap] = []

    class Noted(BlockSwap):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(latent_model, "BlockSwap", Noted)
    return made


def baked(kitchen: Any, *options: str) -> Bake:
    bake = prepare(check(kitchen.recipe, list(options)), Events())
    for group in bake.groups:
        group.values.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return bake


def gradients(bake: Bake, steps: int = 3, *, looking: bool = True) -> list[torch.Tensor]:
    """Of some batches; with what the model says while it does not learn in between, if it is to be ``looking``."""
    found: list[torch.Tensor] = []
    torch.manual_seed(0)  # what is dropped while nothing learns
    for step in range(steps):
        for group in bake.groups:
            group.zero_gradient()
        with bake.graft.ahead():
            batch_loss(bake, step, 0, (0, 2)).backward()
        if looking:
            with torch.no_grad():
                found.append(batch_loss(bake, step, 1, (1,)))
        found.append(torch.cat([group.gradient for group in bake.groups]).clone())
    return found


def spoil_homes(bake: Bake, swap: BlockSwap) -> None:
    """Whoever computes with a weight where it waits gets nonsense, as a card could not compute with it at all."""
    with bake.graft.ahead():  # small layers' weights are copied, once
        pass
    for block in swap._waiting:
        lost = torch.full_like(block.home, 255)  # NaN in floating point
        block.at_home = _laid_out(block.at_home, lost)
        _put(block.at_home)


SMALL = "model.quantize='nf4'"


@pytest.mark.parametrize("options", [(), (SMALL,)], ids=["whole", "nf4"])
def test_gradients_are_the_same(kitchen: Any, options: tuple[str, ...], swaps: list[BlockSwap]) -> None:
    same_gradients(kitchen, options, swaps)


@pytest.mark.parametrize(
    "options",
    [
        ("adapter.module_dropout=0.5",),
        ("adapter.block_rank={proj_out=0}",),
        ("optimizer.lr=0", "optimizer.text_encoder_lr=1e-4"),
    ],
)
def test_they_are_where_a_block_ends_in_a_layer_that_nothing_is_added_to(
    kitchens: Any, options: tuple[str, ...], swaps: list[BlockSwap]
) -> None:
    same_gradients(kitchens("sdxl"), (SMALL, *options), swaps)


def same_gradients(kitchen: Any, options: tuple[str, ...], swaps: list[BlockSwap]) -> None:
    plain = gradients(baked(kitchen, RECOMPUTED, *options))
    bake = baked(kitchen, *ALL, *options)
    spoil_homes(bake, swaps[0])
    for one, other in zip(plain, gradients(bake), strict=True):  # a CPU's sums depend on where in memory numbers lie
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_after_the_first_steps_every_block_is_there_before_its_turn(kitchen: Any, swaps: list[Any]) -> None:
    bake = baked(kitchen, *ALL)
    (swap,) = swaps
    late: list[int] = []
    fetch = swap._fetch

    def watched(index: int) -> None:
        late.extend([index] * (index not in swap._held))
        fetch(index)

    swap._fetch = watched
    gradients(bake, steps=2, looking=False)
    assert late
    late.clear()
    gradients(bake, steps=3, looking=False)
    assert late == []
    assert swap.on_card == 2 * max(block.home.numel() for block in swap._waiting)


def test_a_run_learns_and_draws_the_same(kitchens: Any, tmp_path: Path, losses: Any) -> None:
    kitchen = kitchens("sdxl")
    told: list[dict[str, Any]] = []
    options = ["train.length=4 steps", "save.every=2 steps", RECOMPUTED]
    for name, more in (("plain", []), ("swapped", ["train.blocks_to_swap=4"])):
        chosen = check(kitchen.recipe, [*options, f"sample.prompts=['{kitchen.prompt}']", *more])
        train(chosen, tmp_path / name, Events(told.append))
    assert losses(tmp_path / "swapped") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    drawn, again = (sorted((tmp_path / name / "samples").glob("*.png")) for name in ("plain", "swapped"))
    assert len(drawn) == len(again) > 1
    for picture, other in zip(drawn, again, strict=True):
        assert np.abs(np.asarray(Image.open(picture), int) - np.asarray(Image.open(other), int)).max() <= 2
    assert any("train.blocks_to_swap: 4 of " in event.get("text", "") for event in told)


def test_pictures_are_drawn_with_it_too(kitchen: Any, swaps: list[BlockSwap]) -> None:
    """Of every family: two blocks are on the card, also of those that read no weight before its turn, and the picture is the same."""
    import lorabake

    recipe, notes = check(kitchen.recipe).recipe, []
    prompts, source = recipe.sample.prompts, recipe.model.source()
    (plain, *_) = lorabake.generate(prompts, device="cpu", **source)
    (drawn, *_) = lorabake.generate(prompts, device="cpu", blocks_to_swap=100, on_note=notes.append, **source)
    assert drawn.tobytes() == plain.tobytes() and np.ptp(np.asarray(drawn)) > 50
    (swap,) = swaps
    assert any(note.startswith("blocks_to_swap: ") for note in notes) and swap.nbytes > 0
    assert swap.on_card == 2 * max(block.home.numel() for block in swap._waiting)
    assert sum(held is not None for held in swap._held) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["train.blocks_to_swap=4"], "must be recomputed"),
        (["train.blocks_to_swap=4", "train.gradient_checkpointing=0.5"], "must be recomputed"),
        (["train.blocks_to_swap=2", RECOMPUTED], "fewer than 3 save nothing"),
        (["train.blocks_to_swap=-1"], "blocks_to_swap"),
    ],
)
def test_what_cannot_work_is_refused(kitchens: Any, options: list[str], why: str) -> None:
    with pytest.raises(Problems, match=why):
        check(kitchens("sd1").recipe, options)


def test_trained_blocks_cannot_wait(kitchens: Any) -> None:
    raw = read_raw(kitchens("sd1").recipe, list(ALL))
    with pytest.raises(Problems, match="trains the blocks themselves"):
        check_values({**raw, "adapter": {"name": "full"}})


def test_on_a_cpu_it_is_said_to_gain_nothing(kitchens: Any) -> None:
    checked = check(kitchens("sd1").recipe, list(ALL))
    assert any("blocks are copied for nothing" in warning for warning in checked.warnings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_gradients_are_the_same_from_less_memory(kitchen: Any) -> None:
    peaks: list[int] = []
    found: list[list[torch.Tensor]] = []
    for options in ((RECOMPUTED,), ALL):
        bake = baked(kitchen, "train.device='cuda'", "train.precision='bf16'", *options)
        assert options == ALL or bake.captured is not None
        torch.cuda.reset_peak_memory_stats()
        found.append([tensor.cpu() for tensor in gradients(bake)])
        peaks.append(torch.cuda.max_memory_allocated())
        del bake
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert peaks[1] <= peaks[0] + (1 << 20)
