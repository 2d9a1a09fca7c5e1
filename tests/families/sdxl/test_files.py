"""SDXL on disk: what is recognised, single files, parts from elsewhere, and what is wrong with the rest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabake.base.errors import Problems, UserError
from lorabake.families import caption_readers, family_card, inspect_model, load_model
from lorabake.families.sdxl.card import recognise
from lorabake.protocols.family import Model, ModelSource
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

PROMPT = Prompt("1girl, red hair", "monochrome", seed=1, steps=3, cfg=4, sampler="euler", width=64, height=64)


def same_weights(one: Model, other: Model) -> bool:
    """Whether all parts hold the same numbers."""
    return all(
        torch.equal(tensor, other.parts[part].state_dict()[name])
        for part, module in one.parts.items()
        for name, tensor in module.state_dict().items()
    )


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edited(checkpoint: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(checkpoint)
    change(tensors)
    save_file(tensors, path)
    return path


def test_facts(folder: Path) -> None:
    facts = inspect_model(folder)
    assert (facts.family, facts.name, facts.path) == ("sdxl", "tiny-xl", folder)
    assert (facts.prediction, facts.resolution, facts.pixel_step) == ("epsilon", 64, 16)
    assert (facts.latent_scale, facts.latent_channels, facts.small) == (4, 4, True)
    assert (facts.base_version, facts.architecture) == ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")


def test_a_single_file_is_the_same_model(folder: Path, checkpoint: Path) -> None:
    one, other = load_model(folder), load_model(checkpoint)
    told = dataclasses.replace(other.facts, path=folder, digest=one.facts.digest, resolution=64)
    assert told == one.facts
    assert other.facts.resolution == 128 * 4, "single files do not say it; SDXL's is 128 latent cells"
    assert same_weights(one, other) and same_weights(other, one)
    assert one.latent_space == other.latent_space
    assert torch.equal(one.betas_T, other.betas_T)  # pyright: ignore[reportArgumentType]
    for name, ids in one.tokenize(["red hair", ""]).items():
        assert torch.equal(ids, other.tokenize(["red hair", ""])[name])
    assert draw(one, [PROMPT])[0].tobytes() == draw(other, [PROMPT])[0].tobytes()


def test_diffusers_reads_the_single_file_as_we_do(folder: Path, checkpoint: Path, pipeline: Any) -> None:
    theirs: Any = type(pipeline).from_single_file(str(checkpoint), config=str(folder), local_files_only=True)
    model = load_model(checkpoint)
    given = model.parts["text_encoder_2"].state_dict()
    assert torch.equal(given["text_projection.weight"], theirs.text_encoder_2.text_projection.weight)
    with torch.no_grad():
        ours = model.encode_text(model.tokenize([PROMPT.text]))
        text, _, pooled, _ = theirs.encode_prompt(PROMPT.text, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["text_BLD"], text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pooled_BD"], pooled, rtol=1e-5, atol=1e-5)
    unet = model.parts["denoiser"].state_dict()
    assert all(torch.equal(tensor, unet[name]) for name, tensor in theirs.unet.state_dict().items())


def test_a_single_file_saved_as_a_folder_loads_in_diffusers(checkpoint: Path, pipeline: Any, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    model.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert same_weights(model, again)
    assert dataclasses.replace(again.facts, path=checkpoint, name="tiny-xl", digest="") == dataclasses.replace(
        model.facts, digest=""
    )
    theirs: Any = type(pipeline).from_pretrained(tmp_path / "saved", dtype=torch.float32, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    picture = theirs(
        PROMPT.text, negative_prompt=PROMPT.negative, num_inference_steps=PROMPT.steps, guidance_scale=PROMPT.cfg,
        width=64, height=64, generator=torch.Generator("cpu").manual_seed(PROMPT.seed),
    ).images[0]  # fmt: skip
    ours = draw(again, [PROMPT])[0]
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(ours).astype(int)).max() <= 2


@pytest.mark.parametrize(
    ("keys", "prediction", "last_beta_is_one"),
    [((), "epsilon", False), (("v_pred",), "v", False), (("v_pred", "ztsnr"), "v", True)],
)
def test_markers_in_a_file_say_what_it_predicts(
    checkpoint: Path, tmp_path: Path, keys: tuple[str, ...], prediction: str, last_beta_is_one: bool
) -> None:
    path = edited(checkpoint, tmp_path / "x.safetensors", lambda t: t.update({key: torch.zeros(0) for key in keys}))
    model = load_model(path)
    assert model.facts.prediction == prediction
    assert model.betas_T is not None and (float(model.betas_T[-1]) == 1.0) is last_beta_is_one


def test_a_folders_scheduler_says_what_it_predicts_unless_the_user_does(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    edit_json(tmp_path / "model/scheduler/scheduler_config.json", prediction_type="v_prediction")
    facts = recognise(ModelSource(tmp_path / "model"))
    assert facts is not None and facts.prediction == "v" and not facts.notes
    facts = recognise(ModelSource(tmp_path / "model", prediction="epsilon"))
    assert facts is not None and facts.prediction == "epsilon" and "believed" in facts.notes[0]
    assert load_model(facts).sampler["prediction_type"] == "epsilon"


def test_parts_from_elsewhere(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A file with the U-Net alone, and the rest beside it, the encoders in the wrong order and in a layout without sizes."""
    tensors = load_file(checkpoint)
    alone = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    save_file(alone, tmp_path / "unet.safetensors")
    shutil.copy(folder / "text_encoder/model.safetensors", tmp_path / "clip_l.safetensors")
    shutil.copy(folder / "text_encoder_2/model.safetensors", tmp_path / "clip_g.safetensors")
    with pytest.raises(Problems) as caught:
        recognise(ModelSource(tmp_path / "unet.safetensors"))
    assert [problem.where for problem in caught.value.problems] == ["text encoder 1", "text encoder 2", "VAE"]
    encoders = (tmp_path / "clip_g.safetensors", tmp_path / "clip_l.safetensors")
    facts = recognise(ModelSource(tmp_path / "unet.safetensors", folder / "vae", encoders))
    assert facts is not None
    whole, joined = load_model(folder), load_model(facts)
    assert same_weights(whole, joined)
    with torch.no_grad():
        for name, tensor in whole.encode_text(whole.tokenize(["red hair"])).items():
            assert torch.equal(tensor, joined.encode_text(joined.tokenize(["red hair"]))[name])
    with pytest.raises(UserError, match="two text encoders; 1 given"):
        recognise(ModelSource(checkpoint, text_encoders=encoders[:1]))


