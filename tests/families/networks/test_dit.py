"""Shared pieces of diffusion transformers, against values worked out by hand."""

from __future__ import annotations

import math

import torch

from lorabake.families.networks.dit import modulated_norm, patches, rotary_turns, turned, unpatched


def test_patches_are_squares_row_by_row_with_a_channels_cells_together() -> None:
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    tokens = patches(latents)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
    assert tokens[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]
    assert tokens[0, 3].tolist() == [12, 13, 18, 19, 36, 37, 42, 43]
    assert torch.equal(unpatched(tokens, 4, 6), latents)


def test_turns() -> None:
    turns = rotary_turns(torch.tensor([[0, 0], [3, 5]]), (4, 2), theta=100.0)
    assert torch.equal(turns.cos_LP[0], torch.ones(3)) and torch.equal(turns.sin_LP[0], torch.zeros(3))
    angles = [3.0, 3.0 / 10, 5.0]  # the first axis has two pairs, theta ** -(0, 2) / 4
    torch.testing.assert_close(turns.cos_LP[1], torch.tensor([math.cos(angle) for angle in angles]))
    torch.testing.assert_close(turns.sin_LP[1], torch.tensor([math.sin(angle) for angle in angles]))


def test_scores_of_turned_vectors_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(6).double(), torch.randn(6).double()
    turns = rotary_turns(torch.tensor([[0, 0, 0], [2, 3, 1], [4, 1, 9], [6, 4, 10]]), (2, 2, 2))
    q, k = (turned(vector.expand(1, 4, 1, 6), turns)[0, :, 0] for vector in (q, k))
    torch.testing.assert_close(q[0] @ k[1], q[2] @ k[3], rtol=1e-5, atol=1e-5)
    assert (q[0] @ k[1] - q[0] @ k[2]).abs() > 0.1


def test_turning_by_a_right_angle() -> None:
    turns = rotary_turns(torch.tensor([[math.pi / 2]]), (2,))
    torch.testing.assert_close(turned(torch.tensor([[[[3.0, 4.0]]]]), turns), torch.tensor([[[[-4.0, 3.0]]]]))


def test_modulated_norm() -> None:
    given = modulated_norm(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.5, -0.5]]]), torch.tensor([[[1.0, 2.0]]]))
    torch.testing.assert_close(given, torch.tensor([[[-1.5, 2.5]]]), rtol=1e-5, atol=1e-5)
