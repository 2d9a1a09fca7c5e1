"""Looking through a dataset folder, so that every file in it is used, ignored by rule, or dropped with a reason.

A dataset called mira may hold:

    mira/                   pictures here repeat once per epoch
    mira/10_suzu/001.png    a numbered folder: 10 repeats, class tokens "suzu" (kohya's convention)
    mira/10_suzu/001.txt    the caption of 001.png
    mira/extra/002.png      any other folder: 1 repeat
    mira/masks/…            masks with the names of their pictures
    mira/.lorabake/         ours; like everything hidden, not looked at
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from lorabake.base.errors import Problem
from lorabake.base.files import PART

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".gif")
"""File name endings of pictures, in any letter case."""

MASK_FOLDER = "masks"
MASK_SUFFIX = "-masklabel.png"
"""What follows a picture's stem in the name of a mask that lies beside it (OneTrainer's convention)."""

_IGNORED_EXTENSIONS = (".txt", ".caption", ".json", ".jsonl", ".toml", ".md", ".npz", PART)
_IGNORED_NAMES = ("thumbs.db", "desktop.ini")
_NUMBERED = re.compile(r"([+-]?[0-9]+)(?:_(.*))?", re.DOTALL)
_MAX_REPEATS = 10_000
_UNUSUAL_REPEATS = 500


@dataclass(frozen=True, slots=True)
class Dropped:
    """A file or folder that is not used, and why."""

    path: Path
    reason: str


class Listing:
    """The names in one folder, found by stem and extension whatever their letter case or Unicode normal form."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folders: list[str] = []
        self.files: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (self.folders if entry.is_dir() else self.files).append(entry.name)
        self.folders.sort(key=name_order)
        self.files.sort(key=name_order)
        self._exact = set(self.files)
        self._alike: dict[str, str] = {}
        for name in self.files:
            self._alike.setdefault(_alike(name), name)

    def find(self, name: str) -> Path | None:
        """The file called ``name``; failing that one whose name differs only in normal form or in the case of its extension."""
        found = name if name in self._exact else self._alike.get(_alike(name))
        return self.path / found if found is not None else None


@dataclass(frozen=True, slots=True)
class PictureFolder:
    """A folder whose pictures are used."""

    name: str
    """Its name inside the dataset; "" for the dataset itself."""
    repeats: int
    class_tokens: str
    """The part of a numbered folder's name behind the number, else ""."""
    listing: Listing


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file that by its name is a picture; its content has not been looked at."""

    folder: PictureFolder
    file_name: str

    @property
    def path(self) -> Path:
        return self.folder.listing.path / self.file_name

    @property
    def stem(self) -> str:
        return PurePath(self.file_name).stem

    @property
    def name(self) -> str:
        """Path inside the dataset, with "/" on every system."""
        return f"{self.folder.name}/{self.file_name}" if self.folder.name else self.file_name


@dataclass
class Scan:
    """Everything met in a dataset folder."""

    top: Listing
    folders: list[PictureFolder] = field(default_factory=list)
    pictures: list[PictureFile] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    """Names of all files looked at, of any kind."""


def scan(root: Path, caption_extensions: Sequence[str], number_counts: bool = False) -> Scan:
    """Look through ``root`` and the folders directly in it. Pictures come in the order of their names (see
    `name_order`). With ``number_counts`` a number in front of the root's own name is its pictures' repeats.

    Raises:
        OSError: ``root`` itself cannot be listed.
    """
    top = Listing(root)
    found = Scan(top)
    if counts := _counts(found, root.name) if number_counts else (1, ""):
        _take(found, PictureFolder("", *counts, top), caption_extensions)
    for name in top.folders:
        if name.lower() != MASK_FOLDER:
            _take_folder(found, root / name, caption_extensions)
    found.pictures.sort(key=lambda picture: name_order(picture.name))
    _add_notes(found, root, number_counts)
    return found


def name_order(name: str) -> tuple[str, str]:
    """Sort key: by code points of the NFC form, so that a copy made on another system is in the same order."""
    return unicodedata.normalize("NFC", name), name


def named(names: Iterable[str], limit: int = 5) -> str:
    """``a.png, b.png and 3 more``."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def printable(name: str) -> str:
    """``name`` with bytes that are not valid text written out, so that it can be shown and encoded."""
    return name.encode("utf-8", "backslashreplace").decode()


