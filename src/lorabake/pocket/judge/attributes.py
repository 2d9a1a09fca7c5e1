"""The judge: reads every axis of the pocket world from pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.pocket.judge.network import AttributeNet, to_input
from lorabake.pocket.judge.weights import SHIPPED, load_network, read_about, save_network
from lorabake.pocket.world import axes, label_row

Labels = Sequence[Mapping[str, "int | None"]] | npt.NDArray[np.integer]
_BATCH = 128
_NOTHING = -1


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers among the labels that are valid."""

    per_axis: dict[str, float]
    """NaN for axes without a valid label."""
    mean: float
    """Over all valid labels of all axes."""
    counts: dict[str, int]
    """Valid labels of each axis."""


class Judge:
    """Classifies 64 x 64 pictures of the pocket world on all axes."""

    def __init__(self, network: AttributeNet) -> None:
        """A judge with a trained network."""
        self.network = network.eval()

    @classmethod
    def load(cls, path: Path | None = None) -> Judge:
        """The judge shipped with lorabake, or the one saved at `path`.

        Raises:
            UserError: the file is missing, or was trained on other axes than the world has now.
        """
        path = path or SHIPPED / "attributes.safetensors"
        about = read_about(path)
        if about.get("axes") != {axis: list(values) for axis, values in axes.items()}:
            raise UserError(f"The judge at {path} knows other axes than the pocket world has. Train it again.")
        network = AttributeNet([len(values) for values in axes.values()])
        load_network(network, path)
        return cls(network)

    def save(self, path: Path, measured: Accuracy | None = None) -> None:
        """Write the weights (fp16, about 2 MB), with the accuracy they were measured to have."""
        about: dict[str, object] = {"axes": {axis: list(values) for axis, values in axes.items()}}
        if measured:
            about["ceiling"] = {axis: round(value, 4) for axis, value in measured.per_axis.items()}
            about["mean"] = round(measured.mean, 4)
        save_network(self.network, path, about)

    def attributes(
        self, images_NHWC: npt.NDArray[np.uint8]
    ) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """The likeliest value (its index) and its probability for every axis: int64 [N], float32 [N].

        Raises:
            UserError: the pictures are not uint8 [N, 64, 64, 3] (or a multiple of 64).
        """
        answers = {}
        for axis, logits_NV in zip(axes, self.logits(to_input(images_NHWC)), strict=True):
            probability, index = logits_NV.softmax(-1).max(-1)
            answers[axis] = (index.numpy(), probability.numpy())
        return answers

    @torch.no_grad()
    def logits(self, pictures_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits for every axis, [B, values], of pictures in -1..1."""
        rows = [self.network(batch) for batch in pictures_BCHW.split(_BATCH)]
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))

    def accuracy(self, images_NHWC: npt.NDArray[np.uint8], labels: Labels) -> Accuracy:
        """How often pictures show what their labels say; labels that are None or -1 do not count.

        Args:
            images_NHWC: uint8 [N, 64, 64, 3].
            labels: `Drawing.labels` of each picture, or the rows of `label_row`: int [N, axes].
        """
        truth_NA = labels if isinstance(labels, np.ndarray) else np.stack([label_row(row) for row in labels])
        if len(truth_NA) != len(images_NHWC):
            raise UserError(f"{len(images_NHWC)} pictures cannot be scored with {len(truth_NA)} rows of labels.")
        guess_NA = np.stack([index for index, _ in self.attributes(images_NHWC).values()], axis=-1)
        valid_NA, right_NA = truth_NA != _NOTHING, guess_NA == truth_NA
        counts = {axis: int(valid_NA[:, place].sum()) for place, axis in enumerate(axes)}
        per_axis = {
            axis: float(right_NA[valid_NA[:, place], place].mean()) if counts[axis] else float("nan")
            for place, axis in enumerate(axes)
        }
        return Accuracy(per_axis, float(right_NA[valid_NA].mean()) if valid_NA.any() else float("nan"), counts)
