"""Long prompts: windows are encoded apart and joined; held to transformers' own text encoder, computed window by window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.base.places import POCKET_MODEL
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.config import ClipConfig
from lorabake.families.networks.prompt_windows import first_windows, join_windows, split_windows
from lorabake.families.networks.tokenizer import ClipTokenizer

CAPTIONS = ["", "blue hair", "1girl, blue hair, " * 12, "1girl, red dress, beach, " * 16, "smile, hat, " * 100]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.from_folder(POCKET_MODEL / "tokenizer")


@pytest.fixture(scope="module")
def encoders() -> tuple[CLIPTextModel, Any]:
    """Ours and theirs, with the same random weights and room for the pocket model's tokens."""
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Reference

    torch.manual_seed(0)
    settings = CLIPTextConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=2046,
        eos_token_id=2047,
        pad_token_id=2047,
    )
    theirs = Reference(settings).eval()
    ours = CLIPTextModel(ClipConfig.from_json(settings.to_dict()))
    theirs_by_name = {
        f"text_model.{key.removeprefix('text_model.')}": value for key, value in theirs.state_dict().items()
    }
    ours.load_state_dict({name: theirs_by_name[name] for name in ours.state_dict()})
    return ours, theirs


def joined_by_hand(theirs: Any, tokenizer: ClipTokenizer, caption: str, windows: int) -> tuple[Tensor, Tensor]:
    """(text_LD, pooled_D), one window after the other, with nothing of ours but the tokens."""
    pieces, rows = tokenizer.pieces(caption), []
    for number in range(windows):
        inside = pieces[75 * number : 75 * number + 75]
        ids = [2046, *inside, 2047, *[2047] * (75 - len(inside))]
        rows.append(theirs(input_ids=torch.tensor([ids])))
    first, last = rows[0].last_hidden_state[0], rows[-1].last_hidden_state[0]
    middles = [row.last_hidden_state[0, position] for row in rows for position in range(1, 76)]
    return torch.stack([first[0], *middles, last[76]]), rows[0].pooler_output[0]


@pytest.mark.parametrize(("windows", "length"), [(1, 77), (2, 152), (3, 227)])
def test_conditioning_equals_transformers(
    encoders: tuple[CLIPTextModel, Any], tokenizer: ClipTokenizer, windows: int, length: int
) -> None:
    ours, theirs = encoders
    ids_BT = torch.tensor(tokenizer.encode(CAPTIONS, windows))
    with torch.no_grad():
        text_NLD = ours(split_windows(ids_BT, 77))
        text_BLD = join_windows(text_NLD, len(CAPTIONS))
        ends_N = (split_windows(ids_BT, 77) == 2047).int().argmax(1)
        pooled_BD = first_windows(text_NLD[torch.arange(len(text_NLD)), ends_N], len(CAPTIONS))
        expected = [joined_by_hand(theirs, tokenizer, caption, windows) for caption in CAPTIONS]
    assert text_BLD.shape == (len(CAPTIONS), length, 32)
    torch.testing.assert_close(text_BLD, torch.stack([text for text, _ in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled_BD, torch.stack([pooled for _, pooled in expected]), rtol=1e-5, atol=1e-5)


def test_a_caption_that_fits_is_followed_by_the_empty_caption(
    encoders: tuple[CLIPTextModel, Any], tokenizer: ClipTokenizer
) -> None:
    ours, _ = encoders
    fits = CAPTIONS[:3]
    with torch.no_grad():
        short_BLD = ours(torch.tensor(tokenizer.encode(fits)))
        empty_LD = ours(torch.tensor(tokenizer.encode([""])))[0]
        long_BLD = join_windows(ours(split_windows(torch.tensor(tokenizer.encode(fits, 3)), 77)), len(fits))
    torch.testing.assert_close(long_BLD[:, :76], short_BLD[:, :76], rtol=1e-6, atol=1e-6)
    rest_LD = torch.cat([empty_LD[1:76], empty_LD[1:77]])
    torch.testing.assert_close(long_BLD[:, 76:], rest_LD.expand(len(fits), -1, -1), rtol=1e-6, atol=1e-6)


def test_one_window_is_left_as_it_is() -> None:
    text_BLD = torch.randn(3, 77, 4)
    assert join_windows(text_BLD, 3) is text_BLD
    assert torch.equal(first_windows(text_BLD[:, 0], 3), text_BLD[:, 0])


def test_which_vectors_stay() -> None:
    """Windows of 4: captions 0 and 1 with two windows each, each vector named by its caption, window and place."""
    text_NLD = torch.tensor([[[100 * b + 10 * w + p] for p in range(4)] for b in (0, 1) for w in (0, 1)])
    assert join_windows(text_NLD, 2)[..., 0].tolist() == [[0, 1, 2, 11, 12, 13], [100, 101, 102, 111, 112, 113]]
    assert first_windows(text_NLD[:, 3], 2)[:, 0].tolist() == [3, 103]
    assert split_windows(torch.arange(16).view(2, 8), 4).tolist() == torch.arange(16).view(4, 4).tolist()


def test_gradients_reach_what_stays_and_nothing_else() -> None:
    text_NLD = torch.zeros(4, 5, 2, requires_grad=True)
    join_windows(text_NLD, 2).sum().backward()
    assert text_NLD.grad is not None
    assert text_NLD.grad[:, :, 0].tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]] * 2


def test_rows_that_are_not_whole_windows() -> None:
    with pytest.raises(ValueError, match="100 tokens in a row"):
        split_windows(torch.zeros(1, 100), 77)
