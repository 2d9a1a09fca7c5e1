"""Captions to conditioning, computed once where it cannot change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorabake.protocols.family import Conditioning, Model, Tokens


class TextSource:
    """What the denoiser is told of captions, as far as it can be known before a step; always on the CPU.

    Args:
        model: whose tokenizer and text encoder.
        trained: whether gradients must flow into the text encoder.
        repeating: whether the same captions come again and again, so that keeping their conditioning pays.
    """

    def __init__(self, model: Model, *, trained: bool, repeating: bool) -> None:
        self._model, self._trained, self._repeating = model, trained, repeating
        self._ids: dict[str, Tokens] = {}
        self._kept: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of a batch of captions where it is kept, else their token ids; :func:`conditioning_of` takes both."""
        if self._trained or not self._repeating:
            return self._tokens(captions)
        for caption in captions:
            if caption not in self._kept:  # one at a time: what is kept must not depend on what it was first met with
                with torch.no_grad():
                    fresh = self._model.encode_text(self._tokens([caption]))
                self._kept[caption] = {name: tensor[0].cpu() for name, tensor in fresh.items()}
        return _stacked([self._kept[caption] for caption in captions])

    def _tokens(self, captions: Sequence[str]) -> Tokens:
        if not self._repeating:
            return self._model.tokenize(captions)
        for caption in captions:
            if caption not in self._ids:
                self._ids[caption] = {name: ids[0] for name, ids in self._model.tokenize([caption]).items()}
        return _stacked([self._ids[caption] for caption in captions])


def conditioning_of(model: Model, told: Mapping[str, Tensor]) -> Conditioning:
    """What the denoiser is told: ``told``, with the token ids in it (under the names of parts) encoded."""
    ids = {part: told[part] for part in model.parts if part in told}
    known = {name: tensor for name, tensor in told.items() if name not in ids}
    return known | model.encode_text({**ids}) if ids else known


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
