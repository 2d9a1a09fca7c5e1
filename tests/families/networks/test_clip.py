"""Our text encoder against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorabake.families.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from lorabake.families.networks.config import ClipConfig
from lorabake.families.networks.layouts import classic_key


def pair(activation: str) -> tuple[CLIPTextModel, Any]:
    """Ours and theirs, with the same random weights."""
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Reference

    torch.manual_seed(0)
    settings = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act=activation,
        bos_token_id=97,
        eos_token_id=98,
        pad_token_id=98,
    )
    theirs = Reference(settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = CLIPTextModel(ClipConfig.from_json(settings.to_dict()))
    ours.load_state_dict({name: tensor for key, tensor in theirs.state_dict().items() if (name := classic_key(key))})
    return ours, theirs.eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [77, 5])
def test_hidden_states_and_gradients_equal_transformers(activation: str, length: int) -> None:
    ours, theirs = pair(activation)
    ids = torch.randint(0, 97, (3, length))
    expected = theirs(input_ids=ids).last_hidden_state
    given = ours(ids)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    of_ours = torch.autograd.grad(given, list(ours.parameters()), weight)
    of_theirs = dict(
        zip(
            (classic_key(name) for name, _ in theirs.named_parameters()),
            torch.autograd.grad(expected, list(theirs.parameters()), weight),
            strict=True,
        )
    )
    largest = max(float(gradient.abs().max()) for gradient in of_theirs.values())
    for (name, _), gradient in zip(ours.named_parameters(), of_ours, strict=True):
        torch.testing.assert_close(gradient, of_theirs[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("skip", [1, 2, 4])
def test_clip_skip_counts_from_the_end_and_norms(skip: int) -> None:
    ours, theirs = pair("quick_gelu")
    ids = torch.randint(0, 97, (2, 77))
    with torch.no_grad():
        hidden = theirs(input_ids=ids, output_hidden_states=True).hidden_states[-skip]
        norm = getattr(theirs, "text_model", theirs).final_layer_norm
        torch.testing.assert_close(ours(ids, clip_skip=skip), norm(hidden), rtol=1e-5, atol=1e-5)


def projected_pair(end: int) -> tuple[CLIPTextModelWithProjection, Any]:
    """The network with a projection, ours and theirs; ``end`` is what the file says of the end token."""
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModelWithProjection as Reference

    torch.manual_seed(0)
    settings = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        hidden_act="gelu", projection_dim=24, bos_token_id=0, eos_token_id=end, pad_token_id=1,
    )  # fmt: skip
    theirs = Reference(settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = CLIPTextModelWithProjection(ClipConfig.from_json(settings.to_dict()))
    ours.load_state_dict({name: tensor for key, tensor in theirs.state_dict().items() if (name := classic_key(key))})
    return ours, theirs.eval()


@pytest.mark.parametrize("end", [2, 98, 41])
def test_penultimate_and_pooled_equal_transformers(end: int) -> None:
    ours, theirs = projected_pair(end)
    ids = torch.randint(3, 98, (4, 30))
    ids[ids == 41] = 40
    for row, place in enumerate((29, 7, 12, 1)):  # two ways of padding: more end tokens, or another
        ids[row, place] = 98 if end == 2 else end
        ids[row, place + 1 :] = ids[row, place] if row % 2 else 0
    expected = theirs(input_ids=ids, output_hidden_states=True)
    tokens = ours.penultimate(ids)
    pooled = ours.pooled(ids, tokens)
    torch.testing.assert_close(tokens, expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, expected.text_embeds, rtol=1e-5, atol=1e-5)
    ours_grad = torch.autograd.grad(tokens.square().sum() + pooled.square().sum(), list(ours.parameters()))
    theirs_loss = expected.hidden_states[-2].square().sum() + expected.text_embeds.square().sum()
    theirs_grad = torch.autograd.grad(theirs_loss, list(theirs.parameters()))
    reference = {
        classic_key(name): grad for (name, _), grad in zip(theirs.named_parameters(), theirs_grad, strict=True)
    }
    largest = max(float(grad.abs().max()) for grad in theirs_grad)
    for (name, _), grad in zip(ours.named_parameters(), ours_grad, strict=True):
        torch.testing.assert_close(grad, reference[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_a_token_sees_only_those_before_it() -> None:
    ours, _ = pair("quick_gelu")
    ids = torch.randint(0, 97, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 97
    with torch.no_grad():
        before, after = ours(ids), ours(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert (before[:, 12:] != after[:, 12:]).any(-1).all()


@pytest.mark.parametrize("skip", [-1, 5])
def test_skipping_more_layers_than_there_are(skip: int) -> None:
    ours = CLIPTextModel(ClipConfig(vocab_size=9, hidden_size=8, intermediate_size=8, layers=4, heads=2))
    with pytest.raises(ValueError, match="1 to 4"):
        ours(torch.zeros(1, 3, dtype=torch.long), clip_skip=skip)


def test_more_tokens_than_positions() -> None:
    ours = CLIPTextModel(ClipConfig(vocab_size=9, hidden_size=8, intermediate_size=8, layers=1, heads=2))
    with pytest.raises(ValueError, match="78 tokens"):
        ours(torch.zeros(1, 78, dtype=torch.long))


def test_a_new_network_starts_from_normal_embeddings() -> None:
    config = ClipConfig(vocab_size=4096, hidden_size=8, intermediate_size=8, layers=1, heads=2)
    weight = CLIPTextModel(config).text_model.embeddings.token_embedding.weight
    assert 0.9 < weight.std() < 1.1 and weight.requires_grad
