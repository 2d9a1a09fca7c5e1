"""What other trainers do to need less memory, as recipes, and back."""

from __future__ import annotations

from typing import Any

import pytest

from lorabake.recipe.exports import export_recipe

FLUX = (
    'network_module = "networks.lora_flux"\npretrained_model_name_or_path = "flux.safetensors"\nae = "ae"\nclip_l = "clip_l"\nt5xxl = "t5"\n'
    'train_data_dir = "p"\n'
)
SD3 = FLUX.replace("lora_flux", "lora_sd3").replace('ae = "ae"', 'clip_g = "clip_g"')


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (FLUX + "blocks_to_swap = 18\ngradient_checkpointing = true", 9 + 18),
        (FLUX + "blocks_to_swap = 35", 17 + 36),
        (FLUX + "blocks_to_swap = 40", 17 + 36),
        (SD3 + "blocks_to_swap = 40", 36),
        (SD3.replace("flux.", "sd3_medium.") + "blocks_to_swap = 40", 22),
        (FLUX + "blocks_to_swap = 2", 1 + 2),
        (FLUX + "blocks_to_swap = 0", None),
        (FLUX + "split_mode = true", 9 + 18),
        (FLUX + "split_mode = true\nblocks_to_swap = 0", None),
        (SD3 + "blocks_to_swap = 20\ngradient_checkpointing = false", 20),
    ],
)
def test_blocks_of_kohya_wait_as_many(imported: Any, given: str, count: int | None) -> None:
    """Flux: half of the number are double blocks, and for each of the others two single ones wait."""
    found = imported(given)
    train = found.values["train"]
    stops = any("would stop with an error" in line.note for line in found.of("converted"))
    assert stops == ("blocks_to_swap = 40" in given)
    assert train.get("blocks_to_swap") == count
    assert train.get("gradient_checkpointing", False) is (count is not None), "blocks that wait must be recomputed"


def test_blocks_that_need_not_or_cannot_wait(imported: Any) -> None:
    sd = FLUX.replace("networks.lora_flux", "networks.lora").replace('ae = "ae"\nclip_l = "clip_l"\nt5xxl = "t5"\n', "")
    cases = [
        (sd + "blocks_to_swap = 8", "unused"),
        (FLUX + "blocks_to_swap = 1", "left"),
    ]
    for given, kind in cases:
        found = imported(given)
        assert [line.key for line in found.of(kind) if line.key == "blocks_to_swap"] == ["blocks_to_swap"]
        assert "blocks_to_swap" not in found.values["train"]


@pytest.mark.parametrize(
    ("base", "encoder", "count", "theirs"),
    [
        ("f.sft", "t5.sft", 27, 18),
        ("f.sft", "t5.sft", 28, 18),
        ("f.sft", "t5.sft", 3, 2),
        ("f.sft", "t5.sft", 57, 35),
        ("s.sft", "clip_g.sft", 20, 20),
        ("s.sft", "clip_g.sft", 24, 22),
        ("sd3.5_large.sft", "clip_g.sft", 38, 36),
    ],
)
def test_an_export_has_as_many_wait_as_sd_scripts_takes(base: str, encoder: str, count: int, theirs: int) -> None:
    values = {
        "model": {"base": base, "text_encoders": ["clip_l.sft", encoder]},
        "data": {"folder": "p"},
        "objective": {"name": "flow", "timesteps": "sigmoid"},
        "train": {"blocks_to_swap": count, "gradient_checkpointing": True},
    }
    told = export_recipe(values)
    assert told.config["blocks_to_swap"] == theirs and told.config["gradient_checkpointing"] is True
    (line,) = (line for line in told.lines if line.key == "train.blocks_to_swap")
    assert ("the nearest" in line.note) == (count in (28, 57, 24, 38))


def test_an_export_says_that_u_nets_have_no_blocks_that_wait() -> None:
    train = {"blocks_to_swap": 6, "gradient_checkpointing": True}
    told = export_recipe({"model": {"base": "b.sft"}, "data": {"folder": "p"}, "train": train})
    assert "blocks_to_swap" not in told.config
    assert [line.key for line in told.lines if line.kind in ("left", "lost")] == ["train.blocks_to_swap"]


def test_offloading_of_others_is_told_with_what_to_set(imported: Any) -> None:
    config = {
        "training_method": "LORA",
        "model_type": "FLUX_DEV_1",
        "base_model_name": "f",
        "concepts": [{"path": "p"}],
    }
    cases = [
        ({"gradient_checkpointing": "CPU_OFFLOADED", "layer_offload_fraction": 0.7}, "left", "layer_offload_fraction"),
        ({"gradient_checkpointing": "CPU_OFFLOADED"}, "left", "gradient_checkpointing"),
        ({"gradient_checkpointing": "ON", "layer_offload_fraction": 0.7}, "unused", "layer_offload_fraction"),
    ]
    for given, kind, key in cases:
        found = imported({**config, **given})
        assert [line.key for line in found.of("left", "unused")] == [key] == [line.key for line in found.of(kind)]
        assert found.values["train"]["gradient_checkpointing"] is True
    process = {
        "type": "sd_trainer",
        "model": {"name_or_path": "m", "is_flux": True, "low_vram": True, "layer_offloading": True},
        "network": {"type": "lora", "linear": 4},
    }
    job = imported({"job": "extension", "config": {"name": "x", "process": [process]}})
    notes = {line.key: line.note for line in job.of("left")}
    assert notes.keys() == {"model.low_vram", "model.layer_offloading"}
    assert all("train.blocks_to_swap" in note for note in notes.values())
