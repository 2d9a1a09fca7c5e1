"""Latents, cached by content.

A latent's key is a hash of everything it depends on: the picture's bytes, how it is resized and cropped, whether it is mirrored, the
VAE's own bytes, and the type and device it computes in. So an edited picture can never meet an old latent, and deleting the cache costs only time.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.base.files import free_space
from lorabake.base.machine import cores
from lorabake.base.streams import torch_stream
from lorabake.base.units import size
from lorabake.dataset.augment import Tint, tinted
from lorabake.dataset.buckets import Placement, fit
from lorabake.dataset.folder import Sample
from lorabake.dataset.image import read_rgb
from lorabake.protocols.family import Framing, Model
from lorabake.train.packs import read_pack, read_packs, write_pack

_PACK = 512
"""Latents per file of the cache: few files for large sets, and little lost when encoding is interrupted."""
_PIXELS_AT_ONCE = 1 << 20
"""Pixels encoded at the same time: 4 pictures of 512 x 512. An autoencoder of usual width needs about 2.5 GB for them."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class View:
    """One way a picture is seen in training."""

    sample: Sample
    placement: Placement
    mirrored: bool
    tint: Tint | None = None
    """How its colours are changed; None leaves them as they are."""

    @property
    def framing(self) -> Framing:
        """What a model may be told of it: a mirrored picture lost on its left what the file has on its right."""
        place = self.placement
        left, top, right, bottom = place.crop_ltrb
        width = place.resized_wh[0]
        return Framing(self.sample.size, (width - right if self.mirrored else left, top), (right - left, bottom - top))

    def key(self, encoder: str) -> str:
        """Content key of this view's latent (hex). ``encoder`` says what encodes it, and in which numbers."""
        place = self.placement
        facts = (self.sample.sha256, place.resized_wh, place.crop_ltrb, self.mirrored, encoder)
        facts += (self.tint,) if self.tint else ()
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def cached_latents(
    views: Sequence[View],
    model: Model,
    folder: Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    not_kept: Callable[[str], None] = lambda reason: None,
) -> list[Tensor]:
    """The latent of each view, float32 on the CPU, encoding only what the cache does not hold, on all cores.

    Memory does not grow with the number of pictures: what has been encoded is written, and mapped from its file.

    Args:
        views: what to encode.
        model: whose VAE encodes.
        folder: where the cache is kept; None keeps it in memory only.
        not_kept: told once why the cache cannot be written; the work goes on without it.
        progress: told (done, total) of those that have to be encoded; an error it raises ends the work, keeping what is done.

    Raises:
        UserError: a latent is not finite; the message names the picture.
    """
    space = model.latent_space
    keys = [_key(view, model) for view in views]
    home = folder / space[:16] if folder else None
    found = read_packs(home, set(keys)) if home else {}
    missing = list({key: view for key, view in zip(keys, views, strict=True) if key not in found}.items())
    if home and (lacking := _no_room(home, [view for _, view in missing], model)):
        not_kept(lacking)
        home = None
    done = 0
    for jobs, (workers, threads) in _packs(missing):
        fresh: dict[str, Tensor] = {}
        pack: Path | None = None
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
                for key, latents_CHW in _encoded(jobs, model, pool, 2 * workers):
                    fresh[key] = latents_CHW
                    done += 1
                    progress(done, len(missing))
        finally:
            torch.set_num_threads(before)
            if home and fresh:
                pack = write_pack(home, fresh, not_kept)
                home = home if pack else None
        found.update(read_pack(pack, fresh.keys()) if pack else _gathered(fresh))
    return [found[key] for key in keys]


def _key(view: View, model: Model) -> str:
    """Of the view's latent in the cache. On a CPU the threads are in it: sums in another order may differ in the last bit."""
    threads = f" {_division(view)[1]}" if model.device.type == "cpu" else ""
    return view.key(f"{model.latent_space} {model.dtype} {model.device.type}{threads}")


