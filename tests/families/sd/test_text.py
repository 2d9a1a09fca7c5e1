"""What SD1.x/2.x models are told of a caption: clip skip and long captions, held to diffusers and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families import caption_readers, inspect_model, load_model

SHORT, LONG = "1girl, red hair, smile, beach", "1girl, red hair, " * 30
CAPTIONS = ["", SHORT, LONG]


@pytest.fixture(scope="module")
def encoder() -> Any:
    """The pocket model's text encoder in transformers."""
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(POCKET_MODEL / "text_encoder", dtype=torch.float32).eval()


def conditioning(captions: list[str] = CAPTIONS, **options: Any) -> torch.Tensor:
    model = load_model("pocket", **options)
    with torch.no_grad():
        return model.encode_text(model.tokenize(captions))["text_BLD"]


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
@pytest.mark.parametrize(("max_tokens", "length"), [(75, 77), (150, 152), (225, 227)])
def test_clip_skip_in_every_window(encoder: Any, clip_skip: int, max_tokens: int, length: int) -> None:
    """The layer that is asked for, then the final norm; window by window in transformers."""
    model = load_model("pocket")
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    expected = []
    for caption in CAPTIONS:
        pieces = model.tokenizer.pieces(caption)[:max_tokens]  # pyright: ignore[reportAttributeAccessIssue]
        ends, inside = [], []
        for place in range(0, max_tokens, 75):
            part = pieces[place : place + 75]
            ids = torch.tensor([[2046, *part, *[2047] * (76 - len(part))]])
            with torch.no_grad():
                text_LD = norm(encoder(ids, output_hidden_states=True).hidden_states[-clip_skip])[0]
            ends += [text_LD[:1], text_LD[-1:]]
            inside.append(text_LD[1:-1])
        expected.append(torch.cat([ends[0], *inside, ends[-1]]))
    given = conditioning(clip_skip=clip_skip, max_tokens=max_tokens)
    assert given.shape[1] == length
    torch.testing.assert_close(given, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_clip_skip_equals_diffusers_which_counts_one_less(
    encoder: Any, clip_skip: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' ``clip_skip=1`` is the last but one layer, which kohya, web clients and recipes here call 2."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    # diffusers takes the final norm from where transformers had it before its version 5
    monkeypatch.setattr(type(encoder), "text_model", property(lambda model: model), raising=False)
    skipped = None if clip_skip is None else clip_skip - 1
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        POCKET_MODEL, unet=None, vae=None, text_encoder=encoder, tokenizer=CLIPTokenizer.from_pretrained(POCKET_MODEL / "tokenizer")
    )  # fmt: skip
    with torch.no_grad():
        theirs = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False, clip_skip=skipped)[0]
    torch.testing.assert_close(conditioning(clip_skip=clip_skip), theirs, rtol=1e-5, atol=1e-5)


def test_sd2s_ordinary_output_is_the_last_but_one_layer(encoder: Any, tmp_path: Path) -> None:
    """SD2 models come without the last layer of their text encoder: their ordinary output is clip skip 2 of the whole one."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(POCKET_MODEL, tmp_path / "sd2")
    config = tmp_path / "sd2" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    weights = tmp_path / "sd2" / "text_encoder" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "layers.2." not in name}
    save_file(tensors, weights)
    model = load_model(tmp_path / "sd2")
    with torch.no_grad():
        given = model.encode_text(model.tokenize(CAPTIONS))["text_BLD"]
    torch.testing.assert_close(given, conditioning(clip_skip=2), rtol=1e-5, atol=1e-5)


def test_captions_of_a_batch_are_equally_long_and_do_not_touch_each_other() -> None:
    together = conditioning(max_tokens=225)
    for caption, text_LD in zip(CAPTIONS, together, strict=True):
        torch.testing.assert_close(conditioning([caption], max_tokens=225)[0], text_LD, rtol=1e-5, atol=1e-5)


def test_the_end_of_a_long_caption_is_seen_with_more_windows_only() -> None:
    ending = ["smile, " * 50 + "beach", "smile, " * 50 + "night"]
    assert torch.equal(*conditioning(ending))
    long = conditioning(ending, max_tokens=150)
    assert not torch.equal(*long) and torch.equal(*long[:, :101])


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match="75, 150 or 225"):
        load_model("pocket", max_tokens=77)
    with pytest.raises(UserError, match="has 3 layers"):
        load_model("pocket", clip_skip=4)


def test_readers_see_what_the_model_sees() -> None:
    """The report without weights counts with the tokens that the model is given."""
    model, facts = load_model("pocket", max_tokens=150), inspect_model("pocket")
    (part,) = readers = caption_readers(facts, {"max_tokens": 150})
    for caption, reading in zip(CAPTIONS, readers[part](CAPTIONS), strict=True):
        whole, kept = (model.tokenize([text])[part] for text in (caption, reading.kept))
        assert torch.equal(whole, kept) and reading.room == 150
