"""The Dataset noun: a folder of pictures and captions, opened, checked and accounted for.

The files are the truth: opening reads every byte of every picture (its sha256 is what caches are keyed by), changes
nothing, and reports everything that is wrong at once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lorabake.base.errors import Problem, Problems
from lorabake.base.files import sha256_file
from lorabake.base.machine import cores
from lorabake.base.places import expanded
from lorabake.dataset.companions import Captions, Masks
from lorabake.dataset.image import Header, UnreadableImage, examine
from lorabake.dataset.scan import PICTURE_EXTENSIONS, Dropped, PictureFile, Scan, named, printable, scan

_FORMATS = {extension: extension[1:].upper() for extension in PICTURE_EXTENSIONS} | {".jpg": "JPEG"}
"""What a file is expected to hold, by its ending."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture of a dataset with all that training needs to know about it."""

    path: Path
    name: str
    """Path inside the dataset, with "/" on every system: ``10_suzu/001.png``."""
    folder: str
    """Name of the folder inside the dataset it lies in; "" for the dataset itself."""
    repeats: int
    """How often it is trained on per epoch."""
    caption: str
    """The first line of its file; where every line was asked for all of them, with "\\n" between."""
    caption_source: str
    """Where the caption is from: the extension of its file without the dot ("txt", "caption"), "folder" (the folder's
    name), "class_tokens" (given to `open_dataset`) or "none"."""
    width: int
    """Pixels, once upright."""
    height: int
    """Pixels, once upright."""
    sha256: str
    """Of the bytes of the file, in hex."""
    mask: Path | None
    """A mask for it, if there is one. See `lorabake.dataset.masks` for what is read of it."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, once upright."""
        return self.width, self.height


@dataclass(frozen=True)
class Dataset:
    """A dataset folder as it was when it was opened. Samples are in the order of their names."""

    path: Path
    samples: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]
    """Everything met that is not used, with reasons. Captions, side files and hidden files are not listed."""
    notes: tuple[str, ...]
    """Counted facts worth showing."""
    warnings: tuple[Problem, ...]
    """Legal, and almost always a mistake; the caller decides whether to stop."""
    more_paths: tuple[Path, ...] = ()
    """Further folders that belong to it. Its own is the one where its cache lies."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def entries(self) -> int:
        """Pictures per epoch, repeats included."""
        return sum(sample.repeats for sample in self.samples)

    def account(self) -> str:
        """In one line how many pictures are used, folder by folder if there are several, and how much is not."""
        folders = Counter((sample.folder, sample.repeats) for sample in self.samples)
        each = ", ".join(
            f"{count} in {printable(folder or self.path.name)} × {repeats}"
            for (folder, repeats), count in folders.items()
        )
        used = f"{len(self)} used" + (f" ({each})" if len(folders) > 1 else "")
        return f"{used}, {len(self.dropped)} not" if self.dropped else used

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """{folder: {tag: pictures that have it}}, as ``ss_tag_frequency`` in LoRA files counts: captions cut at ",",
        lower case, repeats not counted in. Folders are named without their path, so that no private path is
        published."""
        frequency: dict[str, dict[str, int]] = {}
        for sample in self.samples:
            tags = frequency.setdefault(sample.folder or self.path.name, {})
            lines = sample.caption.lower().split("\n")
            listed = [tag for line in lines for tag in line.split(",")]
            for tag in listed if len(lines) == 1 else dict.fromkeys(map(str.strip, listed)):
                if tag := tag.strip():
                    tags[tag] = tags.get(tag, 0) + 1
        return frequency

    def summary(self) -> dict[str, Any]:
        """The dataset in numbers, ready for JSON. Paths are inside the dataset."""
        folders: dict[str, dict[str, int]] = {}
        for sample in self.samples:
            row = folders.setdefault(sample.folder, {"pictures": 0, "repeats": sample.repeats, "entries": 0})
            row["pictures"] += 1
            row["entries"] += sample.repeats
        sizes = Counter(sample.size for sample in self.samples)
        return {
            "name": self.path.name,
            "pictures": len(self.samples),
            "entries_per_epoch": self.entries,
            "folders": folders,
            "captions": dict(sorted(Counter(sample.caption_source for sample in self.samples).items())),
            "masks": sum(sample.mask is not None for sample in self.samples),
            "sizes": {f"{width}x{height}": count for (width, height), count in sorted(sizes.items())},
            "dropped": [{"name": self._inside(item.path), "reason": item.reason} for item in self.dropped],
            "notes": list(self.notes),
            "warnings": [{"where": item.where, "what": item.what} for item in self.warnings],
        }

    def _inside(self, path: Path) -> str:
        """``path`` inside the folder it lies in, to be shown; of several folders with that folder's name."""
        root = next(root for root in (self.path, *self.more_paths) if root in path.parents)
        return printable(path.relative_to(root.parent if self.more_paths else root).as_posix())


