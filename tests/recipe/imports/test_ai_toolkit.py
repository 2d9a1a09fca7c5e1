"""Jobs of ai-toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import UserError
from lorabake.recipe.prompts import Prompt, line_to_prompt

JOB = """
job: extension
config:
  name: mira
  process:
    - type: sd_trainer
      training_folder: output
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: bf16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - {folder_path: pictures, caption_ext: txt, caption_dropout_rate: 0.05, resolution: [512, 768]}
      train: {batch_size: 2, steps: 2000, train_text_encoder: false, noise_scheduler: flowmatch, optimizer: adamw8bit, lr: 1e-4, dtype: bf16}
      model: {name_or_path: model, is_flux: true, quantize: true}
      sample: {sample_every: 250, width: 512, height: 768, prompts: ["a [trigger]", "b"], seed: 7, walk_seed: true, guidance_scale: 4, sample_steps: 20}
"""


def test_a_job_for_flux(imported: Any, tmp_path: Path) -> None:
    found = imported(JOB, "job.yaml")
    assert found.trainer == "a job of ai-toolkit"
    assert found.values["adapter"] == {"name": "lora", "rank": 16}, "for transformers alpha is the rank"
    assert found.values["optimizer"] == {"lr": 1e-4, "text_encoder_lr": 0.0, "name": "adamw-8bit"}, (
        "YAML reads 1e-4 as text"
    )
    assert found.values["objective"] == {"name": "flow", "weighting": "none", "timesteps": "sigmoid"}
    assert found.values["data"] == {
        "folder": str(tmp_path / "pictures"),
        "buckets": {"resolutions": [512, 768], "upscale": False},
        "captions": {"caption_dropout": 0.05},
    }
    assert found.values["train"]["length"] == "2000 steps" and found.values["save"] == {
        "every": "250 steps",
        "keep": 4,
        "dtype": "bf16",
    }
    assert found.values["sample"]["prompts"] == [
        "a --w 512 --h 768 --d 7 --s 20 --g 4",
        "b --w 512 --h 768 --d 8 --s 20 --g 4",
    ]
    assert not found.of("lost", "unknown")


def test_a_job_for_sd_has_its_alpha_and_its_min_snr(imported: Any) -> None:
    sd = JOB.replace("is_flux: true, quantize: true", "is_xl: true").replace(
        "lr: 1e-4", "lr: 1e-4, min_snr_gamma: 5, noise_offset: 0.1, lr_scheduler: cosine"
    )
    found = imported(sd, "job.yaml")
    assert found.values["adapter"] == {"name": "lora", "rank": 16, "alpha": 8.0}
    assert found.values["objective"] == {
        "weighting": "min-snr",
        "min_snr_gamma": 5.0,
        "noise": "offset",
        "noise_offset": 0.1,
    }
    assert found.values["schedule"] == {"name": "cosine"}


def test_steps_count_passes_where_gradients_are_accumulated_the_old_way(imported: Any) -> None:
    found = imported(JOB.replace("steps: 2000", "steps: 2001, gradient_accumulation_steps: 4"), "job.yaml")
    assert found.values["train"]["length"] == "501 steps" and found.values["train"]["gradient_accumulation"] == 4
    assert found.values["save"]["every"] == "62 steps"
    true = imported(JOB.replace("steps: 2000", "steps: 2001, gradient_accumulation: 4"), "job.yaml")
    assert true.values["train"]["length"] == "2001 steps" and true.values["train"]["gradient_accumulation"] == 4


def test_the_trigger_is_put_where_captions_lack_it(imported: Any, tmp_path: Path) -> None:
    job = JOB.replace("network:", "trigger_word: zorbi\n      network:")
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "1.txt").write_text("a cat")
    assert imported(job, "job.yaml").values["data"]["captions"]["prefix"] == "zorbi,"
    (folder / "2.txt").write_text("zorbi, a cat")
    assert [line.key for line in imported(job, "job.yaml").of("lost")] == ["trigger_word"]
    (folder / "1.txt").write_text("Zorbi in the rain")
    whole = imported(job, "job.yaml")
    assert (
        not whole.of("lost")
        and "prefix" not in whole.values["data"]["captions"]
        and whole.values["output"]["trigger"] == "zorbi"
    )
    (folder / "1.txt").write_text("[trigger] in the rain")
    assert [line.key for line in imported(job, "job.yaml").of("lost")] == ["datasets.folder_path"]


def test_keys_that_it_does_not_know_are_guessed(imported: Any) -> None:
    found = imported(
        JOB.replace("batch_size: 2", "batchsize: 2").replace("quantize: true", "quantise: true"), "job.yaml"
    )
    assert {(line.key, "Did you mean" in line.note) for line in found.of("unknown")} == {
        ("train.batchsize", True),
        ("model.quantise", True),
    }


def test_what_is_no_training_of_a_lora_is_refused(imported: Any) -> None:
    with pytest.raises(UserError, match="'slider'"):
        imported(JOB.replace("type: sd_trainer", "type: slider"), "job.yaml")
    with pytest.raises(UserError, match=r"no config\.process"):
        imported("job: extension\nconfig: {name: x}\n", "job.yaml")


def test_families_that_are_not_here_and_losses_are_loud(imported: Any) -> None:
    found = imported(
        JOB.replace("is_flux: true", "arch: qwen_image").replace(
            "lr: 1e-4", "lr: 1e-4, loss_type: wavelet, timestep_type: weighted"
        ),
        "job.yaml",
    )
    assert {line.key for line in found.of("lost")} == {"model.arch", "train.loss_type", "train.timestep_type"}


def test_several_folders_with_their_repeats_and_regularisation(imported: Any, tmp_path: Path) -> None:
    more = "\n        - {folder_path: more, num_repeats: 3, resolution: [512, 768], caption_dropout_rate: 0.05, caption_ext: txt}\n        - {folder_path: class, is_reg: true}"  # noqa: E501
    found = imported(JOB.replace("resolution: [512, 768]}", "resolution: [512, 768]}" + more), "job.yaml")
    assert found.values["data"]["folder"] == [str(tmp_path / "pictures"), str(tmp_path / "more")]
    assert found.values["data"]["repeats"] == [1, 3] and found.values["data"]["regularisation"] == [
        str(tmp_path / "class")
    ]
    assert not found.of("lost")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("quantize: true", "fp8"),
        ("quantize: true, qtype: qint8", "int8"),
        ("quantize: true, qtype: uint8", "int8"),
        ("quantize: true, qtype: uint4", "nf4"),
        ("quantize: true, qtype: uint3", None),
        ("quantize: true, qtype: 'uint4|ostris/recovery/a.safetensors'", "nf4"),
        ("quantize: false, qtype: qint8", None),
    ],
)
def test_types_of_weights(imported: Any, given: str, expected: str | None) -> None:
    found = imported(JOB.replace("quantize: true", given), "job.yaml")
    assert found.values["model"].get("quantize") == expected
    told = {"model.qtype"} if "uint3" in given else {"model.accuracy_recovery_adapter"} if "|" in given else set()
    assert {line.key for line in found.of("left")} == told


def prompts(imported: Any, prompt: str, more: str, base: str = "is_flux: true") -> Any:
    """A job with one sample prompt and more settings of samples."""
    head, _, _ = JOB.partition("      sample:")
    sample = f"      sample: {{prompts: [{prompt!r}], {more}}}\n"
    return imported(head.replace("is_flux: true", base) + sample, "job.yaml")


@pytest.mark.parametrize(
    ("prompt", "more", "base", "expected", "left"),
    [
        ("a photo --ar 3:4", "width: 512", "is_flux: true", Prompt("a photo", width=512), {"--ar"}),
        ("a photo", "seed: -1, walk_seed: true", "is_flux: true", Prompt("a photo"), {"seed"}),
        ("a photo", "guidance_scale: 0.5", "is_xl: true", Prompt("a photo", cfg=1.0), set[str]()),
        (
            "a photo --w 768 --l 3",
            "width: 512",
            "is_flux: true",
            Prompt("a photo", width=768, guidance=3.0),
            set[str](),
        ),
        (
            "a photo",
            "width: 520, neg: 'b --x'",
            "is_xl: true",
            Prompt("a photo", width=512, negative="b -- x"),
            {"width"},
        ),
        ("a photo", "guidance_scale: 4", "arch: sd3", Prompt("a photo", cfg=4.0), set[str]()),
    ],
)
def test_sample_prompts_are_lines_that_a_recipe_reads(
    imported: Any, prompt: str, more: str, base: str, expected: Prompt, left: set[str]
) -> None:
    found = prompts(imported, prompt, more, base)
    assert [line_to_prompt(line) for line in found.values["sample"]["prompts"]] == [expected]
    assert {line.key.partition(": ")[2] for line in found.of("left") if line.key.startswith("sample.")} == left


def test_arguments_of_the_optimizer_are_text_in_yaml(imported: Any) -> None:
    given = "lr: 1e-4, optimizer_params: {weight_decay: 1e-4, betas: [0.9, 0.98]}"
    found = imported(JOB.replace("lr: 1e-4", given), "job.yaml")
    assert found.values["optimizer"]["weight_decay"] == 1e-4 and found.values["optimizer"]["betas"] == [0.9, 0.98]
    assert not found.of("lost")


def test_folders_without_repeats_are_left_out(imported: Any, tmp_path: Path) -> None:
    more = "\n        - {folder_path: more, num_repeats: 0}"
    found = imported(JOB.replace("resolution: [512, 768]}", "resolution: [512, 768]}" + more), "job.yaml")
    assert found.values["data"]["folder"] == str(tmp_path / "pictures") and not found.of("lost")
    assert [line.note.partition(":")[0] for line in found.of("unused") if line.key == "datasets"] == ["more"]
