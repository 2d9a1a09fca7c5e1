"""Faces in the pictures of a dataset, cached by content: looking for them takes far longer than reading where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lorabake.dataset.augment import Box
from lorabake.dataset.faces import detector_name, find_faces
from lorabake.dataset.folder import Sample
from lorabake.train.packs import read_packs, write_pack


def cached_faces(
    samples: Sequence[Sample],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    not_kept: Callable[[str], None] = lambda reason: None,
) -> list[list[Box]]:
    """The faces in each sample's picture, the largest first, looking only at pictures that the cache does not know.

    Args:
        folder: where the cache is. It may be deleted at any time.
        progress: told (done, total) of the pictures that are looked at; an error it raises ends the work, keeping what is done.
        not_kept: told why the cache cannot be written; the work goes on without it.

    Raises:
        MissingExtra: OpenCV is not installed.
        UnreadableImage: a picture cannot be read.
    """
    home = folder / detector_name()
    known = read_packs(home, {sample.sha256 for sample in samples})
    missing = list({sample.sha256: sample.path for sample in samples if sample.sha256 not in known}.items())
    fresh: dict[str, Tensor] = {}
    try:
        looked = find_faces([path for _, path in missing])
        for done, ((sha256, _), boxes) in enumerate(zip(missing, looked, strict=True), 1):
            fresh[sha256] = torch.tensor(boxes, dtype=torch.int32).reshape(-1, 4)
            progress(done, len(missing))
    finally:
        if fresh:
            write_pack(home, fresh, not_kept)
    known |= fresh
    return [[cast(Box, tuple(box)) for box in known[sample.sha256].tolist()] for sample in samples]
