"""Our T5 encoder against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorabake.base.errors import Problems
from lorabake.families.networks.dit_config import T5Config
from lorabake.families.networks.t5 import T5Encoder, distance_buckets

SIZES: dict[str, Any] = {"vocab_size": 99, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4}


def pair(**sizes: Any) -> tuple[T5Encoder, Any]:
    """Ours and theirs, with the same random weights."""
    from transformers import T5Config as Settings
    from transformers import T5EncoderModel as Reference

    torch.manual_seed(0)
    settings = Settings(**SIZES, feed_forward_proj="gated-gelu", **sizes)
    theirs = Reference(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = T5Encoder(T5Config.from_json(settings.to_dict()))
    state = {key: tensor for key, tensor in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("length", [1, 7, 200])
def test_hidden_states_and_gradients_equal_transformers(length: int) -> None:
    ours, theirs = pair()
    ids = torch.randint(0, 99, (2, length))
    given, expected = ours(ids), theirs(input_ids=ids).last_hidden_state
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    names = [name for name, _ in ours.named_parameters()]
    of_ours = torch.autograd.grad(given, list(ours.parameters()), weight)
    of_theirs = torch.autograd.grad(expected, [theirs.get_parameter(name) for name in names], weight)
    largest = max(float(gradient.abs().max()) for gradient in of_theirs)
    for name, one, other in zip(names, of_ours, of_theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_other_distances_equal_transformers() -> None:
    ours, theirs = pair(relative_attention_num_buckets=8, relative_attention_max_distance=20)
    ids = torch.randint(0, 99, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(input_ids=ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near() -> None:
    ours, _ = pair()
    ids = torch.randint(0, 99, (2, 40))
    with torch.no_grad():
        expected = ours(ids)
        given = ours.bfloat16()(ids).float()
    assert (given - expected).norm() < 0.05 * expected.norm()


def test_distances() -> None:
    # 8 kinds: 0 and 1 before, then 2 to under 4.47, then farther; the same again after
    given = distance_buckets(torch.tensor([0, -1, -2, -4, -5, -99, 1, 2, 4, 5, 99]), 8, 10)
    assert given.tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]


def test_real_size() -> None:
    with torch.device("meta"):
        encoder = T5Encoder(T5Config())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 4_762_310_656


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj"),
        ({"model_type": "umt5"}, "model_type"),
        ({"num_layers": 0}, "num_layers"),
        ({"relative_attention_num_buckets": 6}, "relative_attention_num_buckets"),
    ],
)
def test_what_this_network_is_not(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Problems, match=words):
        T5Config.from_json({"model_type": "t5", "feed_forward_proj": "gated-gelu", **changed})
