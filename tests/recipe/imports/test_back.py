"""Training configs of sd-scripts through a recipe and back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lorabake.recipe.exports import export_recipe
from lorabake.recipe.imports import import_config
from lorabake.recipe.imports._layer_names import UNETS
from lorabake.recipe.toml import flat_to_toml


def foreign(rng: random.Random, home: Path) -> dict[str, Any]:
    """A random training config of sd-scripts, of keys that mean something here."""

    def maybe(chance: float = 0.5, **keys: Any) -> dict[str, Any]:
        return keys if rng.random() < chance else {}

    flux, lr, sdxl = rng.random() < 0.3, rng.choice([1e-4, 3e-4]), rng.random() < 0.5
    rank = rng.choice([4, 16])
    given = {
        "pretrained_model_name_or_path": str(home / ("flux" if flux else "sdxl" if sdxl else "up.safetensors")),
        "network_module": "networks.lora_flux" if flux else "networks.lora",
        "network_dim": rank,
        "network_alpha": float(rank),
        "train_data_dir": str(home / "pictures"),
        "learning_rate": lr,
        "unet_lr": lr,
        "optimizer_type": rng.choice(["AdamW", "Lion", "AdamW8bit"]),
        "mixed_precision": rng.choice(["no", "bf16"]),
        "save_precision": rng.choice(["fp16", "bf16", "float"]),
        "resolution": 512,
        **rng.choice([{"max_train_epochs": 7}, {"max_train_steps": 900}]),
        **rng.choice([{"text_encoder_lr": [3e-5, 0.0] if flux else 3e-5}, {"network_train_unet_only": True}]),
        **rng.choice([{"lr_scheduler": "constant"}, {"lr_scheduler": "cosine", "lr_warmup_steps": 20},
                      {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}]),
        **rng.choice([{"save_every_n_epochs": 2, "save_last_n_epochs": 3}, {"save_every_n_steps": 50}]),
        **maybe(enable_bucket=True, min_bucket_reso=320, max_bucket_reso=1536, bucket_reso_steps=64),
        **maybe(seed=7), **maybe(train_batch_size=3), **maybe(gradient_accumulation_steps=2), **maybe(gradient_checkpointing=True),
        **maybe(max_grad_norm=0.5), **maybe(scale_weight_norms=1.5), **maybe(training_comment="hello"), **maybe(output_name="mira"),
        **maybe(save_state=True), **maybe(shuffle_caption=True, keep_tokens=2), **maybe(caption_prefix="x, "), **maybe(flip_aug=True),
        **maybe(caption_dropout_rate=0.1), **maybe(caption_tag_dropout_rate=0.2), **maybe(token_warmup_step=100), **maybe(enable_wildcard=True),
        **maybe(fp8_base=True), **maybe(network_dropout=0.1), **maybe(sample_prompts=str(home / "prompts.txt"), sample_every_n_epochs=2),
        **maybe(validation_split=0.125, validation_seed=4, validate_every_n_epochs=2), **maybe(network_weights=str(home / "a.safetensors")),
        **maybe(reg_data_dir=str(home / "class"), prior_loss_weight=0.5), **maybe(min_timestep=100, max_timestep=900),
    }  # fmt: skip
    if flux:
        given |= {"ae": str(home / "ae"), "clip_l": str(home / "clip_l"), "t5xxl": str(home / "t5xxl")}
        given |= {
            "model_prediction_type": "raw",
            "guidance_scale": 1.0,
            "timestep_sampling": "shift",
            "discrete_flow_shift": 3.0,
        }
        return given | maybe(
            network_args=["network_reg_dims=single_blocks_3=0", f"network_reg_lrs=img_attn={lr / 2!r}"]
        )
    given |= (
        maybe(noise_offset=0.1)
        | maybe(min_snr_gamma=5.0)
        | maybe(max_token_length=150)
        | ({} if sdxl else maybe(clip_skip=2))
    )
    sides = (9, 3, 9) if sdxl else (12, 1, 12)
    ends = int(sdxl)
    arguments = [
        f"{name}_lr_weight={','.join(repr(rng.choice([1.0, 0.5, 2.0])) for _ in range(side))}"
        for name, side in zip(("down", "mid", "up"), sides, strict=True)
    ]
    dims = [rank, *rng.choices([rank, 32], k=sum(sides) + 2 * ends - 2), rank]
    alphas = ",".join(map(repr, map(float, dims)))
    return given | {"network_args": [*arguments, f"block_dims={','.join(map(str, dims))}", f"block_alphas={alphas}"]}


def test_a_config_comes_back_with_every_value(tmp_path: Path) -> None:
    """From sd-scripts to a recipe and back."""
    rng = random.Random(4)
    for number in range(25):
        given = foreign(rng, tmp_path)
        path = tmp_path / f"{number}.toml"
        path.write_text(flat_to_toml(given))
        found = import_config(path)
        assert {line.key for line in found.of("lost", "unknown", "left", "unused")} <= {"learning_rate"}
        back = dict(export_recipe(found.values).config)
        theirs, ours = {}, {}
        for words, told in ((given.pop("network_args", []), theirs), (back.pop("network_args", []), ours)):
            told |= {name: rest.split(",") for name, _, rest in (word.partition("=") for word in words)}
        assert {key: back.get(key) for key in given} == given
        if "block_dims" in theirs:
            patterns = UNETS["sdxl" if len(theirs["block_dims"]) == 23 else "sd"].patterns(False)
            ends = len(theirs["block_dims"]) == 23
            places = [place for place, pattern in enumerate(patterns) if pattern]
            for name in ("block_dims", "block_alphas"):
                rank = (
                    [repr(given["network_dim"])] * 25 if name == "block_dims" else [repr(given["network_alpha"])] * 25
                )
                assert [ours.get(name, rank)[place] for place in places] == [theirs[name][place] for place in places]
            rates = [
                [factor for name in ("down", "mid", "up") for factor in told.get(f"{name}_lr_weight", [])]
                for told in (theirs, ours)
            ]
            assert [rates[0][place - ends] for place in places] == [rates[1][place - ends] for place in places]
        else:
            assert ours == theirs
