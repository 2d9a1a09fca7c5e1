"""Norms against LyCORIS': the same weights give the same output and gradients, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lycoris.modules.norms import NormModule
from torch import Tensor

from lorabake.adapters import graft_file


def result(layer: Any, x: Tensor, named: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients by name."""
    out = layer(x)
    weighting = torch.linspace(-1, 1, out.numel()).view(out.shape)
    grads = torch.autograd.grad((out * weighting).sum(), list(named.values()))
    return out.detach(), dict(zip(named, grads, strict=True))


def test_norms_are_theirs(layers: Any) -> None:
    """Output, gradients and file. Theirs knows norms with a bias alone."""
    seen = 0
    for index, layer in enumerate(layers.layers()):
        base, x = layer.module, layers.inputs[index]
        if layer.group != "norm" or base.bias is None:
            continue
        theirs: Any = NormModule("layer", base, 1.0)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        saved = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
        assert saved.keys() == {"w_norm", "b_norm"}
        for strength in (1.0, 0.6):
            theirs.multiplier = strength
            theirs.apply_to()
            expected, expected_grads = result(base, x, dict(theirs.named_parameters()))
            theirs.restore()
            ours = graft_file(layers, "norm", {layer.key: saved}, strength)
            parameters = {name.rpartition(".")[2]: p for name, p in ours.parameters()["denoiser"].items()}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            out, grads = result(layers.root[index], x, parameters)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
            assert (expected - base(x)).abs().max() > 1e-2
            ours.remove()
        seen += 1
    assert seen == 2
