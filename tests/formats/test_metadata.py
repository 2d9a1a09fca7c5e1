import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabake.formats.hashes import model_hash, with_hashes
from lorabake.formats.metadata import TrainingFacts, base_name, training_metadata

BUCKETS = {"buckets": {"0": {"resolution": [512, 512], "count": 200}}, "mean_img_ar_error": 0.0}


def facts(**changes: Any) -> TrainingFacts:
    plain = TrainingFacts(
        output_name="mira",
        trigger_words=("mira", "red scarf"),
        lorabake_version="0.1.0",
        base_model_version="sd_v1",
        architecture="stable-diffusion-v1",
        sd_model_name="sd15.safetensors",
        sd_model_hash="cc6cb27103",
        network_module="networks.lora",
        network_dim=16,
        network_alpha=8.0,
        num_train_images=200,
        num_batches_per_epoch=100,
        dataset_dirs={"10_mira": {"n_repeats": 10, "img_count": 20}},
        tag_frequency={"10_mira": {"mira": 20, "fate/stay night": 3}},
        resolution=(512, 768),
        enable_bucket=True,
        bucket_info=BUCKETS,
        num_epochs=8,
        epoch=8,
        steps=800,
        max_train_steps=800,
        batch_size_per_device=2,
        total_batch_size=2,
        learning_rate=1e-4,
        unet_lr=1e-4,
        optimizer="torch.optim.adamw.AdamW(weight_decay=0.01)",
        lr_scheduler="cosine",
        seed=42,
    )
    return dataclasses.replace(plain, **changes)


def test_values_as_other_tools_write_them() -> None:
    metadata = training_metadata(facts(clip_skip=2))
    expected = {
        "ss_output_name": "mira",
        "ss_training_comment": "trigger words: mira, red scarf",
        "ss_network_dim": "16",
        "ss_network_alpha": "8.0",
        "ss_network_dropout": "None",
        "ss_v2": "False",
        "ss_resolution": "(512, 768)",
        "ss_learning_rate": "0.0001",
        "ss_text_encoder_lr": "None",
        "ss_enable_bucket": "True",
        "ss_min_snr_gamma": "None",
        "ss_dataset_dirs": '{"10_mira": {"img_count": 20, "n_repeats": 10}}',
        "ss_reg_dataset_dirs": "{}",
        "ss_sd_model_hash": "cc6cb27103",
        "ss_clip_skip": "2",
        "ss_steps": "800",
        "lorabake_version": "0.1.0",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "mira",
        "modelspec.resolution": "512x768",
        "modelspec.prediction_type": "epsilon",
        "modelspec.encoder_layer": "2",
        "modelspec.trigger_phrase": "mira, red scarf",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_mira": {"mira": 20, "fate/stay night": 3}}
    assert json.loads(metadata["ss_bucket_info"]) == BUCKETS


def test_what_is_left_out_and_what_is_none() -> None:
    metadata = training_metadata(facts(sd_model_hash=None, bucket_info=None, trigger_words=()))
    absent = {"ss_sd_model_hash", "ss_vae_name", "ss_network_args", "modelspec.trigger_phrase", "modelspec.date"}
    assert not absent & metadata.keys()
    assert metadata["ss_bucket_info"] == "null"
    assert metadata["ss_training_comment"] == "None"
    assert training_metadata(facts(network_args={"conv_dim": 8}))["ss_network_args"] == '{"conv_dim": 8}'


def test_every_fact_is_written() -> None:
    """A field that is forgotten in the middle would be noticed by nobody."""
    apart = {
        "trigger_words": "modelspec.trigger_phrase",
        "lorabake_version": "lorabake_version",
        "start_from": "lorabake_start_from",
        "architecture": "modelspec.architecture",
        "prediction_type": "modelspec.prediction_type",
        "implementation": "modelspec.implementation",
        "timestep_range": "modelspec.timestep_range",
    }
    names = {item.name for item in dataclasses.fields(TrainingFacts)}
    of_flow: dict[str, Any] = {"timestep_sampling": "shift", "model_prediction_type": "raw"} | dict.fromkeys(
        ("sigmoid_scale", "discrete_flow_shift", "logit_mean", "logit_std", "t5xxl_max_token_length"),
        1.0,
    )
    given_all = facts(
        new_sd_model_hash="a",
        vae_name="v",
        vae_hash="b",
        new_vae_hash="c",
        network_args={"a": 1},
        weighting_scheme="p2",
        p2_gamma=1.0,
        p2_k=1.0,
        lr_scheduler_args={"d": 0.5},
        ema_decay=0.99,
        start_from="a.safetensors 0",
        timestep_range="250,960",
        **of_flow,
    )
    assert not {f"ss_{name}" for name in of_flow} & training_metadata(facts()).keys()
    assert {apart.get(name, f"ss_{name}") for name in names} <= training_metadata(given_all).keys()


def test_nothing_tells_two_equal_runs_apart() -> None:
    keys = training_metadata(facts()).keys()
    changing = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_sd_scripts_commit_hash"}
    assert not (changing | {"modelspec.date"}) & keys
    other_order = facts(tag_frequency={"10_mira": {"fate/stay night": 3, "mira": 20}})
    assert training_metadata(other_order) == training_metadata(facts())


def test_timesteps_and_comment() -> None:
    metadata = training_metadata(facts(timestep_range="0,500", training_comment="first try"))
    assert metadata["modelspec.timestep_range"] == "0,500"
    assert metadata["ss_training_comment"] == "first try; trigger words: mira, red scarf"
    assert "modelspec.timestep_range" not in training_metadata(facts())


def test_hashes_come_last() -> None:
    tensors = {"lora_unet_x.alpha": torch.tensor(1.0)}
    metadata = with_hashes(training_metadata(facts()), tensors)
    assert list(metadata)[-2:] == ["sshs_model_hash", "sshs_legacy_hash"]
    assert metadata["sshs_model_hash"] == model_hash(tensors)
    assert all(isinstance(value, str) for value in metadata.values())


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b/c.x", "c.x"), ("C:\\m\\c.x", "c.x"), ("c.x", "c.x"), ("/d/10_mira/", "10_mira"), ("\\\\host\\s\\c", "c")],
)
def test_base_name(path: str, name: str) -> None:
    assert base_name(path) == name


