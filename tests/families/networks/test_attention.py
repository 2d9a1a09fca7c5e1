"""Both ways to attend give one answer, and each is chosen where it was measured to be faster."""

from __future__ import annotations

import pytest
import torch

from lorabake.families.networks import attention


@pytest.fixture(params=[True, False], ids=["matmul", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_prefer_matmul", lambda *_: request.param)


def by_hand(q_BLC: torch.Tensor, k_BMC: torch.Tensor, v_BMC: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    width = q_BLC.shape[-1] // heads
    parts = []
    for start in range(0, q_BLC.shape[-1], width):
        q, k, v = (x[..., start : start + width] for x in (q_BLC, k_BMC, v_BMC))
        scores = q @ k.transpose(1, 2) / width**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=-1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("heads", "keys", "causal"), [(1, 7, False), (4, 13, False), (3, 7, True)])
def test_attend_is_softmax_of_scores(heads: int, keys: int, causal: bool) -> None:
    q, k, v = (torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (7, keys, keys))
    expected, given = by_hand(q, k, v, heads, causal), attention.attend(q, k, v, heads, causal=causal)
    torch.testing.assert_close(given, expected)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(given, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "batch", "queries", "keys", "exact", "matmul"),
    [
        (torch.float32, 6, 256, 77, False, True),
        (torch.float32, 6, 256, 256, False, False),
        (torch.bfloat16, 6, 256, 256, False, True),
        (torch.bfloat16, 6, 256, 256, True, False),
        (torch.bfloat16, 1, 4096, 4096, False, False),
        (torch.float16, 6, 256, 77, False, False),
        (torch.float64, 1, 16, 16, False, False),
    ],
)
def test_the_faster_way_is_taken(
    dtype: torch.dtype, batch: int, queries: int, keys: int, exact: bool, matmul: bool
) -> None:
    q, k = (torch.empty(batch, n, 64, dtype=dtype, device="meta") for n in (queries, keys))
    assert not attention._prefer_matmul(q, k, 8, exact)  # only the CPU has a choice
    q, k = (torch.empty(1, dtype=dtype).expand(batch, n, 64) for n in (queries, keys))
    assert attention._prefer_matmul(q, k, 8, exact) is matmul
