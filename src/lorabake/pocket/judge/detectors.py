"""Detectors: does a picture show an invented feature (an `Extra`), such as a star antenna?

They keep the judge's early layers as they are, so that they are small and quick to train. Hard negatives come from the
world itself: the same figure without the feature, other colours, hats, and all other features of the same detectors.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lorabake.base.errors import UserError, nearest
from lorabake.pocket.characters import CHARACTERS, Character
from lorabake.pocket.judge.attributes import Judge
from lorabake.pocket.judge.network import FeatureNet, to_input
from lorabake.pocket.judge.training import augment, learning_rate, rendered
from lorabake.pocket.judge.weights import SHIPPED, load_network, read_about, save_network
from lorabake.pocket.precision import autocast
from lorabake.pocket.world import Drawing, Spec, draw, sample

BATCH = 64
_UNKNOWN = -1
_FRESH = 1 << 41
_COLOUR_STYLES = {"style": ("monochrome",)}


@dataclass(frozen=True)
class DetectorQuality:
    """How a detector does on fresh pictures."""

    accuracy: float
    """Share of right answers where half of the pictures are of characters that may show the feature."""
    recall: float
    """Share found among the pictures that show it."""
    false_positives: float
    """Share claimed among ordinary pictures of the world, which never show it."""


class Detectors:
    """Yes-or-no answers about invented features, by name."""

    def __init__(self, features: Sequence[str], network: FeatureNet) -> None:
        """Detectors for `features`, in the order of the network's answers."""
        self.features = tuple(features)
        self.network = network.eval()

    @classmethod
    def load(cls, path: Path | None = None) -> Detectors:
        """The detectors of the shipped characters' features, or those saved at `path`.

        Raises:
            UserError: the file is missing or no file of detectors.
        """
        path = path or SHIPPED / "features.safetensors"
        about = read_about(path)
        if "features" not in about:
            raise UserError(f"{path} holds no detectors. Give a file saved by Detectors.save.")
        network = FeatureNet(len(about["features"]))
        load_network(network, path)
        return cls(about["features"], network)

    def save(self, path: Path, measured: Mapping[str, DetectorQuality] | None = None) -> None:
        """Write the weights (fp16), with the quality they were measured to have."""
        quality = {name: vars(row) for name, row in (measured or {}).items()}
        save_network(self.network, path, {"features": list(self.features), "quality": quality})

    @torch.no_grad()
    def probabilities(self, images_NHWC: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
        """How likely each picture (uint8 [N, 64, 64, 3]) shows each feature: float32 [N] by name."""
        batches = to_input(images_NHWC).split(128)
        logits_NF = torch.cat([self.network(batch) for batch in batches])
        columns = logits_NF.sigmoid().numpy().T
        return dict(zip(self.features, columns, strict=True))

    def rate(self, images_NHWC: npt.NDArray[np.uint8], feature: str) -> float:
        """The share of pictures that show `feature`.

        Raises:
            UserError: the detectors were not trained for it.
        """
        if feature not in self.features:
            raise UserError(f"No detector was trained for '{feature}'. {nearest(feature, self.features)}")
        return float((self.probabilities(images_NHWC)[feature] > 0.5).mean())


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch k: pictures uint8 [B, 64, 64, 3] and answers int64 [B, features] (1, 0, or -1 where nobody can tell)."""

    def __init__(self, characters: Sequence[Character], steps: int, seed: int) -> None:
        self._characters, self._steps, self._seed = characters, steps, seed
        self._features = features_of(characters)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self._seed}/{index}")
        drawings = [draw(_spec_for_training(self._characters, rng), rng.getrandbits(32)) for _ in range(BATCH)]
        pictures = np.stack([np.asarray(drawing.image) for drawing in drawings])
        answers = np.stack([_answers(drawing, self._features) for drawing in drawings])
        return torch.from_numpy(pictures), torch.from_numpy(answers)


def features_of(characters: Sequence[Character]) -> tuple[str, ...]:
    """Every feature of some characters once, in order."""
    return tuple(dict.fromkeys(feature for character in characters for feature in character.features))


def _spec_for_training(characters: Sequence[Character], rng: random.Random) -> Spec:
    """Half ordinary pictures, half with a mixture of a character's values, its extras and those of others."""
    if rng.random() < 0.35:
        return sample(rng)
    character = rng.choice(characters)
    fixes: dict[str, Any] = {axis: value for axis, value in character.fixes.items() if rng.random() < 0.65}
    chosen = {extra.feature: extra for extra in character.extras if rng.random() < 0.6}
    if rng.random() < 0.3:
        other = rng.choice(rng.choice(characters).extras)
        chosen.setdefault(other.feature, other)
    return sample(rng, _COLOUR_STYLES, **{**fixes, "extras": tuple(chosen.values())})


def _answers(drawing: Drawing, features: Sequence[str]) -> npt.NDArray[np.int64]:
    values = (drawing.features.get(feature, False) for feature in features)
    return np.array([_UNKNOWN if value is None else int(value) for value in values], np.int64)


def train_detectors(
    characters: Sequence[Character] | None = None, judge: Judge | None = None, steps: int = 1000, seed: int = 0
) -> Detectors:
    """Train detectors for every extra of some characters (the shipped ones unless given).

    Runs on one thread beside a worker process that draws; reproducible like `train_judge`.

    Raises:
        UserError: the characters have no extras.
    """
    characters = tuple(CHARACTERS.values()) if characters is None else characters
    features = features_of(characters)
    if not features:
        raise UserError("These characters have no extras to detect. Give at least one Character with extras.")
    judge = judge or Judge.load()
    early = judge.network.early.state_dict()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = FeatureNet(len(features)).train()
    network.early.load_state_dict(early)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1.0, weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)
    try:
        for step, (pictures, answers_BF) in enumerate(rendered(_Batches(characters, steps, seed))):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            with autocast():
                logits_BF = network(augment(to_input(pictures.numpy()), generator))
            optimizer.zero_grad()
            _answer_loss(logits_BF.float(), answers_BF).backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return Detectors(features, network)