def _packs(missing: Sequence[tuple[str, View]]) -> Iterator[tuple[list[tuple[str, View]], tuple[int, int]]]:
    """What is encoded together and written as one file, each with how it is divided among the cores."""
    alike: dict[tuple[int, int], list[tuple[str, View]]] = {}
    for key, view in missing:
        alike.setdefault(_division(view), []).append((key, view))
    for division, jobs in alike.items():
        for start in range(0, len(jobs), _PACK):
            yield jobs[start : start + _PACK], division


def _no_room(folder: Path, views: Sequence[View], model: Model) -> str:
    """Why the latents of ``views`` had better not be written into ``folder``; empty if they fit."""
    facts, pixels = model.facts, sum(math.prod(view.placement.bucket_wh) for view in views)
    needed, free = 4 * facts.latent_channels * pixels // facts.latent_scale**2, free_space(folder)
    return f"They need about {size(needed)}, and {size(free)} are free at {folder}." if needed > free else ""


def fresh_latent(view: View, pixels_HWC: Pixels, model: Model) -> Tensor:
    """The latent of one view with these pixels, encoded now and not kept, float32 on the CPU.

    Raises:
        UserError: it is not finite; the message names the picture.
    """
    return _encode_pixels(view, pixels_HWC, view.key(f"{model.latent_space} {model.dtype} {model.device.type}"), model)


def pixels_of(view: View) -> Pixels:
    """What is seen of a picture, before it is mirrored: 8 bits, HWC.

    Raises:
        UnreadableImage: the picture is gone or broken by now.
    """
    image = fit(read_rgb(view.sample.path), view.placement)
    return np.array(tinted(image, view.tint) if view.tint else image)


def _division(view: View) -> tuple[int, int]:
    """How many pictures of this one's size are encoded at once, and the threads of each: many small ones on a core each, or large ones on
    several. It depends on nothing else, so that another picture in the dataset never changes this one's latent."""
    workers = max(1, min(cores(), _PIXELS_AT_ONCE // math.prod(view.placement.bucket_wh)))
    return workers, max(1, cores() // workers)


def _encoded(
    jobs: Iterable[tuple[str, View]], model: Model, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[str, Tensor]]:
    """Latents in order, never more than ``ahead`` of them waiting. What was not begun when the caller stops is dropped."""
    waiting: deque[tuple[str, Future[Tensor]]] = deque()
    try:
        for key, view in jobs:
            waiting.append((key, pool.submit(_encode, view, key, model)))
            if len(waiting) > ahead:
                key, latents = waiting.popleft()
                yield key, latents.result()
        while waiting:
            key, latents = waiting.popleft()
            yield key, latents.result()
    finally:
        for _, latents in waiting:
            latents.cancel()


def _encode(view: View, key: str, model: Model) -> Tensor:
    return _encode_pixels(view, pixels_of(view), key, model)


def _encode_pixels(view: View, pixels_HWC: Pixels, key: str, model: Model) -> Tensor:
    """One picture at a time: sums in a batch may differ in the last bit, and the same picture must always give the same latent."""
    shades_HWC = torch.from_numpy(pixels_HWC).float() / 127.5 - 1
    images_BCHW = shades_HWC.permute(2, 0, 1)[None]
    if view.mirrored:
        images_BCHW = images_BCHW.flip(3)
    latents_CHW = model.encode_images(images_BCHW, torch_stream(0, key))[0].float().cpu()
    if not torch.isfinite(latents_CHW).all():
        raise UserError(
            f"{view.sample.name}: the VAE gives NaN or infinity for this picture. Train with precision fp32, or take the picture out."
        )
    return latents_CHW


def _gathered(latents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in one block of memory per shape.

    Small tensors that outlive the encoder's large ones leave the heap full of holes: 200 kB a picture instead of 4.
    """
    by_shape: dict[torch.Size, list[str]] = {}
    for key, tensor in latents.items():
        by_shape.setdefault(tensor.shape, []).append(key)
    blocks = {shape: torch.stack([latents[key] for key in keys]) for shape, keys in by_shape.items()}
    return {key: row for shape, keys in by_shape.items() for key, row in zip(keys, blocks[shape], strict=True)}
