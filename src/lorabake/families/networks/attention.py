"""Scaled dot-product attention, by whichever of two equal ways is faster for the device, the type and the sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on one AVX-512 core with bf16 instructions, torch 2.13, milliseconds forward + backward, matmul / kernel
# (shape: batch, queries, keys, channels, heads):
#   float32   6,256,256,64,2  6.8 / 4.7      6,256,77,64,2  1.67 / 1.85    6,64,64,96,2   0.51 / 0.52   6,64,77,96,2  0.65 / 0.71
#             6,77,77,128,4   1.03 / 1.21    1,1024,77,640,8 9.6 / 10.1    1,4096,77,320,8  26 / 25     1,1024,1024,640,8  150 / 104
#             1,2048,2048,320,8  455 / 243   1,4096,4096,320,8  2409 / 950
#   bfloat16  6,256,256,64,2  1.7 / 5.7      6,256,77,64,2  1.09 / 3.79    6,64,64,96,2   0.36 / 1.52   1,4096,77,320,8  14 / 30
#             1,1024,1024,640,8  50 / 80     4,1024,1024,640,8  241 / 313  1,2048,2048,320,8  192 / 195 1,4096,4096,320,8  1298 / 745
# So: in bfloat16 the kernel's backward is slow until the scores outgrow the cache; in float32 it loses only on short texts.
_SHORT_TEXT = 128
_MATMUL_SCORES_BF16 = 1 << 24


def attend(
    q_BLC: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int, *, causal: bool = False, exact: bool = False
) -> Tensor:
    """Multi-head attention of ``q`` over ``k`` and ``v``, channels grouped by head: softmax(q·kᵀ/√d)·v -> BLC.

    Args:
        heads: number of heads; divides C.
        causal: each token sees itself and those before it (L = M).
        exact: never round the scores to 16 bits.
    """
    if _prefer_matmul(q_BLC, k_BMC, heads, exact):
        return _matmul_attention(q_BLC, k_BMC, v_BMC, heads, causal)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BLC, k_BMC, v_BMC))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def _prefer_matmul(q_BLC: Tensor, k_BMC: Tensor, heads: int, exact: bool) -> bool:
    if q_BLC.device.type != "cpu":
        return False
    (batch, queries, _), keys = q_BLC.shape, k_BMC.shape[1]
    if q_BLC.dtype == torch.bfloat16:
        return not exact and batch * heads * queries * keys <= _MATMUL_SCORES_BF16
    return q_BLC.dtype == torch.float32 and keys <= _SHORT_TEXT


def _matmul_attention(q_BLC: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int, causal: bool) -> Tensor:
    batch, queries, channels = q_BLC.shape
    width = channels // heads
    q, k, v = (
        x.unflatten(-1, (heads, width)).transpose(1, 2).reshape(batch * heads, -1, width) for x in (q_BLC, k_BMC, v_BMC)
    )
    bias = q.new_zeros(1, 1, 1)
    if causal:
        bias = q.new_full((queries, queries), -torch.inf).triu_(1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=int(causal), alpha=width**-0.5)
    mixed = torch.bmm(scores.softmax(-1), v)
    return mixed.view(batch, heads, queries, width).transpose(1, 2).reshape(batch, queries, channels)
