"""Configs that the kohya_ss GUI saves: numbers as text, zeros for nothing, per cent, and a line of further options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems
from lorabake.recipe.imports.kohya_gui import parameters

LEAST = {
    "LoRA_type": "Standard",
    "LyCORIS_preset": "full",
    "additional_parameters": "",
    "max_resolution": "512,512",
    "pretrained_model_name_or_path": "base.safetensors",
    "train_data_dir": "pictures",
    "epoch": 10,
    "lr_warmup": 0,
    "lr_scheduler": "constant",
    "unet_lr": 0.0001,
    "text_encoder_lr": 5e-5,
    "network_dim": 32,
    "network_alpha": 16,
    "optimizer": "AdamW",
}


def test_text_for_numbers_and_zeros_for_nothing(imported: Any, tmp_path: Path) -> None:
    found = imported(
        {
            **LEAST,
            "seed": "1234",
            "clip_skip": "2",
            "min_snr_gamma": 0,
            "noise_offset": 0,
            "noise_offset_type": "Original",
            "max_train_steps": "",
            "max_train_epochs": "",
            "save_every_n_epochs": 2,
            "scale_weight_norms": 0,
            "keep_tokens": "3",
            "vae": "",
            "network_weights": None,
            "min_timestep": 0,
            "max_timestep": 1000,
            "lr_scheduler_num_cycles": "",
            "caption_dropout_rate": 0.05,
        }
    )
    assert found.trainer == "a config of the kohya_ss GUI"
    assert found.values["train"] == {"length": "10 epochs", "seed": 1234, "max_grad_norm": 1.0, "precision": "fp16"}
    assert found.values["model"] == {"base": str(tmp_path / "base.safetensors"), "clip_skip": 2}
    assert found.values["adapter"] == {"name": "lora", "rank": 32, "alpha": 16.0}
    assert found.values["objective"]["weighting"] == "none" and "noise" not in found.values["objective"]
    assert found.values["data"]["captions"] == {"keep_tokens": 3, "caption_dropout": 0.05}
    assert not found.of("lost", "unknown")


def test_warm_up_is_in_per_cent(imported: Any) -> None:
    assert imported({**LEAST, "lr_warmup": 10, "lr_scheduler": "cosine"}).values["schedule"] == {
        "name": "cosine",
        "warmup": 0.1,
    }
    steps = imported({**LEAST, "lr_warmup": "5", "lr_scheduler": "cosine", "max_train_steps": 2000})
    assert steps.values["schedule"] == {"name": "cosine", "warmup": "100 steps"}
    (line,) = [line for line in steps.lines if line.setting == "schedule.warmup"]
    assert line.key == "lr_warmup" and line.given == "5" and "0.05 of 2000" in line.note


def test_cycles_are_as_many_as_epochs_unless_they_are_given(imported: Any) -> None:
    restarts = {**LEAST, "lr_scheduler": "cosine_with_restarts"}
    assert imported({**restarts, "lr_scheduler_num_cycles": ""}).values["schedule"]["cycles"] == 10
    assert imported({**restarts, "lr_scheduler_num_cycles": "3"}).values["schedule"]["cycles"] == 3


@pytest.mark.parametrize(
    ("unet", "text", "expected"),
    [(1e-4, 0, (1e-4, 0.0)), (0, 1e-5, (0.0, 1e-5)), (0, 0, (3e-4, 3e-4)), (1e-4, 5e-5, (1e-4, 5e-5))],
)
def test_a_rate_of_zero_leaves_a_part_out_if_the_other_has_one(
    imported: Any, unet: float, text: float, expected: tuple[float, float]
) -> None:
    found = imported({**LEAST, "learning_rate": "0.0003", "unet_lr": unet, "text_encoder_lr": text})
    assert (found.values["optimizer"]["lr"], found.values["optimizer"]["text_encoder_lr"]) == expected


def test_noise_is_of_the_type_that_is_chosen(imported: Any) -> None:
    both = {**LEAST, "noise_offset": 0.05, "multires_noise_iterations": 6, "multires_noise_discount": 0.2}
    assert imported({**both, "noise_offset_type": "Multires"}).values["objective"]["noise"] == "pyramid"
    assert imported({**both, "noise_offset_type": "Original"}).values["objective"]["noise"] == "offset"


def test_kinds_of_lora(imported: Any) -> None:
    convolutions = {"conv_dim": 8, "conv_alpha": 4}
    assert "conv_rank" not in imported({**LEAST, **convolutions}).values["adapter"], "Standard does not look at them"
    assert imported({**LEAST, **convolutions, "LoRA_type": "Kohya LoCon"}).values["adapter"]["conv_rank"] == 8
    assert imported({**LEAST, **convolutions, "LoRA_type": "LyCORIS/LoCon"}).values["adapter"]["conv_alpha"] == 4.0
    assert imported({**LEAST, "LoRA_type": "LyCORIS/Diag-OFT"}).values["adapter"]["name"] == "oft"
    assert imported({**LEAST, "LoRA_type": "LoRA-FA"}).values["adapter"]["name"] == "lora-fa"
    lost = imported({**LEAST, "LoRA_type": "Flux1 OFT"}).of("lost")
    assert lost[0].key == "LoRA_type" and "choose among" in lost[0].note


def test_additional_parameters_come_first(imported: Any) -> None:
    line = '--max_grad_norm=0 --optimizer_args "weight_decay=0.1" "betas=0.9,0.99" --network_train_unet_only --min_snr_gama 5'
    found = imported({**LEAST, "max_grad_norm": 1, "additional_parameters": line})
    assert found.values["train"]["max_grad_norm"] == 0.0 and found.values["optimizer"]["text_encoder_lr"] == 0.0
    assert found.values["optimizer"]["weight_decay"] == 0.1 and found.values["optimizer"]["betas"] == [0.9, 0.99]
    assert [unknown.key for unknown in found.of("unknown")] == ["min_snr_gama"]


def test_a_line_of_options() -> None:
    assert parameters('--a --b=1 --c x "y z" --d C:\\models') == {
        "a": True,
        "b": "1",
        "c": ["x", "y z"],
        "d": "C:\\models",
    }
    for wrong in ('--a "b', "b --a"):
        with pytest.raises(ValueError):
            parameters(wrong)


def test_a_line_that_cannot_be_read(imported: Any) -> None:
    with pytest.raises(Problems, match="additional_parameters"):
        imported({**LEAST, "additional_parameters": '--a "b'})


def test_flux_and_the_fields_of_what_is_not_chosen(imported: Any) -> None:
    flux = {
        **LEAST,
        "ae": "ae.safetensors",
        "clip_l": "l.safetensors",
        "t5xxl": "t5.safetensors",
        "timestep_sampling": "sigmoid",
        "discrete_flow_shift": 3,
        "guidance_scale": 1,
        "model_prediction_type": "raw",
        "text_encoder_lr": 0,
        "max_token_length": 75,
        "t5xxl_max_token_length": 512,
    }
    assert imported(flux).values["model"].keys() == {"base"}, "the window has fields for Flux, and Flux is not chosen"
    found = imported({**flux, "flux1_checkbox": True, "LoRA_type": "Flux1"})
    assert (
        found.values["objective"] == {"name": "flow", "weighting": "none", "timesteps": "sigmoid"}
        and found.values["model"]["t5_tokens"] == 512
    )
    assert not found.of("lost")


def test_windows_paths_stay_and_are_told(imported: Any) -> None:
    found = imported({**LEAST, "pretrained_model_name_or_path": "D:\\models\\x.safetensors"})
    assert found.values["model"]["base"] == "D:\\models\\x.safetensors" and any(
        "path of Windows" in warning for warning in found.warnings
    )
    assert '"D:\\\\models\\\\x.safetensors"' in found.toml()


def test_lists_by_block(imported: Any) -> None:
    """A field that holds "0" is one that was filled in; a number 0 is an empty one."""
    lists = {"mid_lr_weight": "0", "block_lr_zero_threshold": 0, "block_dims": "", "up_lr_weight": "linear"}
    found = imported({**LEAST, **lists})
    assert found.values["adapter"]["block_rank"] == {r"mid_block\.attentions\.0\.": 0}
    assert found.values["optimizer"]["block_lr"][r"up_blocks\.1\.attentions\.0\."] == 3 / 11
    flux = {"ae": "a", "clip_l": "l", "t5xxl": "t", "LoRA_type": "Flux1", "flux1_checkbox": True, "text_encoder_lr": 0}
    choice = {"train_blocks": "all", "train_double_block_indices": "none", "train_single_block_indices": "all"}
    found = imported({**LEAST, **flux, **choice, "img_attn_dim": 0, "single_dim": "8"})
    assert found.values["adapter"]["block_rank"] == {"double_blocks_": 0, r"single_blocks_\d+_linear": 8}


def test_sdxl_is_told_by_its_box(imported: Any) -> None:
    found = imported({**LEAST, "clip_skip": 2, "sdxl": True})
    assert "clip_skip" in {line.key for line in found.of("unused")} and not found.of("unknown")
    sd = imported({**LEAST, "clip_skip": 2, "sdxl": False, "no_half_vae": True})
    assert sd.values["model"]["clip_skip"] == 2
