"""The text encoder learns to read captions, repeatably."""

from __future__ import annotations

import pytest
import torch

from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.pocket.textmodel import TextWarmUp, new_text_encoder, warm_up
from lorabake.pocket.tokenizer import build_tokenizer
from lorabake.pocket.world import axes


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_warm_up_is_repeatable_and_lowers_the_loss(tokenizer: ClipTokenizer) -> None:
    states, losses = [], []
    for _ in range(2):
        encoder = new_text_encoder(1)
        torch.rand(3)  # whatever else draws random numbers does not matter
        reading = warm_up(
            encoder, tokenizer, TextWarmUp(steps=50, batch_size=4), lambda step, loss: losses.append(loss)
        )
        states.append(encoder.state_dict())
        assert set(reading.per_axis) == set(axes) and 0 <= reading.mean <= 1
        assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert losses[0] == losses[1] < 1.6


@pytest.mark.slow
def test_a_hundred_and_fifty_steps_read_most_of_a_caption(tokenizer: ClipTokenizer) -> None:
    reading = warm_up(new_text_encoder(0), tokenizer, TextWarmUp(steps=150, batch_size=48))
    assert reading.mean > 0.5 and reading.unsaid > 0.85
