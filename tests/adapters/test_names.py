"""Layers by their other names, and one layer out of pieces: against changes worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorabake.adapters._names import by_layer
from lorabake.base.errors import UserError
from lorabake.protocols.family import Alias, Layer

PLAIN = Layer("denoiser", "plain", nn.Linear(3, 4), "transformer", "lora_unet_plain", (Alias("lora_unet_other"),))
FUSED = Layer(
    "denoiser", "fused", nn.Linear(3, 6), "transformer", "lora_unet_fused",
    (Alias("lora_x_q", (0, 2)), Alias("lora_x_k", (2, 6))),
)  # fmt: skip
SWAPPED = Layer(
    "denoiser", "swapped", nn.Linear(3, 4), "transformer", "lora_unet_swapped",
    (Alias("lora_x_norm", (0, 2), (2, 4)), Alias("lora_x_norm", (2, 4), (0, 2))),
)  # fmt: skip
LAYERS = [PLAIN, FUSED, SWAPPED]


def pair(outputs: int, rank: int, alpha: float | None = None) -> dict[str, Tensor]:
    found = {"lora_down.weight": torch.randn(rank, 3), "lora_up.weight": torch.randn(outputs, rank)}
    return found if alpha is None else found | {"alpha": torch.tensor(alpha)}


def change(tensors: dict[str, Tensor]) -> Tensor:
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    return up @ down * (float(tensors.get("alpha", torch.tensor(float(len(down))))) / len(down))


def test_own_names_and_whole_aliases_pass_through() -> None:
    given = {"lora_unet_other": {"hada_w1_a": torch.ones(2)}, "lora_unet_fused": pair(6, 2)}
    found = by_layer(LAYERS, given)
    assert found == {"lora_unet_plain": given["lora_unet_other"], "lora_unet_fused": given["lora_unet_fused"]}


def test_pieces_of_different_ranks_and_alphas_become_one() -> None:
    given = {"lora_x_k": pair(4, 3, alpha=1.5), "lora_x_q": pair(2, 2)}
    (joined,) = by_layer(LAYERS, given).values()
    assert joined["lora_down.weight"].shape == (5, 3) and joined["alpha"] == 5
    expected = torch.cat([change(given["lora_x_q"]), change(given["lora_x_k"])])
    torch.testing.assert_close(change(dict(joined)), expected)


def test_a_missing_piece_changes_nothing() -> None:
    given = {"lora_x_k": pair(4, 3)}
    joined = dict(by_layer(LAYERS, given)["lora_unet_fused"])
    assert not change(joined)[:2].any()
    torch.testing.assert_close(change(joined)[2:], change(given["lora_x_k"]))


def test_halves_the_other_way_round() -> None:
    given = {"lora_x_norm": pair(4, 2, alpha=4.0)}
    joined = dict(by_layer(LAYERS, given)["lora_unet_swapped"])
    assert joined["lora_down.weight"].shape == (2, 3), "one piece in two places needs its rank once"
    torch.testing.assert_close(change(joined), change(given["lora_x_norm"]).roll(2, 0))


def test_half_precision_is_joined_in_full() -> None:
    given = {"lora_x_q": {name: tensor.half() for name, tensor in pair(2, 2, alpha=0.3).items()}}
    joined = by_layer(LAYERS, given)["lora_unet_fused"]
    assert {tensor.dtype for tensor in joined.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_unet_nowhere": pair(2, 2), "lora_x_q": pair(2, 2)}, "does not fit this base model: 1 of its 2 .* lora_unet_nowhere"),
        ({"lora_unet_plain": pair(4, 2), "lora_unet_other": pair(4, 2)}, "several names: lora_unet_plain, lora_unet_other"),
        ({"lora_unet_fused": pair(6, 2), "lora_x_q": pair(2, 2)}, "several names: lora_unet_fused, lora_x_q"),
        ({"lora_x_q": {"lora_down.weight": torch.ones(2, 3)}}, "'lora_x_q.lora_up.weight' is missing"),
        ({"lora_x_q": pair(2, 2) | {"dora_scale": torch.ones(2, 1)}}, "holds 'lora_x_q.dora_scale'.*part of 'lora_unet_fused'"),
        ({"lora_x_q": pair(3, 2)}, r"'lora_x_q.lora_up.weight' is \(3, 2\), expected \(2, 2\)"),
        ({"lora_x_q": {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(2, 2)}}, r"\(2, 5\), expected \(2, 3\)"),
        ({"lora_x_q": {"lora_down.weight": torch.ones(()), "lora_up.weight": torch.ones(2, 2)}}, r"is \(\), expected"),
        ({"lora_x_q": {"lora_down.weight": torch.ones(0, 3), "lora_up.weight": torch.ones(2, 0)}}, r"\(0, 3\), expected \(1, 3\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(given: dict[str, dict[str, Tensor]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        by_layer(LAYERS, given)
