"""Captions longer than the text encoder, and clip skip, from training to pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

Options = Callable[..., list[str]]
FULL = "hair, " * 37 + "hair "
"""75 tokens of the pocket model."""


def caption(dataset: Path, text: str) -> Path:
    for path in dataset.rglob("*.txt"):
        path.write_text(text)
    return dataset


def weights(oven: Any, dataset: Path, into: Path, words: list[str]) -> dict[str, torch.Tensor]:
    done = oven.run("train", dataset, "--into", into, *words)
    assert done.code == 0, done.err
    return load_file(into / "checkpoints" / "mira.safetensors")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("max_tokens", [75, 150])
def test_what_is_behind_75_tokens_is_trained_on_with_two_windows_only(
    oven: Any, dataset: Path, options: Options, tmp_path: Path, max_tokens: int
) -> None:
    """The text encoder is trained too: its gradients come through the windows."""
    words = options(model__base="pocket", model__max_tokens=max_tokens, train__length="1 steps", train__batch_size=3)
    beach, night = (
        weights(oven, caption(dataset, FULL + ending), tmp_path / ending, words) for ending in ("beach", "night")
    )
    different = {name.split("_")[1] for name in beach if not torch.equal(beach[name], night[name])}
    assert different == ({"unet", "te"} if max_tokens == 150 else set())


def test_a_run_with_long_captions_says_so_and_draws_with_them(
    oven: Any, dataset: Path, options: Options, tmp_path: Path
) -> None:
    """Its samples, and later grids and pictures with its LoRA, read prompts as training read captions."""
    prompts = [f"{FULL}{ending} --s 2 --w 64" for ending in ("beach", "night")]
    words = options(
        model__base="pocket", model__max_tokens=150, model__clip_skip=2, train__length="1 steps", optimizer__text_encoder_lr=0.0,
        save__dtype="fp32", sample__prompts=prompts,
    )  # fmt: skip
    weights(oven, caption(dataset, FULL + "beach"), tmp_path / "run", words)
    file = tmp_path / "run" / "checkpoints" / "mira.safetensors"
    with safe_open(file, "pt") as header:
        told = header.metadata()
    assert (told["ss_max_token_length"], told["ss_clip_skip"]) == ("150", "2")
    beach, night = (pixels(tmp_path / "run" / "samples" / f"step00000001_{index:02d}.png") for index in (0, 1))
    assert (beach != night).any()
    drawn = {}
    for name, more, seen in (("long", [], True), ("short", ["--max-tokens", "75"], False)):
        done = oven.run("generate", prompts[0], "--lora", file, *more, "--out", tmp_path / f"{name}.png")
        assert done.code == 0 and ("the rest is not seen: 'beach'" in done.err) != seen, done.err
        drawn[name] = np.abs(pixels(tmp_path / f"{name}.png") - beach).max()
    assert drawn["long"] <= 2 < drawn["short"]
    done = oven.run("grid", tmp_path / "run", "--prompt", prompts[0], "--out", tmp_path / "grid.png")
    assert done.code == 0 and "not seen" not in done.err and (tmp_path / "grid.png").is_file(), done.err
