"""Diag-OFT and BOFT: which blocks layers get, that what they do are rotations, and what they do in half precision and at strengths between."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lorabake.adapters import graft, graft_file
from lorabake.adapters._rotations import turns
from lorabake.adapters.boft import Boft, BoftSettings
from lorabake.adapters.diag_oft import DiagOft, DiagOftSettings
from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.formats.metadata import TrainingFacts
from lorabake.protocols.family import Layer

TYPES: list[Any] = [DiagOft, Boft]
both = pytest.mark.parametrize("kind", TYPES)


def blocks(shape: tuple[int, ...], size: float = 0.3, seed: int = 3) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(kind: Any, outputs: int, block: int, alpha: float = 0.0, size: float = 0.3) -> dict[str, Tensor]:
    return {"oft_blocks": blocks(kind().shape(outputs, block), size), "alpha": torch.tensor(alpha)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (DiagOftSettings(), {(320, 8): 8, (320, 7): 5, (18, 4): 3, (12, 6): 3, (17, 16): 0, (1280, 64): 32, (4, 2): 2}),
        (BoftSettings(), {(320, 16): 10, (320, 8): 0, (768, 16): 12, (512, 16): 16, (12, 12): 12, (18, 17): 0}),
    ],
)
def test_a_layer_gets_the_largest_block_that_its_outputs_allow(
    settings: Any, expected: dict[tuple[int, int], int]
) -> None:
    assert {key: settings.fitted(*key) for key in expected} == expected


@both
@pytest.mark.parametrize("block", [4, 2])
def test_outputs_are_rotated_and_nothing_else(kind: Any, block: int) -> None:
    """The weights of any two inputs keep their lengths and the angle between them."""
    weight = torch.randn(32, 7, generator=torch.Generator().manual_seed(1))
    rotated = kind().changed(weight, tensors(kind, 32, block), 1.0)
    assert (rotated - weight).abs().max() > 0.1
    torch.testing.assert_close(rotated.t() @ rotated, weight.t() @ weight, rtol=1e-5, atol=1e-5)


def test_in_a_butterfly_every_output_mixes_with_every_other() -> None:
    rotation = Boft().changed(torch.eye(64), tensors(Boft, 64, 4), 1.0)
    assert (rotation == 0).sum() == 0
    alone = DiagOft().changed(torch.eye(64), tensors(DiagOft, 64, 4), 1.0)
    torch.testing.assert_close(alone, torch.block_diag(*(alone[i : i + 4, i : i + 4] for i in range(0, 64, 4))))


def test_cayleys_rotation_by_hand() -> None:
    """Of two outputs: tan(angle / 2) = q."""
    q = 0.25
    turn = turns(torch.tensor([[[0.0, q], [0.0, 0.0]]]), 0.0, of_one=3)[0]
    angle = 2 * torch.atan(torch.tensor(q))
    expected = torch.tensor([[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]]) - torch.eye(2)
    torch.testing.assert_close(turn, expected)


@both
def test_a_constraint_bounds_how_far_a_layer_is_rotated(kind: Any) -> None:
    weight, outputs, bound = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), 16, 0.01
    free, bounded = (kind().change(weight, tensors(kind, outputs, 4, alpha)) for alpha in (0.0, bound))
    assert bounded.norm() < 2.1 * bound * outputs * weight.norm() < free.norm() * 2.1
    idle = kind().change(weight, tensors(kind, outputs, 4, 100.0))
    torch.testing.assert_close(idle, free)
    given = tensors(kind, outputs, 4, bound)
    q = given["oft_blocks"] - given["oft_blocks"].mT
    scaled = {"oft_blocks": given["oft_blocks"] * (bound * outputs / q.norm()), "alpha": torch.tensor(0.0)}
    torch.testing.assert_close(bounded, kind().change(weight, scaled), rtol=1e-5, atol=1e-6)


def test_a_multiplier_goes_into_every_stage_of_a_butterfly() -> None:
    given, m = tensors(Boft, 8, 4), 0.4
    assert given["oft_blocks"].shape[:2] == (2, 2)
    weight = torch.eye(8)
    turn = turns(given["oft_blocks"], 0.0, of_one=4)
    first, second = (torch.eye(8) + m * torch.block_diag(*stage) for stage in turn)
    near = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])  # stage 0 brings together what is 2 apart, in each group of 4
    far = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    expected = weight
    for stage, places in ((first, near), (second, far)):
        expected = (stage @ expected[places])[torch.argsort(places)]
    torch.testing.assert_close(Boft().changed(weight, given, m), expected)
    assert torch.equal(Boft().changed(weight, given, 0.0), weight)


@both
@pytest.mark.parametrize("cells", [3, 400])
def test_few_cells_and_many_are_computed_two_ways_with_one_result(kind: Any, cells: int) -> None:
    """In the product where there are few, in the weight where there are many."""
    for base, x in (
        (nn.Linear(6, 32), torch.randn(cells, 6)),
        (nn.Conv2d(3, 32, 3, padding=1), torch.randn(1, 3, cells, 4)),
        (nn.Conv2d(3, 32, 3, padding=1), torch.randn(2, 3, cells, 4).contiguous(memory_format=torch.channels_last)),
    ):
        base.requires_grad_(False)
        given = tensors(kind, 32, 4)
        factors = 1 + blocks((32, *(1 for _ in base.weight.shape[1:])), 0.1)
        given["rescale"] = factors
        given["oft_blocks"].requires_grad_()
        results = []
        for out in (
            kind().forward(base, x, given, 0.7, DiagOftSettings(), True),
            torch.func.functional_call(base, {"weight": kind().changed(base.weight, given, 0.7)}, (x,)),
        ):
            results.append((out, torch.autograd.grad((out * out.detach().cos()).sum(), given["oft_blocks"])[0]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("cells", [4, 200])
def test_small_rotations_are_not_rounded_away_in_half_precision(kind: Any, cells: int) -> None:
    base = nn.Linear(16, 32, bias=False).requires_grad_(False)
    given, x = tensors(kind, 32, 4, size=3e-4), torch.randn(cells, 16)
    expected = x @ kind().change(base.weight, given).t()
    half = base.bfloat16()
    weighting = torch.randn(cells, 32)
    given["oft_blocks"].requires_grad_()
    out = kind().forward(half, x.bfloat16(), given, 1.0, DiagOftSettings(), True)
    (gradient,) = torch.autograd.grad((out.float() * weighting).sum(), given["oft_blocks"])
    (exact,) = torch.autograd.grad(
        ((x @ kind().change(half.weight.float(), given).t()) * weighting).sum(), given["oft_blocks"]
    )
    assert (gradient - exact).norm() < 0.02 * exact.norm()
    moved = kind().added(half(x.bfloat16()).t(), given, 1.0).t().float()
    tolerance = 0.02 if kind is DiagOft else 0.05
    assert (moved - expected).norm() < tolerance * expected.norm()


@both
def test_layers_are_left_out_by_table_and_by_what_they_are(kind: Any) -> None:
    settings: Any = {DiagOft: DiagOftSettings, Boft: BoftSettings}[kind]
    name = {DiagOft: "oft", Boft: "boft"}[kind]

    def sizes(**given: Any) -> dict[str, int]:
        made: Any = graft(load_model("pocket"), name, settings(**given), seed=1, parts=("denoiser",))
        return {layer.change.layer.key: layer.tensors["oft_blocks"].shape[-1] for layer in made.layers}

    usual = sizes(block_size=4)
    assert usual and set(usual.values()) == {4}
    chosen = sizes(block_size=4, block_sizes={"attn1": 2, "attn2": 0})
    assert {key: size for key, size in chosen.items() if "attn1" not in key} == {
        key: size for key, size in usual.items() if "attn1" not in key and "attn2" not in key
    }
    assert {size for key, size in chosen.items() if "attn1" in key} == {2}
    assert usual.keys() < sizes(block_size=4, conv_block_size=4).keys()
    with pytest.raises(UserError, match="nowhere"):
        sizes(block_sizes={"nowhere": 0})
    for bad in ({"block_sizes": {"mid": 1}}, {"block_sizes": {"(": 4}}, {"block_size": 1}, {"constraint": 0.0}):
        with pytest.raises(ValueError):
            settings(**cast(Any, bad))


def test_a_file_with_few_large_blocks_is_read_as_it_is() -> None:
    """As kohya's scripts write them: a number of blocks is chosen there."""
    model = load_model("pocket")
    layer = next(layer for layer in model.layers() if layer.key.endswith("attn1_to_out_0"))
    base: Any = layer.module
    outputs, inputs = base.weight.shape
    given = {"oft_blocks": blocks((2, outputs // 2, outputs // 2), 0.02), "alpha": torch.tensor(0.0)}
    x = torch.randn(3, inputs)
    expected = nn.functional.linear(x, DiagOft().changed(base.weight, given, 1.0), base.bias)
    made: Any = graft_file(model, "oft", {layer.key: given})
    torch.testing.assert_close(made.layers[0](x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="expected"):
        graft_file(model, "oft", {layer.key: {**given, "oft_blocks": blocks((3, outputs // 2, outputs // 2))}})


@both
def test_other_trainers_are_told(kind: Any) -> None:
    settings: Any = {DiagOft: DiagOftSettings, Boft: BoftSettings}[kind]
    told = settings(block_size=6, conv_block_size=4, constraint=0.001, rescale=True).metadata()
    assert told["network_dim"] == 6
    assert told["network_args"] == {
        "algo": {DiagOft: "diag-oft", Boft: "boft"}[kind],
        "conv_dim": 4,
        "constraint": 0.001,
        "rescaled": True,
    }
    assert told.keys() <= set(TrainingFacts.__dataclass_fields__)


def test_layers_whose_outputs_have_no_divisor_are_left_alone() -> None:
    prime = Layer("denoiser", "x", nn.Linear(4, 17), "transformer", "lora_unet_x")
    assert not DiagOft().fits(prime, DiagOftSettings()) and not Boft().fits(prime, BoftSettings())
