"""LoRA files on a model: taken off without a trace, refused when they do not fit, and drawn as diffusers draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorabake.adapters import graft
from lorabake.adapters.lora import LoraSettings
from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families import load_model
from lorabake.formats.kohya import write_lora
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.apply import apply_lora
from lorabake.sampling.draw import draw

PROMPTS = [
    Prompt("1girl, red hair, portrait, beach, flat color", seed=3, steps=12, cfg=4.0),
    Prompt("zorbi, full body, forest, outline", seed=4, steps=12, cfg=4.0),
]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file on every layer it can have, linear and convolutional, strong enough to be seen."""
    model = load_model("pocket")
    settings = LoraSettings(rank=4, alpha=2.0, conv_rank=2, conv_alpha=2.0)
    grafted = graft(model, "lora", settings, seed=5, parts=("denoiser", "text_encoder"))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for named in grafted.parameters().values():
            for name, parameter in named.items():
                if "lora_up" in name:
                    parameter.normal_(0, 0.05, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "strong.safetensors"
    write_lora(path, grafted.tensors(), {}, "fp32")
    return path


def _distance(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def test_it_changes_pictures_and_comes_off_without_a_trace(lora: Path) -> None:
    model = load_model("pocket")
    before = draw(model, PROMPTS)
    applied = apply_lora(model, lora)
    assert _distance(draw(model, PROMPTS)[0], before[0]) > 30
    applied.remove()
    assert [_distance(one, other) for one, other in zip(draw(model, PROMPTS), before, strict=True)] == [0, 0]


def test_a_file_for_another_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    tensors = {
        "lora_unet_nowhere_to_q.lora_down.weight": torch.ones(2, 4),
        "lora_unet_nowhere_to_q.lora_up.weight": torch.ones(4, 2),
    }
    write_lora(path, tensors, {}, "fp32")
    with pytest.raises(UserError, match=r"other\.safetensors.*does not fit this base model.*lora_unet_nowhere_to_q"):
        apply_lora(load_model("pocket"), path)


@pytest.mark.slow
def test_the_file_gives_the_same_picture_in_diffusers(lora: Path) -> None:
    """At most 2 of 255 in any pixel: float32 sums in another order."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    model = load_model("pocket")
    apply_lora(model, lora)
    ours = draw(model, PROMPTS)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(POCKET_MODEL, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    for prompt, picture in zip(PROMPTS, ours, strict=True):
        theirs = pipeline(
            prompt.text, num_inference_steps=prompt.steps, guidance_scale=prompt.cfg, width=64, height=64,
            generator=torch.Generator("cpu").manual_seed(prompt.seed),
        ).images[0]  # fmt: skip
        assert _distance(picture, theirs) <= 2
