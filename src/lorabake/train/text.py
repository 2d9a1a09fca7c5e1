"""Captions to conditioning, computed once where it cannot change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import lorabake
from lorabake.base.files import free_space
from lorabake.base.units import size
from lorabake.protocols.family import Conditioning, Model, Tokens
from lorabake.train.packs import read_pack, read_packs, write_pack

_PACK_BYTES = 1 << 28
"""About how much of a cache is in one file: what is lost at most when encoding is interrupted, and held in memory until it is written."""


class TextSource:
    """What the denoiser is told of captions, as far as it can be known before a step; always on the CPU.

    Args:
        model: whose tokenizer and text encoder.
        trained: whether gradients must flow into the text encoder.
        repeating: whether the same captions come again and again, so that keeping their conditioning pays.
        reading: what, beside token ids and the text encoders themselves, decides what they say: settings of the recipe.
    """

    def __init__(self, model: Model, *, trained: bool, repeating: bool, reading: object = None) -> None:
        self._model, self._trained, self._repeating, self._reading = model, trained, repeating, reading
        self._ids: dict[str, Tokens] = {}
        self._kept: dict[str, Conditioning] = {}

    @property
    def keeps(self) -> bool:
        """Whether captions are encoded once, so that the text encoders are not needed afterwards."""
        return self._repeating and not self._trained

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of a batch of captions where it is kept, else their token ids; :func:`conditioning_of` takes both."""
        if not self.keeps:
            return self._tokens(captions)
        for caption in captions:
            if caption not in self._kept:
                self._kept[caption] = self._encoded(caption)
        return _stacked([self._kept[caption] for caption in captions])

    def keep(
        self,
        captions: Iterable[str],
        folder: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
        not_kept: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Encode captions ahead, those that the cache does not hold; nothing where they are not kept at all.

        Memory does not grow with their number: what has been encoded is written, and mapped from its file.

        Args:
            captions: what will be asked.
            folder: where the cache is. It may be deleted at any time.
            progress: told (done, total) of those that have to be encoded; an error it raises ends the work, keeping what is done.
            not_kept: told once why the cache cannot be written; the work goes on without it.
        """
        if not self.keeps:
            return
        keys = {caption: self._key(caption) for caption in dict.fromkeys(captions) if caption not in self._kept}
        home: Path | None = folder / self._model.text_space[:16]
        self._take(keys, read_packs(home, _Names(keys.values())))
        missing = [caption for caption in keys if caption not in self._kept]
        waiting: dict[str, Conditioning] = {}
        try:
            for done, caption in enumerate(missing, 1):
                waiting[caption] = self._encoded(caption)
                if done == 1 and home and (lacking := _no_room(home, waiting[caption], len(missing))):
                    not_kept(lacking)
                    home = None
                progress(done, len(missing))
                if _bytes(waiting.values()) >= _PACK_BYTES:
                    home = self._write(home, keys, waiting, not_kept)
                    waiting = {}
        finally:
            self._write(home, keys, waiting, not_kept)

    def _write(
        self,
        folder: Path | None,
        keys: Mapping[str, str],
        encoded: Mapping[str, Conditioning],
        not_kept: Callable[[str], None],
    ) -> Path | None:
        """Keep what was encoded, in a file of ``folder`` if that is possible; returns ``folder`` if it was."""
        self._kept.update(encoded)
        if folder is None or not encoded:
            return folder
        tensors = {f"{keys[caption]}.{name}": row for caption, told in encoded.items() for name, row in told.items()}
        pack = write_pack(folder, tensors, not_kept)
        if pack is None:
            return None
        self._take({caption: keys[caption] for caption in encoded}, read_pack(pack, tensors.keys()))
        return folder

    def _take(self, keys: Mapping[str, str], found: Mapping[str, Tensor]) -> None:
        """Keep what a cache holds of captions."""
        by_key: dict[str, Conditioning] = {}
        for name, row in found.items():
            key, _, what = name.partition(".")
            by_key.setdefault(key, {})[what] = row
        self._kept.update({caption: by_key[key] for caption, key in keys.items() if key in by_key})

    def _key(self, caption: str) -> str:
        """Content key (hex) of what the text encoders say of a caption: all that it depends on, beside their weights."""
        told = {part: ids.tolist() for part, ids in sorted(self._model.tokenize([caption]).items())}
        model = self._model
        facts = (told, self._reading, model.text_space, model.dtype, model.device.type, torch.get_num_threads())
        return hashlib.sha256(repr((lorabake.__version__, *facts)).encode()).hexdigest()[:32]

    def _encoded(self, caption: str) -> Conditioning:
        """One at a time: what is kept must not depend on what it was first met with."""
        with torch.no_grad():
            fresh = self._model.encode_text(self._tokens([caption]))
        return {name: tensor[0].cpu() for name, tensor in fresh.items()}

    def _tokens(self, captions: Sequence[str]) -> Tokens:
        if not self._repeating:
            return self._model.tokenize(captions)
        for caption in captions:
            if caption not in self._ids:
                self._ids[caption] = {name: ids[0] for name, ids in self._model.tokenize([caption]).items()}
        return _stacked([self._ids[caption] for caption in captions])


class _Names:
    """The names in a pack of the tensors of some keys: the key, a dot, and whatever the family calls it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(keys)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.partition(".")[0] in self._keys


def conditioning_of(model: Model, told: Mapping[str, Tensor]) -> Conditioning:
    """What the denoiser is told: ``told``, with the token ids in it (under the names of parts) encoded."""
    ids = {part: told[part] for part in model.parts if part in told}
    known = {name: tensor for name, tensor in told.items() if name not in ids}
    return known | model.encode_text({**ids}) if ids else known


def _no_room(folder: Path, one: Conditioning, count: int) -> str:
    """Why that many of the kind of ``one`` had better not be written into ``folder``; empty if they fit."""
    needed, free = _bytes([one]) * count, free_space(folder)
    return f"They need about {size(needed)}, and {size(free)} are free at {folder}." if needed > free else ""


def _bytes(told: Iterable[Conditioning]) -> int:
    return sum(row.nbytes for tensors in told for row in tensors.values())


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