def open_dataset(
    path: str | os.PathLike[str],
    *,
    caption_extensions: Sequence[str] = (".txt", ".caption"),
    class_tokens: str | None = None,
    every_line: bool = False,
    number_counts: bool = False,
) -> Dataset:
    """Open a folder of pictures: numbered folders (``10_suzu/``), other folders and pictures directly in it (1 repeat each).

    A caption is the first line of the picture's ``.txt``, else ``.caption``. An empty file is an empty prompt. Without
    a file the caption is the name part of a numbered folder or, failing that, ``class_tokens``, or "".

    Args:
        path: the dataset folder.
        caption_extensions: endings of caption files, the first that exists wins.
        class_tokens: caption of pictures that have no caption file, in folders whose name gives them none.
        every_line: captions are all lines of their file and not only the first.
        number_counts: pictures directly in the folder have the repeats and class tokens that its own name says.

    Raises:
        Problems: the folder is missing or holds no usable picture, a caption is not text, a folder asks for no repeats …:
            all at once.
    """
    root = Path(os.path.abspath(expanded(path)))  # "." has no name; links stay as they are
    found = _scan(root, caption_extensions, number_counts)
    looks = _look_at_all(found.pictures)
    usable = [(picture, look) for picture, look in zip(found.pictures, looks, strict=True) if isinstance(look, _Look)]
    dropped = (*found.dropped, *(look for look in looks if isinstance(look, Dropped)))
    captions, masks = Captions(caption_extensions, class_tokens, every_line), Masks(found.top)
    samples = tuple(_sample(picture, look, *captions.of(picture), masks.of(picture)) for picture, look in usable)
    problems = [*found.problems, *captions.problems]
    if not samples:
        problems.append(Problem("pictures", _nothing_usable(found, dropped)))
    if problems:
        raise Problems(str(root), problems)
    notes = (
        *found.notes,
        *captions.notes(found, len(samples)),
        *masks.notes(),
        *_format_notes(usable),
        *_drop_notes(dropped),
    )
    return Dataset(root, samples, dropped, notes, (*found.warnings, *captions.warnings(len(samples))))


@dataclass(frozen=True, slots=True)
class _Look:
    """What reading a picture file tells about it."""

    header: Header
    sha256: str


def _scan(root: Path, caption_extensions: Sequence[str], number_counts: bool) -> Scan:
    wrong = [given for given in caption_extensions if not given.startswith(".") or given in PICTURE_EXTENSIONS]
    if wrong:
        raise Problems("caption_extensions", [Problem(given, "is not an ending such as '.txt'") for given in wrong])
    try:
        return scan(root, caption_extensions, number_counts)
    except FileNotFoundError:
        what = "there is no such folder. Check the spelling; a dataset is a folder with pictures in it."
    except NotADirectoryError:
        what = f"is a file. Give the folder that holds it: {root.parent}"
    except OSError as error:
        what = f"the folder cannot be read: {error.strerror}."
    raise Problems(str(root), [Problem("folder", what)])


def _look_at_all(pictures: Sequence[PictureFile]) -> list[_Look | Dropped]:
    """Read every picture. Threads pay because hashing and waiting for the disk both leave the interpreter free."""

    def look(picture: PictureFile) -> _Look | Dropped:
        try:
            return _Look(examine(picture.path), sha256_file(picture.path))
        except UnreadableImage as error:
            return Dropped(picture.path, error.reason)
        except OSError as error:
            return Dropped(picture.path, f"the system says: {error.strerror}")

    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        return list(pool.map(look, pictures))


def _sample(picture: PictureFile, look: _Look, caption: str, source: str, mask: Path | None) -> Sample:
    return Sample(
        path=picture.path,
        name=picture.name,
        folder=picture.folder.name,
        repeats=picture.folder.repeats,
        caption=caption,
        caption_source=source,
        width=look.header.width,
        height=look.header.height,
        sha256=look.sha256,
        mask=mask,
    )


def _nothing_usable(found: Scan, dropped: Sequence[Dropped]) -> str:
    """Why there is no picture: what was looked for, and what was found instead."""
    endings = " ".join(PICTURE_EXTENSIONS)
    if found.pictures:
        unreadable = dropped[len(found.dropped) :]
        reasons = "; ".join(f"{item.path.name}: {item.reason}" for item in unreadable[:5])
        return f"none of the {len(found.pictures)} pictures can be used. {reasons}"
    kinds = Counter(PurePath(name).suffix.lower() or "no extension" for name in found.file_names)
    instead = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5)) or "no files at all"
    folders = [item for item in dropped if item.path.is_dir()]
    nested = f" {folders[0].path}: {folders[0].reason}" if folders else ""
    return f"no pictures ({endings}) in this folder or the folders in it. Found instead: {instead}.{nested}"


def _format_notes(usable: Sequence[tuple[PictureFile, _Look]]) -> Iterator[str]:
    """Pictures whose name says another format than their content."""
    called = [
        (picture, _FORMATS[PurePath(picture.file_name).suffix.lower()], look.header.format) for picture, look in usable
    ]
    wrong = [f"{picture.name} is {content}" for picture, name, content in called if name != content]
    if wrong:
        yield f"{len(wrong)} pictures are not what their name says, and are read by content: {named(wrong)}."


def _drop_notes(dropped: Sequence[Dropped]) -> Iterator[str]:
    if dropped:
        items = named([f"{item.path.name} ({item.reason})" for item in dropped])
        yield f"{len(dropped)} files or folders are not used: {items}"
