"""The computed encoder is the whitened principal components of patches, through all norms and bends."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.pocket.architecture import LATENT_CHANNELS
from lorabake.pocket.autoencoder import analytic_autoencoder, patch_basis, to_patches
from lorabake.pocket.decoder import psnr, round_trip
from lorabake.pocket.world import draw, sample


@pytest.fixture(scope="module")
def pictures_NHWC() -> np.ndarray:
    rng = random.Random(0)
    return np.stack([np.asarray(draw(sample(rng), seed).image) for seed in range(120)])


def test_patches_keep_every_pixel_in_its_place() -> None:
    pictures = np.arange(2 * 8 * 12 * 3, dtype=np.uint8).reshape(2, 8, 12, 3)
    patches = to_patches(pictures)
    assert patches.shape == (2, 2, 3, 48)
    block = pictures[1, 4:8, 8:12].reshape(-1)
    np.testing.assert_allclose(patches[1, 1, 2], block / 127.5 - 1, rtol=1e-6)


def test_components_are_orthonormal_and_whiten_the_patches(pictures_NHWC: np.ndarray) -> None:
    basis = patch_basis(pictures_NHWC)
    np.testing.assert_allclose(basis.components_PC.T @ basis.components_PC, np.eye(LATENT_CHANNELS), atol=1e-5)
    assert (np.diff(basis.deviations_C) < 0).all()
    latents_MC = basis.encode(pictures_NHWC).permute(0, 2, 3, 1).reshape(-1, LATENT_CHANNELS).numpy()
    np.testing.assert_allclose(np.cov(latents_MC.T), np.eye(LATENT_CHANNELS), atol=0.01)
    np.testing.assert_allclose(latents_MC.mean(0), 0, atol=1e-3)


def test_the_network_encodes_as_the_components_do(pictures_NHWC: np.ndarray) -> None:
    vae = analytic_autoencoder(pictures_NHWC)
    wanted = patch_basis(pictures_NHWC).encode(pictures_NHWC[:32])
    images = torch.from_numpy(pictures_NHWC[:32]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images)
    difference = (posterior.mean * vae.config.scaling_factor - wanted).abs()
    assert difference.mean() < 5e-4 and difference.max() < 0.01  # of a standard deviation
    deviation = torch.exp(0.5 * posterior.logvar) * vae.config.scaling_factor
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.03), rtol=1e-3, atol=0)


def test_other_sizes_are_encoded_patch_by_patch_too(pictures_NHWC: np.ndarray) -> None:
    vae = analytic_autoencoder(pictures_NHWC)
    wide = np.concatenate([pictures_NHWC[:4], pictures_NHWC[4:8]], axis=2)[:, :48]
    images = torch.from_numpy(wide).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(images).mean * vae.config.scaling_factor
    assert latents.shape == (4, LATENT_CHANNELS, 12, 32)
    assert (latents - patch_basis(pictures_NHWC).encode(wide)).abs().mean() < 2e-3


def test_the_untrained_decoder_enlarges_mean_colours(pictures_NHWC: np.ndarray) -> None:
    vae = analytic_autoencoder(pictures_NHWC)
    shown = pictures_NHWC[:32]
    means = shown.reshape(32, 16, 4, 16, 4, 3).mean((2, 4)).round().astype(np.uint8)
    blocks = means.repeat(4, axis=1).repeat(4, axis=2)
    against_blocks = psnr(blocks, round_trip(vae, shown)).mean()
    assert against_blocks > 20  # smooth, but the same colours in the same places
    assert psnr(shown, round_trip(vae, shown)).mean() > 15


def test_the_same_pictures_and_seed_give_the_same_weights(pictures_NHWC: np.ndarray) -> None:
    first, again, other = (analytic_autoencoder(pictures_NHWC, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) for name in first if name.startswith(("encoder.conv", "quant")))


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="uint8"):
        to_patches(np.zeros((1, 64, 64, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="multiples of 4"):
        to_patches(np.zeros((1, 63, 64, 3), np.uint8))
    with pytest.raises(UserError, match="give more pictures"):
        patch_basis(np.full((3, 64, 64, 3), 7, np.uint8))
