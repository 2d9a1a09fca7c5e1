"""The decoder learns, repeatably; the encoder and the caller's settings stay as they are."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.pocket import decoder
from lorabake.pocket.autoencoder import analytic_autoencoder
from lorabake.pocket.decoder import DecoderTraining, psnr, round_trip, strange_picture, train_decoder
from lorabake.pocket.world import draw, sample


@pytest.fixture(scope="module")
def pictures_NHWC() -> np.ndarray:
    rng = random.Random(0)
    return np.stack([np.asarray(draw(sample(rng), seed).image) for seed in range(140)])


def test_psnr_by_hand() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    grey = black.copy()
    grey[0] = 51  # a fifth of 255: 20·log10(5)
    np.testing.assert_allclose(psnr(black, grey), [13.9794, np.inf], rtol=1e-5)


def test_training_is_repeatable_and_leaves_the_encoder_alone(pictures_NHWC: np.ndarray) -> None:
    start = analytic_autoencoder(pictures_NHWC)
    first, again, other = (copy.deepcopy(start) for _ in range(3))
    threads = torch.get_num_threads()
    train_decoder(first, pictures_NHWC, DecoderTraining(steps=3))
    torch.manual_seed(99)
    train_decoder(again, pictures_NHWC, DecoderTraining(steps=3))
    train_decoder(other, pictures_NHWC, DecoderTraining(steps=3, seed=1))
    before, after = start.state_dict(), first.state_dict()
    assert all(torch.equal(after[name], again.state_dict()[name]) for name in after)
    assert not torch.equal(after["decoder.conv_in.weight"], other.state_dict()["decoder.conv_in.weight"])
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith(("encoder.", "quant_conv."))
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())
    assert torch.get_num_threads() == threads


def test_an_error_leaves_a_usable_autoencoder(pictures_NHWC: np.ndarray) -> None:
    vae = analytic_autoencoder(pictures_NHWC)
    with pytest.raises(UserError, match="without pictures"):
        train_decoder(vae, pictures_NHWC[:0])

    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoder, "REPORT_EVERY", 1)
        train_decoder(vae, pictures_NHWC, DecoderTraining(steps=2), stop)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.slow
def test_a_hundred_steps_sharpen_fresh_pictures(pictures_NHWC: np.ndarray) -> None:
    vae = analytic_autoencoder(pictures_NHWC)
    held_out = pictures_NHWC[120:]
    before = psnr(held_out, round_trip(vae, held_out)).mean()
    losses: list[float] = []
    train_decoder(vae, pictures_NHWC[:120], DecoderTraining(steps=100), lambda step, loss: losses.append(loss))
    assert psnr(held_out, round_trip(vae, held_out)).mean() > before + 1
    assert len(losses) == 1 and 0 < losses[0] < 0.3


def test_strange_pictures_are_many_and_repeatable() -> None:
    pictures = [np.asarray(strange_picture(random.Random(seed))) for seed in range(30)]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 30
    assert np.stack(pictures).std() > 40
    np.testing.assert_array_equal(pictures[4], np.asarray(strange_picture(random.Random(4))))