def _answer_loss(logits_BF: Tensor, answers_BF: Tensor) -> Tensor:
    """Mean binary cross-entropy of the answers that are known."""
    known_BF = answers_BF != _UNKNOWN
    return nn.functional.binary_cross_entropy_with_logits(logits_BF[known_BF], answers_BF[known_BF].float())


def measure_detectors(
    detectors: Detectors, characters: Sequence[Character] | None = None, pictures: int = 1500, seed: int = 0
) -> dict[str, DetectorQuality]:
    """Quality on fresh, clean pictures: as many mixed ones as ordinary ones."""
    characters = tuple(CHARACTERS.values()) if characters is None else characters
    rng = random.Random(_FRESH + seed)
    mixed = [draw(_spec_for_training(characters, rng), rng.getrandbits(32)) for _ in range(pictures)]
    plain = [draw(sample(rng), rng.getrandbits(32)) for _ in range(pictures)]
    found_in_mixed, found_in_plain = (
        detectors.probabilities(np.stack([np.asarray(drawing.image) for drawing in drawings]))
        for drawings in (mixed, plain)
    )
    answers_NF = np.stack([_answers(drawing, detectors.features) for drawing in mixed])
    quality = {}
    for place, feature in enumerate(detectors.features):
        known = answers_NF[:, place] != _UNKNOWN
        truth = answers_NF[known, place] == 1
        claimed = found_in_mixed[feature][known] > 0.5
        quality[feature] = DetectorQuality(
            accuracy=float((claimed == truth).mean()),
            recall=float(claimed[truth].mean()),
            false_positives=float((found_in_plain[feature] > 0.5).mean()),
        )
    return quality
