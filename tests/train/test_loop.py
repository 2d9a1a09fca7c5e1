"""One optimizer step, taken apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.events import Events
from lorabake.dataset.order import epoch_batches
from lorabake.optimizers.schedules import factor
from lorabake.recipe import check_values
from lorabake.train.bake import Bake
from lorabake.train.loop import batch_inputs, batch_loss, optimizer_step, run_loop
from lorabake.train.prepare import prepare


def bake(dataset: Path, **sections: dict[str, Any]) -> Bake:
    raw: dict[str, dict[str, Any]] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu"},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return prepare(check_values(raw), Events())


def gradients(baked: Bake) -> torch.Tensor:
    return torch.cat([group.gradient for group in baked.groups])


def weights(baked: Bake) -> torch.Tensor:
    return torch.cat([group.values.detach() for group in baked.groups]).clone()


def test_accumulated_gradients_are_the_mean_of_the_batches(dataset: Path) -> None:
    baked = bake(dataset, train={"max_grad_norm": 0})
    batches = [(0, 1), (2,), (3, 4)]
    single = []
    for micro, batch in enumerate(batches):
        for group in baked.groups:
            group.zero_gradient()
        batch_loss(baked, 0, micro, batch).backward()
        single.append(gradients(baked).clone())
    done = optimizer_step(baked, 0, batches)
    torch.testing.assert_close(gradients(baked), torch.stack(single).mean(0), rtol=1e-4, atol=1e-8)
    assert done.images == 5
    assert done.grad_norm == pytest.approx(float(torch.stack(single).mean(0).norm()), rel=1e-4)


def test_captions_know_the_step_and_the_epoch(dataset: Path) -> None:
    captions = {"token_warmup": "4 steps", "token_warmup_min": 0, "caption_dropout_every_n_epochs": 2}
    baked = bake(dataset, data={"folder": str(dataset), "captions": captions}, train={"length": "3 epochs"})
    assert (baked.steps_per_epoch, baked.total_steps, baked.token_warmup_steps) == (3, 9, 4)
    full, shown = baked.samples[0].caption.split(", "), []
    spied = replace(baked, text=lambda captions: shown.extend(captions) or baked.text(captions))
    for step in range(9):
        batch_inputs(spied, step, 0, (0,))
    assert shown[:3] == [", ".join(full[: step * len(full) // 4]) for step in range(3)]
    assert shown[3:6] == [""] * 3
    assert shown[6:] == [", ".join(full)] * 3


def test_noise_belongs_to_the_step_and_the_batch_alone(dataset: Path) -> None:
    baked = bake(dataset)
    with torch.no_grad():
        losses = [float(batch_loss(baked, step, micro, (0, 1))) for step, micro in ((3, 0), (3, 1), (4, 0), (3, 0))]
    assert losses[0] == losses[3] and len(set(losses)) == 3


def test_captions_are_dealt_anew_to_every_picture_step_and_batch(dataset: Path) -> None:
    baked = bake(dataset, data={"captions": {"shuffle": True}})
    heard: list[list[str]] = []

    def listen(captions: list[str]) -> Any:
        heard.append(captions)
        return baked.text(captions)

    listening = replace(baked, text=listen)
    with torch.no_grad():
        for step, micro in ((3, 0), (3, 1), (4, 0), (3, 0)):
            batch_loss(listening, step, micro, (0, 0))
    assert heard[0] == heard[3]
    dealt = [caption for captions in heard[:3] for caption in captions]
    assert len(set(dealt)) == 6, "the same picture twice in a batch has two orders as well"
    assert {tuple(sorted(caption.split(", "))) for caption in dealt} == {
        tuple(sorted(baked.samples[0].caption.split(", ")))
    }


def test_every_step_has_its_rate(dataset: Path) -> None:
    settings = {"name": "cosine", "warmup": 0.5}
    baked = bake(
        dataset, train={"length": "4 steps"}, schedule=settings, optimizer={"lr": 0.01, "text_encoder_lr": 0.002}
    )
    seen: list[dict[str, Any]] = []
    run_loop(baked, 0, Events(seen.append), lambda step: False)
    recipe = baked.recipe
    for index, event in enumerate(seen):
        scale = factor("cosine", recipe.schedule.settings, index, 4)  # pyright: ignore[reportArgumentType]
        assert event["lr"] == {"denoiser": pytest.approx(0.01 * scale), "text_encoder": pytest.approx(0.002 * scale)}


def test_at_rate_zero_nothing_moves(dataset: Path) -> None:
    baked = bake(dataset, schedule={"warmup": 0.9}, train={"length": "10 steps"})
    before = weights(baked)
    optimizer_step(baked, 0, [(0, 1)])  # the first step of a warm-up has rate 0
    assert torch.equal(weights(baked), before)
    optimizer_step(baked, 1, [(0, 1)])
    assert not torch.equal(weights(baked), before)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "expected"), [(2, 1, 3), (2, 2, 2), (4, 1, 2), (1, 4, 2), (6, 1, 1), (1, 1, 6)]
)
def test_steps_of_an_epoch(dataset: Path, batch_size: int, accumulation: int, expected: int) -> None:
    checked = check_values(
        {
            "data": {"folder": str(dataset)},
            "train": {"batch_size": batch_size, "gradient_accumulation": accumulation, "device": "cpu"},
        }
    )
    assert checked.length.steps_per_epoch == expected


def test_every_picture_is_seen_once_an_epoch_and_a_resumed_epoch_takes_the_rest(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorabake.train import loop

    baked = bake(dataset, train={"gradient_accumulation": 2, "length": "2 epochs"})
    taken: list[tuple[int, list[tuple[int, ...]]]] = []

    def note(given: Bake, step: int, batches: Any) -> loop.Step:
        taken.append((step, list(batches)))
        return loop.Step(0.1, 0.1, 1)

    monkeypatch.setattr(loop, "optimizer_step", note)
    run_loop(baked, 0, Events(), lambda step: False)
    whole = list(taken)
    seed = baked.recipe.train.seed
    for epoch in (0, 1):
        batches = [batch for step, group in whole if step // 2 == epoch for batch in group]
        assert batches == epoch_batches(baked.buckets, [1] * 6, 2, seed, epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(6))
    for start in range(4):
        taken.clear()
        run_loop(baked, start, Events(), lambda step: False)
        assert taken == whole[start:]


def test_it_can_be_stopped_after_any_step(dataset: Path) -> None:
    baked = bake(dataset, train={"length": "2 epochs"})
    told: list[int] = []
    assert run_loop(baked, 0, Events(), lambda step: told.append(step) or step == 4) == 4
    assert told == [1, 2, 3, 4]


def test_both_views_are_used(dataset: Path) -> None:
    baked = bake(dataset, data={"flip": True})
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in baked.latents)
    with torch.no_grad():
        mirrored = replace(baked, latents=[pair[::-1] for pair in baked.latents])
        straight = replace(baked, latents=[[pair[0]] * 2 for pair in baked.latents])
        losses = [
            [float(batch_loss(given, step, 0, (0,))) for given in (baked, mirrored, straight)] for step in range(12)
        ]
    assert all(a != b for a, b, _ in losses), "the view of a step is one of the two, and swapping them swaps it"
    shown = [a == c for a, _, c in losses]
    assert 2 <= sum(shown) <= 10, "both are shown"


def test_the_weights_of_a_failed_step_are_those_before_it(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabake.base.errors import NotFinite
    from lorabake.train import loop

    baked = bake(dataset)
    optimizer_step(baked, 0, [(0, 1)])
    before = weights(baked)
    real = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *arguments: real(*arguments) * float("inf"))
    with pytest.raises(
        NotFinite, match=r"Step 2: the loss is not finite\. Pictures in it: 1_mira/002\.png, 1_mira/003\.png\."
    ):
        optimizer_step(baked, 1, [(2, 3)])
    assert torch.equal(weights(baked), before)
