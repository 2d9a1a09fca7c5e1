"""Configs of LoRA_Easy_Training_Scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import UserError

CONFIG = """
[[subsets]]
name = "mira"
num_repeats = 10
keep_tokens = 1
caption_extension = ".txt"
shuffle_caption = true
image_dir = "pictures"

[train_mode]
train_mode = "lora"

[noise_args]

[general_args.args]
pretrained_model_name_or_path = "base.safetensors"
sdxl = true
no_half_vae = true
mixed_precision = "bf16"
seed = 23
max_train_steps = 1000

[general_args.dataset_args]
resolution = 768
batch_size = 2

[network_args.args]
network_dim = 8
network_alpha = 4.0

[network_args.args.network_args]
conv_dim = 4
conv_alpha = 2.0

[optimizer_args.args]
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine"
learning_rate = 0.0001
warmup_ratio = 0.05

[optimizer_args.args.optimizer_args]
weight_decay = "0.2"
betas = "0.9,0.98"

[saving_args.args]
output_name = "mira"
save_every_n_epochs = 1
save_toml = true

[bucket_args.dataset_args]
enable_bucket = true
min_bucket_reso = 320
"""


def test_its_pages_are_read_each_for_what_it_is(imported: Any, tmp_path: Path) -> None:
    found = imported(CONFIG)
    assert found.trainer == "a config of LoRA_Easy_Training_Scripts"
    assert found.values["model"] == {"base": str(tmp_path / "base.safetensors")}
    adapter = {"rank": 8, "alpha": 4.0, "conv_rank": 4, "conv_alpha": 2.0}
    assert {key: value for key, value in found.values["adapter"].items() if key != "name"} == adapter
    optimizer = found.values["optimizer"]
    assert optimizer["name"] == "adamw-8bit" and optimizer["lr"] == 1e-4
    assert optimizer["weight_decay"] == 0.2 and optimizer["betas"] == [0.9, 0.98]
    assert found.values["schedule"] == {"name": "cosine", "warmup": "50 steps"}
    assert found.values["train"]["batch_size"] == 2 and found.values["train"]["length"] == "1000 steps"
    data = found.values["data"]
    assert (data["folder"], data["repeats"]) == (str(tmp_path / "pictures"), 10)
    assert data["captions"] == {"shuffle": True, "keep_tokens": 1}
    assert data["buckets"]["resolution"] == 768 and data["buckets"]["min"] == 320
    assert not found.of("lost", "unknown")
    assert "warmup_ratio" in {line.key for line in found.of("converted")}
    assert "save_toml" in found.asides


def test_networks_are_told_by_their_arguments(imported: Any) -> None:
    lycoris = imported(CONFIG.replace("conv_dim = 4", 'conv_dim = 4\nalgo = "loha"'))
    assert lycoris.values["adapter"] == {"name": "loha", "rank": 8, "alpha": 4.0, "conv_rank": 4, "conv_alpha": 2.0}
    unknown = imported(CONFIG.replace("conv_dim = 4", 'conv_dim = 4\nalgo = "abba"'))
    assert any("no adapter 'abba'" in line.note for line in unknown.of("lost") if line.key == "network_module")
    dylora = imported(CONFIG.replace("conv_dim = 4", "conv_dim = 4\nunit = 4"))
    assert dylora.values["adapter"]["name"] == "dylora" and dylora.values["adapter"]["unit"] == 4
    assert not dylora.of("lost")


def test_schedules_by_class_have_cycles(imported: Any) -> None:
    scheduler = 'lr_scheduler_type = "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts"'
    cycles = CONFIG.replace("warmup_ratio", f"{scheduler}\nlr_scheduler_num_cycles = 4\nwarmup_ratio")
    found = imported(cycles)
    assert [line.key for line in found.of("lost")] == ["warmup_ratio"]
    assert found.values["schedule"] == {"name": "rex-warm-restarts", "first_cycle": "250 steps"}
    assert "lr_scheduler_num_cycles" not in {line.key for line in found.of("unused", "unknown")}
    epochs = imported(cycles.replace("max_train_steps = 1000", "max_train_epochs = 8"))
    assert {line.key for line in epochs.of("lost")} == {"warmup_ratio", "lr_scheduler_num_cycles"}


def test_embeddings_are_refused(imported: Any) -> None:
    with pytest.raises(UserError, match="'textual_inversion'"):
        imported(CONFIG.replace('train_mode = "lora"', 'train_mode = "textual_inversion"'))