def _take_folder(found: Scan, path: Path, caption_extensions: Sequence[str]) -> None:
    if not _is_text(path.name):
        found.dropped.append(Dropped(path, "its name is not valid text. Rename it."))
        return
    try:
        listing = Listing(path)
    except OSError as error:
        found.problems.append(Problem(path.name, f"the folder cannot be read: {error.strerror}."))
        return
    counts = _counts(found, path.name)
    if counts is None:
        return
    _take(found, PictureFolder(path.name, *counts, listing), caption_extensions)
    for name in listing.folders:
        if name.lower() != MASK_FOLDER:
            _drop_nested(found, path / name)


def _counts(found: Scan, name: str) -> tuple[int, str] | None:
    """Repeats and class tokens by a folder's name; None, and a problem, where it asks for repeats that cannot be."""
    numbered = _NUMBERED.fullmatch(name)
    if not numbered:
        return 1, ""
    repeats = int(numbered[1])
    if not 1 <= repeats <= _MAX_REPEATS:
        allowed = f"1 to {_MAX_REPEATS} are allowed"
        what = f"its name asks for {repeats} repeats; {allowed}. Rename it, or move it out of the dataset."
        found.problems.append(Problem(name, what))
        return None
    return repeats, numbered[2] or ""


def _take(found: Scan, folder: PictureFolder, caption_extensions: Sequence[str]) -> None:
    """Sort the files of one folder into pictures, ignored and dropped."""
    pictures = []
    found.file_names += folder.listing.files
    for name in folder.listing.files:
        suffix = PurePath(name).suffix.lower()
        if not _is_text(name):
            found.dropped.append(Dropped(folder.listing.path / name, "its name is not valid text. Rename it."))
        elif suffix in PICTURE_EXTENSIONS:
            if not _is_mask(name, folder.listing):
                pictures.append(PictureFile(folder, name))
        elif suffix not in (*caption_extensions, *_IGNORED_EXTENSIONS) and name.lower() not in _IGNORED_NAMES:
            reason = f"not a picture this tool reads ({suffix or 'no extension'})"
            found.dropped.append(Dropped(folder.listing.path / name, reason))
    if pictures or _NUMBERED.fullmatch(folder.name):
        found.folders.append(folder)
    found.pictures += pictures


def _drop_nested(found: Scan, path: Path) -> None:
    """Account for a folder inside a folder, which no trainer looks into."""
    try:
        listing = Listing(path)
    except OSError:
        found.dropped.append(Dropped(path, "a folder inside a folder, which cannot be read"))
        return
    count = sum(PurePath(name).suffix.lower() in PICTURE_EXTENSIONS for name in listing.files)
    if count or listing.folders:
        what = f"a folder inside a folder is not read; it holds {count} picture{'s' * (count != 1)}. Move it up."
        found.dropped.append(Dropped(path, what))


def _add_notes(found: Scan, root: Path, number_counts: bool) -> None:
    used = {picture.folder.name for picture in found.pictures}
    for folder in found.folders:
        count = sum(picture.folder is folder for picture in found.pictures)
        pictures = f"{count} picture{'s' * (count != 1)}"
        if folder.name not in used:
            found.notes.append(f"Folder {folder.name} holds no pictures.")
        elif folder.name and not _NUMBERED.fullmatch(folder.name):
            found.notes.append(
                f"Folder {folder.name} has no number in front, so its {pictures} are used with 1 repeat."
            )
        elif not folder.name and number_counts and _NUMBERED.fullmatch(root.name):
            pass
        elif not folder.name and len(used) > 1:
            found.notes.append(f"{pictures} directly in {root.name} are used with 1 repeat.")
        elif not folder.name and _NUMBERED.fullmatch(root.name):
            found.notes.append(
                f"{root.name} was opened itself: its pictures have 1 repeat. Open the folder above to use its number."
            )
        if folder.repeats >= _UNUSUAL_REPEATS:
            what = f"its name asks for {folder.repeats} repeats. If that is a year or a count, rename the folder."
            found.warnings.append(Problem(folder.name or root.name, what))


def _is_mask(name: str, listing: Listing) -> bool:
    """Whether ``name`` is the mask of a picture beside it."""
    if not name.lower().endswith(MASK_SUFFIX):
        return False
    stem = name[: -len(MASK_SUFFIX)]
    return any(listing.find(stem + extension) for extension in PICTURE_EXTENSIONS)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _alike(name: str) -> str:
    path = PurePath(unicodedata.normalize("NFC", name))
    return path.stem + path.suffix.lower()
