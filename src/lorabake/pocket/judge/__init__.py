"""The judge of the pocket world: which attributes and which invented features does a picture show?

judge = Judge.load()
judge.accuracy(images, [drawing.labels for drawing in drawings]).mean
Detectors.load().rate(images, "star antenna")
"""

from lorabake.pocket.judge.attributes import Accuracy, Judge
from lorabake.pocket.judge.detectors import DetectorQuality, Detectors, measure_detectors, train_detectors
from lorabake.pocket.judge.training import measure_judge, train_judge

__all__ = [
    "Accuracy",
    "DetectorQuality",
    "Detectors",
    "Judge",
    "measure_detectors",
    "measure_judge",
    "train_detectors",
    "train_judge",
]