HOMES = [
    "/home/ann/",
    "/Users/ann/Library/",
    "C:\\Users\\ann smith\\",
    "d:/Users/ann/",
    "\\\\nas\\ann\\",
    "~/ann/",
    "/srv/ann/",
    "file:///home/ann/",
    "/scratch/ann/x/",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="nN\n"), max_size=12)


@given(home=st.sampled_from(HOMES), before=st.tuples(TEXT, st.sampled_from(" \"'=(,;:")).map("".join), after=TEXT)
def test_no_folder_of_the_maker_is_published(home: str, before: str, after: str) -> None:
    path = f"{home}model.safetensors"
    prose = f"{before}{path} {after}"
    metadata = training_metadata(
        facts(
            output_name=path,
            training_comment=prose,
            sd_model_name=path,
            vae_name=path,
            network_args={"weights": path, "deep": [{"dir": path}]},
            optimizer=f"x.Y(state='{path}')",
            dataset_dirs={f"{home}10_mira": {"n_repeats": 10, "img_count": 20}},
            tag_frequency={f"{home}10_mira": {"mira": 20}},
            bucket_info={"from": path},
        )
    )
    assert not [value for value in metadata.values() if "ann" in value]
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_mira": {"mira": 20}}
    assert metadata["ss_sd_model_name"] == "model.safetensors"


@pytest.mark.parametrize(
    "text",
    [
        "fate/stay night, 1girl, \\m/, :/, >:/, w/o hat",
        "https://example.com/home/data/page",
        "ratio 3:4, and/or, c: yes",
        "/v/",
        "data:image/jpeg;base64,/9j/4AAQSkZJRg/home/x/",
    ],
)
def test_texts_that_are_no_paths_are_kept(text: str) -> None:
    assert training_metadata(facts(trigger_words=(), training_comment=text))["ss_training_comment"] == text


def test_folders_of_the_same_name_are_both_counted() -> None:
    dirs = {"a/10_mira": {"n_repeats": 10, "img_count": 1}, "b/10_mira": {"n_repeats": 10, "img_count": 2}}
    written = json.loads(training_metadata(facts(dataset_dirs=dirs))["ss_dataset_dirs"])
    assert {name: entry["img_count"] for name, entry in written.items()} == {"10_mira": 1, "10_mira (2)": 2}


def test_names_that_are_not_unicode_can_be_written() -> None:
    written = training_metadata(facts(tag_frequency={"10_\udce9": {"a": 1}}))["ss_tag_frequency"]
    assert json.loads(written) == {"10_?": {"a": 1}}
