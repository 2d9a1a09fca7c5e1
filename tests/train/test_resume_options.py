"""Masks, regularisation pictures, what is kept of the base and held-out pictures, all at once: killed, the same command continues to the
same bytes."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import save_png


@pytest.fixture
def words(
    request: pytest.FixtureRequest, dataset: Path, tmp_path: Path, options: Callable[..., list[str]]
) -> list[str]:
    """Arguments of a run with all of them, beside those of ``request``; its folders lie beside the dataset."""
    rng = random.Random(8)
    for folder, count in (("reg", 5), ("others", 2)):
        for index in range(count):
            save_png(draw(sample(rng), 10 * count + index, 64).image, tmp_path / folder / "1_girl" / f"{index}.png")
    (dataset / "masks").mkdir()
    for path in sorted(dataset.glob("1_mira/*.png"))[:-1]:
        path.with_suffix(".txt").write_text(f"mira, {path.with_suffix('.txt').read_text()}")
        mask = Image.new("L", (64, 64), "black")
        mask.paste("white", (32, 0, 64, 64))
        mask.save(dataset / "masks" / path.name)
    return options(
        train__length="9 steps", save__every="4 steps", data__flip=True, data__captions__shuffle=True,
        data__masks__source="files", data__masks__unmasked_probability=0.3,
        data__regularisation=str(tmp_path / "reg"), data__prior_loss_weight=0.5,
        preservation__weight=0.5, preservation__share=0.6, preservation__trigger="mira", preservation__outside_masks=0.5,
        validation__folder=str(tmp_path / "others"), validation__every="3 steps", **request.param,
    )  # fmt: skip


CROPS = {
    "data__buckets__resolution": [32, 64], "data__buckets__enabled": False, "data__augment__random_crop": True,
    "data__augment__views": "fresh", "data__captions__wildcards": True, "data__captions__token_warmup": 0.5,
}  # fmt: skip


DYLORA = {"adapter__name": "dylora", "adapter__rank": 4}
FROZEN = {"adapter__name": "lora-fa", "adapter__rank": 4}


@pytest.mark.parametrize(
    "words", [{}, CROPS, DYLORA, FROZEN], indirect=True, ids=["whole", "fresh crops", "drawn ranks", "frozen half"]
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_with_every_option_on(
    oven: Any, dataset: Path, tmp_path: Path, words: list[str], result: Any, kill_at: Any
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = oven.run("train", dataset, "--into", whole, *words)
    assert done.code == 0, done.err
    assert "held out at step 0" in done.err and "Every epoch takes 6 of them" in done.err
    for steps in (1, 4, 6):
        pid = oven.start("train", dataset, "--into", cut, *words)
        assert kill_at(pid, lambda steps=steps: done_steps(cut) >= steps)
        assert oven.end().code != 0
    done = oven.run("train", dataset, "--into", cut, *words)
    assert done.code == 0, done.err
    assert result(cut).differences(result(whole)) == []
    assert (cut / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()


def done_steps(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_bytes().count(b'"kind": "step"') if events.exists() else 0
