"""The loss of every picture over a run, made comparable: which pictures stay hard, whatever noise they were met with.

A loss says first of all how much noise there was, and only then how well a picture is known. So each is compared with the mean loss of
all pictures at about the same timestep: 1 is usual, 2 twice as hard. Everything is read from the log, so that a run that was stopped
and continued has the same table.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorabake.base.events import Event
from lorabake.dataset.order import Batch

_WIDTH = 50
"""Timesteps that are taken for alike."""
COLUMNS = ("picture", "kind", "seen", "loss", "relative", "error", "relative_late")


@dataclass(frozen=True, slots=True)
class PictureLoss:
    """One picture's losses."""

    picture: str
    kind: str
    """``training`` or ``regularisation``."""
    seen: int
    """How often it was trained on."""
    loss: float
    """Mean, before weights of regularisation pictures."""
    relative: float
    """Its losses over what is usual at their timesteps."""
    error: float
    """Standard error of it."""
    relative_late: float | None
    """The same over the second half of the run; None if it was not seen there."""

    @property
    def stands_out(self) -> bool:
        """Whether it is harder than most, beyond chance."""
        return self.relative - 2 * self.error > 1


Met = tuple[float, float, bool]
"""One meeting with a picture: its loss, what is usual at its timestep, and whether it was late."""


def picture_losses(events: Iterable[Event], names: Sequence[str], trained: int) -> list[PictureLoss]:
    """Every picture that was seen, the hardest first.

    Args:
        events: of the run; ``pictures`` of its steps are rows (index, timestep, loss).
        names: of all pictures; one that is seen at several sizes has its name several times.
        trained: how many of them, the first ones, are training pictures.
    """
    steps = [event for event in events if event["kind"] == "step" and event.get("pictures")]
    half = max((event["step"] for event in steps), default=0) / 2
    rows: list[tuple[int, float, float, bool]] = [
        (index, timestep, loss, event["step"] > half) for event in steps for index, timestep, loss in event["pictures"]
    ]
    levels: dict[int, list[float]] = defaultdict(list)
    for _, timestep, loss, _ in rows:
        levels[int(timestep // _WIDTH)].append(loss)
    usual = {level: sum(losses) / len(losses) for level, losses in levels.items()}
    first: dict[tuple[bool, str], int] = {}
    same = [first.setdefault((index < trained, name), index) for index, name in enumerate(names)]
    met: dict[int, list[Met]] = defaultdict(list)
    for index, timestep, loss, late in rows:
        met[same[index]].append((loss, usual[int(timestep // _WIDTH)], late))
    found = [_of_picture(names[index], index < trained, meetings) for index, meetings in sorted(met.items())]
    return sorted(found, key=lambda row: -row.relative)


def _of_picture(name: str, is_training: bool, met: Sequence[Met]) -> PictureLoss:
    relative = _relative(met)
    misses = math.sqrt(sum((loss - relative * usual) ** 2 for loss, usual, _ in met))
    spread = misses / (sum(usual for _, usual, _ in met) or 1.0)
    late = [meeting for meeting in met if meeting[2]]
    return PictureLoss(
        picture=name,
        kind="training" if is_training else "regularisation",
        seen=len(met),
        loss=sum(loss for loss, _, _ in met) / len(met),
        relative=relative,
        error=spread * math.sqrt(len(met) / (len(met) - 1)) if len(met) > 1 else math.inf,
        relative_late=_relative(late) if late else None,
    )


def _relative(met: Sequence[Met]) -> float:
    usual = sum(usual for _, usual, _ in met)
    return sum(loss for loss, _, _ in met) / usual if usual else 1.0


def as_csv(rows: Iterable[PictureLoss]) -> bytes:
    """The table, UTF-8."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in COLUMNS)
        table.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    return text.getvalue().encode("utf-8", "backslashreplace")


def by_picture(batches: Sequence[Batch], noted: Sequence[float]) -> list[tuple[int, float, float]]:
    """Sample, timestep and loss of each row, from what was noted of one batch after the other: losses, then timesteps."""
    rows: list[tuple[int, float, float]] = []
    for batch in batches if noted else ():
        losses, timesteps, noted = noted[: len(batch)], noted[len(batch) : 2 * len(batch)], noted[2 * len(batch) :]
        rows += [
            (index, float(f"{timestep:.6g}"), float(f"{loss:.6g}"))
            for index, timestep, loss in zip(batch, timesteps, losses, strict=True)
        ]
    return rows
