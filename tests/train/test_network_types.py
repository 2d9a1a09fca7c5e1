"""Every network type in the one loop: killed and continued to the same bytes, and drawn with from its file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image, ImageChops

from lorabake.base.cards import cards
from lorabake.protocols.adapter import AdapterCard

LAYERWISE = [card for card in cast(dict[str, AdapterCard], cards("adapter")).values() if card.saves == "lora"]
EVERYWHERE = {"adapter.rank": 2, "adapter.conv_rank": 2, "adapter.convolutions": True, "adapter.conv_block_size": 6}
"""What takes a type to every layer it can change, where it has such a setting."""
EXTRAS: dict[str, list[dict[str, Any]]] = {
    "lora": [{}, {"adapter.dora": True, "adapter.tucker": True}],
    "loha": [{}, {"adapter.dora": True, "adapter.tucker": True}],
    "lokr": [{}, {"adapter.factor": 4, "adapter.decompose_both": True, "adapter.dora": True}],
    "oft": [{"adapter.constraint": 0.01, "adapter.rescale": True}],
    "dylora": [{"adapter.one_unit": True}],
}
DIE = """
import os, signal
import lorabake.train.run as m
real = m._Session._after_step
def after(self, step):
    stop = real(self, step)
    if step == 2: os.kill(os.getpid(), signal.SIGKILL)
    return stop
m._Session._after_step = after
"""
CASES = [
    pytest.param(card, extra, id=" ".join([card.name, *extra]))
    for card in LAYERWISE
    for extra in EXTRAS.get(card.name, [{}])
]


@pytest.mark.parametrize(("card", "extra"), CASES)
def test_it_trains_resumes_to_the_same_bytes_and_draws(
    oven: Any,
    dataset: Path,
    tmp_path: Path,
    result: Callable[[Path], Any],
    tiny: Path,
    card: AdapterCard,
    extra: dict[str, Any],
) -> None:
    own = {name: value for name, value in EVERYWHERE.items() if name.partition(".")[2] in card.settings.model_fields}
    chosen = {"adapter.name": card.name, **own, **extra, "train.batch_size": 2, "train.device": "cpu", "train.length": "3 steps",
              "save.state_every": 1e-3, "output.name": "mira", "model.base": str(tiny), "optimizer.lr": 0.05}  # fmt: skip
    words = [
        word
        for name, value in chosen.items()
        for word in ("--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    ]
    for name, before, code in (("whole", "", 0), ("killed", DIE, -9), ("killed", "", 0)):
        done = oven.run("train", dataset, "--into", tmp_path / name, *words, before=before)
        assert done.code == code, done.err
    assert result(tmp_path / "killed").differences(result(tmp_path / "whole")) == []
    file = tmp_path / "whole" / "checkpoints" / "mira.safetensors"
    pictures = []
    for lora in ([], ["--lora", file]):
        out = tmp_path / f"{len(lora)}.png"
        done = oven.run("generate", "mira --s 2 --w 32 --h 32", "--base", tiny, *lora, "--out", out, cwd=tmp_path)
        assert done.code == 0, done.err
        pictures.append(Image.open(out).convert("RGB"))
    assert ImageChops.difference(*pictures).getbbox(), "the file changes nothing"
    assert os.path.getsize(file) > 1000
