"""Training the judge on pictures drawn while it learns. Reproducible: batch k of a seed is always the same."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lorabake.pocket.judge.attributes import Accuracy, Judge
from lorabake.pocket.judge.network import AttributeNet, to_input
from lorabake.pocket.precision import autocast
from lorabake.pocket.world import Spec, axes, draw, label_row, sample

BATCH = 64
PEAK_LEARNING_RATE = 2.5e-3
_WARM_UP = 100
_FRESH = 1 << 40
"""Pictures for measuring start at this seed, far from those of training."""


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch k: pictures uint8 [B, 64, 64, 3] and labels int64 [B, axes]."""

    def __init__(self, steps: int, seed: int) -> None:
        self._steps, self._seed = steps, seed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self._seed}/{index}")
        drawings = [draw(_spec_for_training(rng), rng.getrandbits(32)) for _ in range(BATCH)]
        pictures = np.stack([np.asarray(drawing.image) for drawing in drawings])
        labels = np.stack([label_row(drawing.labels) for drawing in drawings])
        return torch.from_numpy(pictures), torch.from_numpy(labels)


def _spec_for_training(rng: random.Random) -> Spec:
    """A sample in which what is rarely told (colours of skirts, pants, caps and bows) is told more often."""
    more: dict[str, Any] = {}
    if rng.random() < 0.25:
        more |= {"framing": "full body", "outfit": rng.choice(("skirt", "pants"))}
    if rng.random() < 0.25:
        more["headgear"] = rng.choice(("cap", "hair bow"))
    return sample(rng, **more)


def augment(pictures_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Make three of four pictures a little like a model's samples: soft, noisy, shifted, with colours slightly off."""
    count = len(pictures_BCHW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    changed = pictures_BCHW * uniform(0.88, 1.1, 1, 1, 1) + uniform(-0.07, 0.07, 3, 1, 1)
    soft = nn.functional.interpolate(nn.functional.avg_pool2d(changed, 2), scale_factor=2.0, mode="bilinear")
    changed = torch.lerp(changed, soft, uniform(-0.4, 0.8, 1, 1, 1).clamp(min=0))
    grain = torch.randn(changed.shape, generator=generator)
    coarse = nn.functional.interpolate(grain[..., ::4, ::4], scale_factor=4.0, mode="bilinear")
    changed = changed + grain * uniform(0, 0.08, 1, 1, 1) + coarse * uniform(0, 0.1, 1, 1, 1)
    down, right = (2 * torch.randint(-1, 2, (2,), generator=generator)).tolist()
    padded = nn.functional.pad(changed, (2, 2, 2, 2), mode="replicate")
    changed = padded[..., 2 + down : 66 + down, 2 + right : 66 + right]
    keep = uniform(0, 1, 1, 1, 1) < 0.25
    return torch.where(keep, pictures_BCHW, changed)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_judge(
    steps: int = 5000,
    seed: int = 0,
    start: Judge | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Judge:
    """Train a judge on `steps` batches of 64 pictures that one worker process draws.

    Runs on one thread beside the worker; the same steps, seed and start give the same judge on the same machine.

    Args:
        steps: 5000 from nothing, 2000 are enough after a small change of the world.
        seed: decides the first weights, the pictures and their distortions.
        start: a judge to go on from (it stays as it is) instead of from nothing.
        report: called with (step, loss) every 200 steps.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = AttributeNet([len(values) for values in axes.values()])
    if start is not None:
        network.load_state_dict(start.network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)
    try:
        for step, (pictures, labels_BA) in enumerate(rendered(_Batches(steps, seed))):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            inputs = augment(to_input(pictures.numpy()), generator).contiguous(memory_format=torch.channels_last)
            with autocast():
                logits = network(inputs)
            loss = axes_loss(logits, labels_BA)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report and step % 200 == 0:
                report(step, loss.item())
    finally:
        torch.set_num_threads(threads)
    return Judge(network)


def rendered(batches: Dataset[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order, drawn ahead by one worker process."""
    return iter(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4))


def axes_loss(logits: tuple[Tensor, ...], labels_BA: Tensor) -> Tensor:
    """Sum over axes of the mean cross-entropy of the valid labels (-1 is not valid)."""
    total = torch.zeros(())
    for place, logits_BV in enumerate(logits):
        labels_B = labels_BA[:, place]
        valid = labels_B >= 0
        if valid.any():
            total = total + nn.functional.cross_entropy(logits_BV[valid].float(), labels_B[valid])
    return total


def measure_judge(judge: Judge, pictures: int = 2000, seed: int = 0) -> Accuracy:
    """The judge's ceiling: its accuracy on fresh, clean pictures of the world."""
    rng = random.Random(_FRESH + seed)
    drawings = [draw(sample(rng), rng.getrandbits(32)) for _ in range(pictures)]
    images_NHWC = np.stack([np.asarray(drawing.image) for drawing in drawings])
    return judge.accuracy(images_NHWC, [drawing.labels for drawing in drawings])
