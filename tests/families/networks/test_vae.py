"""Our autoencoder against diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorabake.base.errors import UserError
from lorabake.families.networks.components import find_vae
from lorabake.families.networks.config import VaeConfig
from lorabake.families.networks.layouts import current_key
from lorabake.families.networks.vae import AutoencoderKL, LatentDistribution

CONFIGS: dict[str, dict[str, Any]] = {
    "pocket": {"block_out_channels": [8, 16, 24], "layers_per_block": 1, "norm_num_groups": 4},
    "sd1": {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 2, "norm_num_groups": 8},
    "flux": {
        "block_out_channels": [8, 16],
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no-attention": {"block_out_channels": [8, 16], "norm_num_groups": 8, "mid_block_add_attention": False},
}


def pair(name: str) -> tuple[AutoencoderKL, Any]:
    """Ours and theirs, with the same random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Reference

    torch.manual_seed(0)
    count = len(CONFIGS[name]["block_out_channels"])
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}
    theirs = Reference(**kinds, **CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = AutoencoderKL(VaeConfig.from_json(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 16), (40, 24)])
@torch.no_grad()
def test_encoding_and_decoding_equal_diffusers(name: str, height: int, width: int) -> None:
    ours, theirs = pair(name)
    images = torch.rand(2, 3, height, width) * 2 - 1
    given, expected = ours.encode(images), theirs.encode(images).latent_dist
    close(given.mean, expected.mean)
    close(given.logvar, expected.logvar)
    scale = ours.config.latent_scale
    assert given.mean.shape[2:] == (height // scale, width // scale)
    close(ours.decode(given.mean), theirs.decode(expected.mean).sample)


def test_a_sample_has_the_mean_and_the_spread() -> None:
    mean, logvar = torch.full((1, 4, 100, 100), 3.0), torch.full((1, 4, 100, 100), -2.0)
    sample = LatentDistribution(mean, logvar).sample(torch.Generator().manual_seed(0))
    assert abs(float(sample.mean()) - 3) < 0.01
    assert abs(float(sample.std()) - float(torch.tensor(-1.0).exp())) < 0.01
    again = LatentDistribution(mean, logvar).sample(torch.Generator().manual_seed(0))
    assert torch.equal(sample, again)


def test_old_names_of_attention() -> None:
    ours, _ = pair("pocket")
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key in ours.state_dict():
        old = key
        for name, was in new.items():
            old = old.replace(f".{name}.", f".{was}.")
        assert current_key(old) == key


def test_a_file_too_narrow_for_its_groups_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    narrow = AutoencoderKL(VaeConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8))
    file = tmp_path / "narrow.safetensors"
    save_file(narrow.state_dict(), file)
    with pytest.raises(UserError, match=r"narrow\.safetensors: an autoencoder with 16 channels has no 32 groups"):
        find_vae(file, 0.18215)
