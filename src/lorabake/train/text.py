"""Captions to conditioning, computed once where it cannot change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorabake.protocols.family import Conditioning, Model, Tokens


class TextSource:
    """Conditioning of captions.

    Args:
        model: whose tokenizer and text encoder.
        trained: whether gradients must flow into the text encoder.
        repeating: whether the same captions come again and again, so that keeping their conditioning pays.
    """

    def __init__(self, model: Model, *, trained: bool, repeating: bool) -> None:
        self._model, self._trained, self._repeating = model, trained, repeating
        self._ids: dict[str, Tokens] = {}
        self._kept: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Conditioning of a batch of captions."""
        if self._trained:
            return self._model.encode_text(self._tokens(captions))
        with torch.no_grad():
            if not self._repeating:
                return self._model.encode_text(self._tokens(captions))
            for caption in captions:
                if (
                    caption not in self._kept
                ):  # one at a time: what is kept must not depend on what it was first met with
                    fresh = self._model.encode_text(self._tokens([caption]))
                    self._kept[caption] = {name: tensor[0] for name, tensor in fresh.items()}
            rows = [self._kept[caption] for caption in captions]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _tokens(self, captions: Sequence[str]) -> Tokens:
        if not self._repeating:
            return self._model.tokenize(captions)
        for caption in captions:
            if caption not in self._ids:
                self._ids[caption] = {name: ids[0] for name, ids in self._model.tokenize([caption]).items()}
        rows = [self._ids[caption] for caption in captions]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
