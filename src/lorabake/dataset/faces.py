"""Finding faces, with the detector of Viola and Jones (CVPR 2001) that OpenCV brings along: quick, and made for photographs.

It finds upright faces that look at the camera. Drawn faces it finds less often.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorabake.base.errors import MissingExtra
from lorabake.dataset.augment import Box
from lorabake.dataset.image import read_rgb

EXTRA = "faces"
_WHAT = "data.augment.face_crop"
_LONGEST = 640
"""Pixels of the side that faces are looked for at: the time it takes does not grow with the picture."""
_SMALLEST = 1 / 16
"""Of the shorter side: smaller finds are mostly patterns."""
_NEIGHBOURS = 5
"""Overlapping finds that make a face; fewer find more, and more that is none."""
_local = threading.local()


def require_faces() -> None:
    """Raises MissingExtra where faces cannot be looked for."""
    if importlib.util.find_spec("cv2") is None:
        raise MissingExtra(_WHAT, EXTRA)


def find_faces(paths: Sequence[Path]) -> Iterator[list[Box]]:
    """The faces in each picture in turn, the largest first, in pixels of the upright picture. Who stops asking stops the search.

    Raises:
        MissingExtra: OpenCV is not installed.
        UnreadableImage: a picture cannot be read.
    """
    require_faces()
    pool = ThreadPoolExecutor(max_workers=4)
    try:
        yield from pool.map(lambda path: faces_in(read_rgb(path)), paths)
    finally:
        pool.shutdown(cancel_futures=True)


def detector_name() -> str:
    """What finds the faces, and how: under another name other faces may be found in the same picture."""
    import cv2

    return f"frontalface-{cv2.__version__}-{_LONGEST}-{_SMALLEST}-{_NEIGHBOURS}"


def faces_in(image: Image.Image) -> list[Box]:
    """The same for one picture (RGB)."""
    scale = min(1.0, _LONGEST / max(image.size))
    small = (
        image
        if scale == 1
        else image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BOX)
    )
    grey_HW = np.asarray(small.convert("L"))
    least = max(16, round(min(small.size) * _SMALLEST))
    found = _detector().detectMultiScale(grey_HW, scaleFactor=1.1, minNeighbors=_NEIGHBOURS, minSize=(least, least))
    boxes = [tuple(int(side / scale) for side in box) for box in found]
    return sorted(((left, top, width, height) for left, top, width, height in boxes), key=lambda box: (-box[2], box))


def _detector() -> Any:
    """This thread's own: a detector holds what it works on."""
    if not hasattr(_local, "detector"):
        import cv2

        cv2.setNumThreads(1)  # several would find the same faces in another order, and pictures share the cores already
        folder = Path(cv2.__file__).parent / "data"
        _local.detector = cv2.CascadeClassifier(str(folder / "haarcascade_frontalface_default.xml"))
    return _local.detector