def test_a_unet_whose_names_have_nothing_before_them(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    inside = {name: tensor for name, tensor in load_file(checkpoint).items() if name.startswith(prefix)}
    bare = {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
    save_file({**bare, "v_pred": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(Problems) as caught:
        inspect_model(tmp_path / "unet.safetensors")
    assert [problem.where for problem in caught.value.problems] == ["text encoder 1", "text encoder 2", "VAE"]
    assert all("Give " in problem.what for problem in caught.value.problems)
    facts = inspect_model(
        tmp_path / "unet.safetensors", folder / "vae", [folder / "text_encoder", folder / "text_encoder_2"]
    )
    assert (facts.family, facts.prediction) == ("sdxl", "v")
    assert same_weights(load_model(folder), load_model(facts))


def test_other_models_are_left_to_others(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    assert recognise(ModelSource(tmp_path)) is None
    assert recognise(ModelSource(tmp_path / "unet")) is None
    unclip = {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2, 2), "cond_stage_model.x": torch.zeros(1)}
    save_file(unclip, tmp_path / "unclip.safetensors")
    assert recognise(ModelSource(tmp_path / "unclip.safetensors")) is None


def spoil_encoder(folder: Path) -> None:
    (folder / "text_encoder_2/model.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer_2")


def spoil_inputs(folder: Path) -> None:
    edit_json(folder / "unet/config.json", in_channels=9)


def spoil_sizes(folder: Path) -> None:
    edit_json(folder / "unet/config.json", addition_time_embed_dim=128)


def spoil_widths(folder: Path) -> None:
    edit_json(folder / "unet/config.json", cross_attention_dim=64)


def spoil_prediction(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="sample")


def spoil_side(folder: Path) -> None:
    edit_json(folder / "unet/config.json", sample_size="large")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_encoder, ["text_encoder_2", "tokenizer_2"]),
        (spoil_inputs, ["in_channels", "9", "4", "inpainting"]),
        (spoil_sizes, ["projection_class_embeddings_input_dim", str(96 + 6 * 128)]),
        (spoil_widths, ["cross_attention_dim", "64", "192"]),
        (spoil_prediction, ["'sample'", "v_prediction"]),
        (spoil_side, ["sample_size", "'large'"]),
    ],
)
def test_what_is_wrong_is_said(folder: Path, tmp_path: Path, spoil: Callable[[Path], None], words: list[str]) -> None:
    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        inspect_model(tmp_path / "model")
    for word in words:
        assert word in str(caught.value)


def test_a_refiner_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    def refine(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("conditioner.embedders.0.transformer.")]:
            del tensors[name]

    path = edited(checkpoint, tmp_path / "refiner.safetensors", refine)
    with pytest.raises(Problems, match="text encoder 1") as caught:
        inspect_model(path)
    assert "refiners" in str(caught.value)


def test_readers_see_what_each_encoder_does(folder: Path) -> None:
    facts = inspect_model(folder)
    assert family_card(facts).text_options == {"max_tokens"}, "clip_skip does nothing here, and recipes say so"
    readers = caption_readers(facts, {"max_tokens": 150})
    assert list(readers) == ["text_encoder", "text_encoder_2"]
    for reader in readers.values():
        (reading,) = reader(["red hair, " * 60])
        assert (reading.tokens, reading.room, reading.windows) == (180, 150, 2)
        assert reading.lost
