"""The pocket world as an ordinary dataset folder: what the embedded model is trained on from nothing.

    folder/pocket-world.json       what was rendered; says "complete": true once everything is there
    folder/1_world000/00000.png    picture 0
    folder/1_world000/00000.txt    its caption
    folder/1_world001/01000.png    a folder holds 1000 pictures

Picture k depends on the seed and k alone, so a rendering can be interrupted, continued and made longer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from lorabake.base.errors import UserError
from lorabake.base.files import PART, write_json
from lorabake.dataset.wholeness import looks_whole
from lorabake.pocket.cast import cast_without
from lorabake.pocket.world import SIZES, SUBJECT, Drawing, caption, draw, invented_name, sample, vocabulary

MANIFEST = "pocket-world.json"
WORKERS = 2
_PER_FOLDER = 1000
_PER_JOB = 100
_PRUNED = 0.8
"""Share of named people's captions that leave their looks to the name."""


@dataclass(frozen=True)
class World:
    """Which pictures are rendered; the same values give the same pictures and captions.

    Raises:
        UserError: a share or a size that is not allowed, or an axis or value to hold out that does not exist.
    """

    seed: int = 0
    hold_out: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Values that must not occur, by axis: ``{"background": {"beach"}}``."""
    invented_names: float = 0.04
    """Share of captions with a made-up name in them. It means nothing, so that an unknown word does little before it is trained."""
    named: float = 0.2
    """Share of pictures that show somebody of the `cast`, called by name."""
    size: int = 64
    """Pixels along a side."""

    def __post_init__(self) -> None:
        for share in ("invented_names", "named"):
            if not 0 <= getattr(self, share) <= 1:
                raise UserError(f"{share} is {getattr(self, share)}; it is a share: give 0 to 1.")
        if self.size not in SIZES:
            raise UserError(
                f"Pictures of the pocket world have {SIZES[0]} or {SIZES[1]} pixels a side, not {self.size}."
            )
        sample(random.Random(0), self.hold_out)

    def picture(self, index: int) -> tuple[Drawing, str]:
        """Picture number ``index`` and its caption: all its tags in random order, or a name for some of them."""
        rng = random.Random(f"{self.seed}/{index}")
        known = cast_without(self.hold_out)
        if known and rng.random() < self.named:
            somebody = rng.choice(known)
            drawing = draw(somebody.spec(rng, self.hold_out), rng.getrandbits(32), self.size)
            untold = somebody.own_tags() | {SUBJECT} if rng.random() < _PRUNED else frozenset[str]()
            return drawing, caption([tag for tag in drawing.tags if tag not in untold], rng, name=somebody.name)
        drawing = draw(sample(rng, self.hold_out), rng.getrandbits(32), self.size)
        name = invented_name(rng) if rng.random() < self.invented_names else None
        return drawing, caption(drawing.tags, rng, name=name)

    def to_dict(self) -> dict[str, object]:
        """For the manifest; equal worlds give equal dictionaries, and so do only equal drawing rules."""
        rules = hashlib.sha256(b"".join(self.picture(index)[0].image.tobytes() for index in range(4))).hexdigest()
        return {
            **asdict(self),
            "hold_out": {axis: sorted(held) for axis, held in self.hold_out.items()},
            "first_pictures": rules,
        }


@dataclass(frozen=True, slots=True)
class Rendering:
    """A finished rendering."""

    folder: Path
    pictures: int
    drawn: int
    """How many of them were not there before."""


def render_dataset(
    folder: Path,
    count: int,
    seed: int = 0,
    *,
    hold_out: Mapping[str, Collection[str]] | None = None,
    invented_names: float = 0.04,
    named: float = 0.2,
    size: int = 64,
    workers: int = WORKERS,
    progress: Callable[[int, int], None] | None = None,
) -> Rendering:
    """Render pictures of the world with captions into ``folder``; what is there and whole is kept.

    Args:
        folder: new, or an earlier rendering of the same world (of any length up to ``count``).
        count: number of pictures; 1000 take about two seconds on each core.
        seed, hold_out, invented_names, named, size: see `World`.
        workers: processes; 1 draws in this one. Scripts that start more need the usual ``if __name__ == "__main__"``.
        progress: called as ``progress(done, count)``.

    Raises:
        UserError: the folder holds something else, or more pictures than ``count``; or the world cannot be so.
    """
    if count < 1 or workers < 1:
        raise UserError(f"{count} pictures cannot be rendered by {workers} processes; give at least 1 of both.")
    world = World(seed, {axis: tuple(held) for axis, held in (hold_out or {}).items()}, invented_names, named, size)
    settings = world.to_dict()
    _claim(folder, settings, count)
    jobs = [(world, folder, start, min(start + _PER_JOB, count)) for start in range(0, count, _PER_JOB)]
    done = drawn = 0
    tags: Counter[str] = Counter()
    with contextlib.closing(_results(jobs, workers)) as results:
        for result in results:
            done, drawn = done + result.pictures, drawn + result.drawn
            tags.update(result.tags)
            if progress:
                progress(done, count)
    known = {tag: tags[tag] for tag in vocabulary() if tags[tag]}
    write_json(folder / MANIFEST, {"complete": True, "pictures": count, "world": settings, "tags": known})
    return Rendering(folder, count, drawn)


def picture_path(folder: Path, index: int) -> Path:
    """Where picture number ``index`` lies; its caption lies beside it as ``.txt``."""
    return folder / f"1_world{index // _PER_FOLDER:03d}" / f"{index:05d}.png"


@dataclass(frozen=True, slots=True)
class _Result:
    pictures: int
    drawn: int
    tags: Counter[str]


_Job = tuple[World, Path, int, int]


def _claim(folder: Path, settings: Mapping[str, object], count: int) -> None:
    """Make the folder this rendering's own, or find that it is already."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{manifest} cannot be read: {error}. Give a new folder.") from error
        if found.get("world") != settings:
            raise UserError(f"{folder} holds pictures of another pocket world (see {MANIFEST}). Give a new folder.")
        if found.get("pictures", 0) > count:
            raise UserError(
                f"{folder} is for {found['pictures']} pictures, more than {count}. Give that number or more, or a new folder."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no {MANIFEST}. Give a new folder.")
    write_json(manifest, {"complete": False, "pictures": count, "world": settings})


def _results(jobs: Sequence[_Job], workers: int) -> Generator[_Result, None, None]:
    if min(workers, len(jobs)) == 1:
        yield from map(_render, jobs)
        return
    # Fresh processes: forking one that has threads (torch's, say) can hang.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap(_render, jobs)


def _render(job: _Job) -> _Result:
    """Draw what is missing in a range of pictures."""
    world, folder, start, end = job
    drawn, tags = 0, Counter[str]()
    for index in range(start, end):
        path = picture_path(folder, index)
        text = _whole_caption(path)
        if text is None:
            drawing, text = world.picture(index)
            _write(path, drawing.image, text)
            drawn += 1
        tags.update(text.split(", "))
    return _Result(end - start, drawn, tags)


def _whole_caption(path: Path) -> str | None:
    """The caption of a picture, if both files are there to the last byte."""
    try:
        with path.open("rb") as file:
            if not looks_whole(file, "PNG"):
                return None
        text = path.with_suffix(".txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text[:-1] if text.endswith("\n") else None


def _write(path: Path, image: Image.Image, text: str) -> None:
    """Both files, each aside and then renamed. Without waiting for the disk each time: a rendering looks at its files again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + PART)
    image.save(beside, format="PNG")
    os.replace(beside, path)
    beside.write_bytes(f"{text}\n".encode())
    os.replace(beside, path.with_suffix(".txt"))
