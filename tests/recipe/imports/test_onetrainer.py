"""Configs and presets of OneTrainer, of today and of its first version."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import UserError
from lorabake.recipe.prompts import line_to_prompt

LEAST: dict[str, Any] = {
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "models/base.safetensors",
    "output_model_destination": "models/mira.safetensors",
    "layer_filter_preset": "attn-mlp",
    "concepts": [{"path": "pictures", "image": {"enable_random_flip": False, "enable_crop_jitter": False}, "text": {}}],
}


def test_their_defaults_are_stated(imported: Any, tmp_path: Path) -> None:
    found = imported(LEAST)
    assert found.trainer == "a config of OneTrainer"
    assert found.values["model"]["base"] == str(tmp_path / "models" / "base.safetensors")
    assert found.values["adapter"] == {"name": "lora", "rank": 16, "alpha": 1.0}
    assert found.values["optimizer"] == {"lr": 3e-6, "text_encoder_lr": 3e-6, "name": "adamw"}
    assert found.values["schedule"] == {"name": "constant", "warmup": "200 steps"}
    assert found.values["train"]["length"] == "100 epochs" and found.values["save"] == {
        "every": "100 epochs",
        "dtype": "fp32",
    }
    assert found.values["objective"]["weighting"] == "none" and found.values["output"]["name"] == "mira"


def test_an_old_preset_means_the_same(imported: Any) -> None:
    tables = {
        "unet": {"train": True, "learning_rate": 3e-4},
        "text_encoder": {"train": False},
        "text_encoder_2": {"train": True, "learning_rate": 1e-5, "stop_training_after": 0},
        "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.1},
        "loss_weight_fn": "MIN_SNR_GAMMA",
        "loss_weight_strength": 7,
        "save_every": 2,
        "save_every_unit": "EPOCH",
    }
    flat = {
        "train_unet": True,
        "unet_learning_rate": 3e-4,
        "train_text_encoder": False,
        "train_text_encoder_2": True,
        "text_encoder_2_learning_rate": 1e-5,
        "train_text_encoder_2_epochs": 0,
        "optimizer": "ADAMW",
        "optimizer_weight_decay": 0.1,
        "min_snr_gamma": 7,
        "save_after": 2,
        "save_after_unit": "EPOCH",
    }
    assert imported({**LEAST, **tables}).values == imported({**LEAST, **flat}).values
    assert imported({**LEAST, **tables}).values["optimizer"]["text_encoder_lr"] == [0.0, 1e-5]


def test_units(imported: Any) -> None:
    found = imported(
        {
            **LEAST,
            "gradient_accumulation_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-4,
            "learning_rate_scaler": "BOTH",
            "learning_rate_warmup_steps": 100,
            "text_encoder_layer_skip": 0,
            "min_noising_strength": 0.1,
            "max_noising_strength": 0.9,
            "save_every": 40,
            "save_every_unit": "STEP",
        }
    )
    assert found.values["optimizer"]["lr"] == pytest.approx(1e-4 * math.sqrt(8))
    assert found.values["schedule"]["warmup"] == "25 steps" and found.values["save"]["every"] == "10 steps"
    assert (found.values["objective"]["min_timestep"], found.values["objective"]["max_timestep"]) == (100, 900)
    skip = imported({**LEAST, "model_type": "STABLE_DIFFUSION_15", "text_encoder_layer_skip": 1})
    assert skip.values["model"]["clip_skip"] == 2


def test_timesteps_of_flux(imported: Any) -> None:
    flux = {
        **LEAST,
        "model_type": "FLUX_DEV_1",
        "timestep_distribution": "LOGIT_NORMAL",
        "text_encoder": {"train": False},
        "text_encoder_2": {"train": False},
    }
    shifted = imported({**flux, "timestep_shift": 3.0, "noising_bias": 0.5}).values["objective"]
    assert (shifted["timesteps"], shifted["logit_mean"]) == ("logit-normal", pytest.approx(0.5 + math.log(3)))
    assert imported({**flux, "dynamic_timestep_shifting": True}).values["objective"]["timesteps"] == "flux-shift"
    assert {line.key for line in imported({**flux, "timestep_distribution": "HEAVY_TAIL"}).of("lost")} >= {
        "timestep_distribution"
    }


def test_concepts_in_a_file_of_their_own(imported: Any, tmp_path: Path) -> None:
    concepts = [
        {
            "path": "a",
            "balancing": 3.0,
            "image": {"enable_random_flip": True, "enable_crop_jitter": False},
            "text": {"enable_tag_shuffling": True, "keep_tags_count": 2},
        },
        {
            "path": "b",
            "balancing": 1,
            "image": {"enable_random_flip": True, "enable_crop_jitter": False},
            "text": {"enable_tag_shuffling": True, "keep_tags_count": 2},
        },
        {"path": "off", "enabled": False},
        {"path": "held", "validation_concept": True},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    config = {key: value for key, value in LEAST.items() if key != "concepts"}
    found = imported({**config, "concept_file_name": "concepts.json", "resolution": "768"})
    data = found.values["data"]
    assert (
        data["folder"] == [str(tmp_path / "a"), str(tmp_path / "b")]
        and data["repeats"] == [3, 1]
        and data["flip"] is True
    )
    assert data["captions"] == {"shuffle": True, "keep_tokens": 2, "wildcards": True}
    assert found.values["validation"]["folder"] == str(tmp_path / "held")
    assert any(
        "concept_file_name" in warning for warning in imported({**config, "concept_file_name": "gone.json"}).warnings
    )


def test_masks_keep_their_defaults(imported: Any) -> None:
    assert imported({**LEAST, "masked_training": True}).values["data"]["masks"] == {
        "source": "files",
        "unmasked_probability": 0.1,
        "unmasked_weight": 0.1,
        "normalise": "none",
    }
    assert "masks" not in imported({**LEAST, "masked_training": False, "unmasked_weight": 0.1}).values["data"]


def test_what_is_not_here_is_loud(imported: Any) -> None:
    found = imported(
        {
            **LEAST,
            "peft_type": "OFT_2",
            "layer_filter_preset": "attn-only",
            "mae_strength": 0.5,
            "perturbation_noise_weight": 0.1,
            "learning_rate_scheduler": "COSINE_WITH_RESTARTS",
            "text_encoder": {"train": True, "stop_training_after": 5, "stop_training_after_unit": "EPOCH"},
            "epochs": 20,
            "lora_rnak": 3,
        }
    )
    told = {line.key for line in found.of("lost")}
    assert told >= {
        "peft_type",
        "layer_filter_preset",
        "mse_strength, mae_strength",
        "perturbation_noise_weight",
        "learning_rate_scheduler",
        "text_encoder: stop_training_after",
    }
    assert [line.key for line in found.of("unknown")] == ["lora_rnak"] and "Did you mean 'lora_rank'?" in found.of(
        "unknown"
    )[0].note


def test_an_embedding_is_no_recipe(imported: Any) -> None:
    with pytest.raises(UserError, match="embedding"):
        imported({**LEAST, "training_method": "EMBEDDING"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"unet": {"weight_dtype": "INT_8"}}, "int8"),
        ({"unet": {"weight_dtype": "INT_W8A8"}}, "int8"),
        ({"unet": {"weight_dtype": "FLOAT_8"}}, "fp8"),
        ({"unet": {"weight_dtype": "FLOAT_W8A8_SVD"}}, "fp8"),
        ({"unet": {"weight_dtype": "NFLOAT_4"}}, "nf4"),
        ({"unet_weight_dtype": "NFLOAT_4"}, "nf4"),
        ({"weight_dtype": "FLOAT_8", "unet": {"weight_dtype": "NONE"}}, "fp8"),
        ({"weight_dtype": "FLOAT_8", "unet": {"weight_dtype": "BFLOAT_16"}}, None),
        ({"unet": {"weight_dtype": "BFLOAT_16"}, "prior": {"weight_dtype": "FLOAT_8"}}, None),
        (
            {
                "model_type": "FLUX_DEV_1",
                "unet": {"weight_dtype": "FLOAT_32"},
                "transformer": {"weight_dtype": "NFLOAT_4"},
            },
            "nf4",
        ),
        ({"model_type": "FLUX_DEV_1", "prior": {"weight_dtype": "INT_8"}}, "int8"),
        ({"model_type": "STABLE_DIFFUSION_35", "transformer": {"weight_dtype": "FLOAT_8"}}, "fp8"),
        ({"unet": {"weight_dtype": "GGUF"}}, None),
    ],
)
def test_types_of_weights(imported: Any, given: dict[str, Any], expected: str | None) -> None:
    found = imported({**LEAST, **given})
    assert found.values["model"].get("quantize") == expected
    assert [line.key for line in found.of("left")] == (["unet: weight_dtype"] if "GGUF" in str(given) else [])


def test_text_encoders_are_stored_with_the_denoiser_or_whole(imported: Any) -> None:
    flux = {**LEAST, "model_type": "FLUX_DEV_1", "text_encoder": {"weight_dtype": "INT_8"}}
    t5 = {"text_encoder_2": {"weight_dtype": "FLOAT_8"}}
    alone = imported({**flux, **t5})
    assert "quantize" not in alone.values["model"]
    assert {line.key for line in alone.of("left")} == {"text_encoder: weight_dtype", "text_encoder_2: weight_dtype"}
    both = imported({**flux, **t5, "transformer": {"weight_dtype": "NFLOAT_4"}})
    assert both.values["model"]["quantize"] == "nf4"
    assert [line.key for line in both.of("left")] == ["text_encoder: weight_dtype"]


def test_the_table_of_the_model_that_is_trained_counts(imported: Any) -> None:
    """Whole configs have tables for every kind of model."""
    tables = {"unet": {"learning_rate": 1e-5}, "transformer": {"learning_rate": 2e-4}, "prior": {"learning_rate": 1e-3}}
    assert imported({**LEAST, **tables}).values["optimizer"]["lr"] == 1e-5
    assert imported({**LEAST, **tables, "model_type": "FLUX_DEV_1"}).values["optimizer"]["lr"] == 2e-4


def test_a_concept_file_without_a_list_is_told(imported: Any, tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps({"concepts": [{"path": "pictures"}]}))
    config = {key: value for key, value in LEAST.items() if key != "concepts"}
    found = imported({**config, "concept_file_name": "concepts.json"})
    assert any("concepts.json: it holds no list" in warning for warning in found.warnings)


# ---- samples

SAMPLE = {"prompt": "mira, beach", "negative_prompt": "blurry", "width": 1000, "height": 768, "seed": 7, "diffusion_steps": 30,
          "cfg_scale": 6.5, "noise_scheduler": "EULER", "random_seed": False, "enabled": True}  # fmt: skip
EPOCHS = {"sample_after": 2, "sample_after_unit": "EPOCH"}
FILE = {"sample_definition_file_name": "training_samples/samples.json"}


@pytest.mark.parametrize("place", ["", "above"])
def test_sample_prompts_are_read_from_their_file(
    imported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the current folder, or where OneTrainer keeps it: in a folder beside the one that the config is in."""
    home = tmp_path / place / "training_samples"
    home.mkdir(parents=True)
    off = {**SAMPLE, "enabled": False}
    (home / "samples.json").write_text(json.dumps([SAMPLE, off, {"prompt": "すず --h"}]), encoding="utf-8")
    if place:
        from lorabake.recipe.imports import import_config

        config = tmp_path / place / "training_presets" / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps(LEAST | FILE | EPOCHS), encoding="utf-8")
        found = import_config(config)
    else:
        found = imported(LEAST | FILE | EPOCHS)
    first, second = found.values["sample"]["prompts"]
    assert first == "mira, beach --n blurry --w 992 --h 768 --d 7 --s 30 --l 6.5 --ss euler"
    prompt = line_to_prompt(second)
    assert (prompt.text, prompt.width, prompt.seed, prompt.steps, prompt.cfg, prompt.sampler) == (
        "すず -- h", 512, 42, 20, 7.0, "ddim"
    )  # fmt: skip
    assert found.values["sample"]["every"] == "2 epochs"
    (line,) = [line for line in found.of("converted") if line.setting == "sample.prompts"]
    assert line.key == "sample_definition_file_name"
    assert [line.key for line in found.of("left")] == ["sample_definition_file_name: width"], (
        "rounded to what SDXL can draw"
    )


