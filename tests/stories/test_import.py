"""Coming from kohya: two configs become a recipe, and the recipe trains."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabake.base.places import POCKET_MODEL
from lorabake.formats.safetensors_file import read_header
from lorabake.pocket.world import draw, sample
from lorabake.sampling.infotext import save_png

TRAINING = f"""
pretrained_model_name_or_path = '{POCKET_MODEL}'
network_module = "networks.lora"
network_dim = 4
network_alpha = 2
learning_rate = 1e-3
network_train_unet_only = true
max_train_epochs = 2
lr_scheduler = "cosine"
lr_warmup_steps = 2
save_every_n_epochs = 1
save_precision = "fp16"
output_name = "mira"
seed = 3
mixed_precision = "no"
cache_latents = true
"""
DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 32
max_bucket_reso = 128
  [[datasets.subsets]]
  image_dir = "one"
  num_repeats = 3
  [[datasets.subsets]]
  image_dir = "two"
"""


@pytest.mark.slow
def test_a_pair_of_kohya_configs_trains(lorabake: Callable[..., object], tmp_path: Path) -> None:
    rng = random.Random(1)
    for index in range(4):
        drawing = draw(sample(rng), index, 64)
        path = tmp_path / ("one" if index < 2 else "two") / f"{index}.png"
        save_png(drawing.image, path)
        path.with_suffix(".txt").write_text(", ".join(drawing.tags))
    (tmp_path / "train.toml").write_text(TRAINING)
    (tmp_path / "data.toml").write_text(DATASET)
    lorabake("import", "train.toml", "--dataset", "data.toml", "--into", "mira.toml")
    lorabake("train", "mira.toml", "--into", "run")
    files = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert files == ["mira-000001.safetensors", "mira.safetensors"]
    metadata = read_header(tmp_path / "run" / "checkpoints" / "mira.safetensors").metadata
    assert metadata["ss_num_train_images"] == "8", "two pictures three times, two once"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_text_encoder_lr"]) == (
        "4",
        "2.0",
        "0.0",
    )