@pytest.mark.parametrize(
    ("model_type", "line"),
    [
        ("FLUX_DEV_1", "mira, beach --n blurry --w 992 --h 768 --d 7 --s 30 --g 6.5"),
        ("STABLE_DIFFUSION_35", "mira, beach --n blurry --w 992 --h 768 --d 7 --s 30 --l 6.5"),
        ("STABLE_DIFFUSION_15", "mira, beach --n blurry --w 960 --h 768 --d 7 --s 30 --l 6.5 --ss euler"),
    ],
)
def test_samples_in_the_config_go_before_the_file_and_are_the_familys(
    imported: Any, model_type: str, line: str
) -> None:
    found = imported(LEAST | FILE | EPOCHS | {"model_type": model_type, "samples": [SAMPLE]})
    assert found.values["sample"]["prompts"] == [line]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            None,
            "training_samples/samples.json is not found, from the current folder or beside the config. Give sample.prompts.",
        ),
        ("[{", "is not valid JSON"),
        ("{}", "holds no list of samples. Give sample.prompts."),
    ],
)
def test_samples_that_are_not_there_are_told(imported: Any, tmp_path: Path, text: str | None, why: str) -> None:
    if text is not None:
        (tmp_path / "training_samples").mkdir()
        (tmp_path / "training_samples" / "samples.json").write_text(text)
    found = imported(LEAST | FILE | EPOCHS)
    (line,) = [line for line in found.of("left") if line.key == "sample_definition_file_name"]
    assert why in line.note and "sample" not in found.values


def test_when_and_what_of_samples_cannot_be_said(imported: Any) -> None:
    given = {"samples": [{**SAMPLE, "random_seed": True, "noise_scheduler": "UNIPC"}], "sample_after": 10}
    found = imported(LEAST | given | {"sample_after_unit": "MINUTE"})
    assert "--d" not in found.values["sample"]["prompts"][0] and "every" not in found.values["sample"]
    told = {line.key: line.note for line in found.of("left")}
    assert told.keys() >= {"samples: random_seed", "samples: sample_sampler", "sample_after"}
    found = imported(LEAST | given | {"sample_after_unit": "NEVER"})
    assert "sample" not in found.values and [line.key for line in found.of("unused")] == ["samples"]
    found = imported(LEAST | EPOCHS | {"samples": [{**SAMPLE, "enabled": False}, {"prompt": " "}]})
    assert "sample" not in found.values and [line.key for line in found.of("unused")] == ["samples"]
    found = imported(
        LEAST | {"samples": [SAMPLE], "sample_after": 50, "sample_after_unit": "STEP", "gradient_accumulation_steps": 4}
    )
    assert found.values["sample"]["every"] == "12 steps"
