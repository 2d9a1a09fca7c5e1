"""The files that belong to a picture: its caption and its mask."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from lorabake.base.errors import Problem
from lorabake.dataset.caption_file import UnreadableCaption, read_caption
from lorabake.dataset.scan import MASK_FOLDER, MASK_SUFFIX, Listing, PictureFile, PictureFolder, Scan, named


class Captions:
    """Finds the caption of each picture and remembers what is worth telling about them."""

    def __init__(self, extensions: Sequence[str], class_tokens: str | None, every_line: bool = False) -> None:
        self.problems: list[Problem] = []
        self._extensions = extensions
        self._class_tokens = class_tokens
        self._every_line = every_line
        self._pictures_of: dict[Path, list[str]] = {}
        self._texts: dict[Path, str] = {}
        self._missing: dict[str, list[str]] = {}
        self._many_lines: list[str] = []

    def of(self, picture: PictureFile) -> tuple[str, str]:
        """(caption, where it is from). A file that is not text becomes one of ``problems``."""
        for extension in self._extensions:
            if path := picture.folder.listing.find(picture.stem + extension):
                self._pictures_of.setdefault(path, []).append(picture.name)
                return self._text(path, picture), extension.lstrip(".").lower()
        if picture.folder.class_tokens:
            text, source = picture.folder.class_tokens, "folder"
        elif self._class_tokens is not None:
            text, source = self._class_tokens, "class_tokens"
        else:
            text, source = "", "none"
        self._missing.setdefault(source, []).append(picture.name)
        return text, source

    def _text(self, path: Path, picture: PictureFile) -> str:
        if path not in self._texts:
            try:
                caption = read_caption(path)
            except UnreadableCaption as error:
                where = f"{picture.folder.name}/{path.name}".lstrip("/")
                self.problems.append(Problem(where, error.reason))
                self._texts[path] = ""
                return ""
            self._texts[path] = caption.lines if self._every_line else caption.text
            if caption.unused_lines and not self._every_line:
                self._many_lines.append(path.name)
        return self._texts[path]

    def notes(self, found: Scan, total: int) -> Iterator[str]:
        """Counted facts about the captions of ``total`` usable pictures."""
        instead = {
            "folder": "their folder's name is their caption",
            "none": "they train with an empty prompt",
            "class_tokens": f"their caption is '{self._class_tokens}'",
        }
        for source, names in self._missing.items():
            yield f"{len(names)} of {total} pictures have no caption file, so {instead[source]}: {named(names)}."
        empty = [name for path, names in self._pictures_of.items() if not self._texts[path] for name in names]
        if empty:
            what = "have an empty caption file and train with an empty prompt"
            yield f"{len(empty)} of {total} pictures {what}: {named(empty)}."
        if self._many_lines:
            count = len(self._many_lines)
            yield f"{count} caption files have more than one line; only the first is used: {named(self._many_lines)}."
        for path, names in self._pictures_of.items():
            if len(names) > 1:
                yield f"{named(names)} share the caption {path.name}."
        if orphans := list(_orphans(found, self._extensions)):
            yield f"{len(orphans)} caption files belong to no picture: {named(orphans)}."

    def warnings(self, total: int) -> Iterator[Problem]:
        """What is legal and almost always a mistake."""
        if sum(map(len, self._missing.values())) == total and self._class_tokens is None:
            looked = " or ".join(self._extensions)
            what = f"none of the {total} pictures has a caption file ({looked} with the picture's name)"
            yield Problem("captions", f"{what}. Write one for each: a .txt file of the same name beside the picture.")
        elif not self._missing and not any(self._texts.values()):
            yield Problem(
                "captions", f"the caption files of all {total} pictures are empty. Write captions, or delete the files."
            )


def _orphans(found: Scan, extensions: Sequence[str]) -> Iterator[str]:
    """Caption files in folders with pictures whose stem is no picture's, used or not."""
    stems: dict[str, set[str]] = {}
    for picture in found.pictures:
        stems.setdefault(picture.folder.name, set()).add(_nfc(picture.stem))
    for folder in found.folders:
        for name in folder.listing.files:
            path = PurePath(name)
            if path.suffix.lower() in extensions and _nfc(path.stem) not in stems.get(folder.name, {_nfc(path.stem)}):
                yield f"{folder.name}/{name}".lstrip("/")


class Masks:
    """Finds the mask of each picture. For ``10_suzu/001.png`` the first of these that exists:

    ``10_suzu/001-masklabel.png``, ``10_suzu/masks/001.png``, ``masks/10_suzu/001.png``, ``masks/001.png``.
    """

    def __init__(self, top: Listing) -> None:
        self._top = _mask_folder(top)
        self._of_folder: dict[str, list[Listing]] = {}
        self._pictures_of: dict[Path, list[str]] = {}

    def of(self, picture: PictureFile) -> Path | None:
        """The mask of ``picture``, or None."""
        mask = picture.folder.listing.find(picture.stem + MASK_SUFFIX)
        for listing in self._folders(picture.folder):
            mask = mask or listing.find(picture.stem + ".png")
        if mask:
            self._pictures_of.setdefault(mask, []).append(picture.name)
        return mask

    def _folders(self, folder: PictureFolder) -> list[Listing]:
        if folder.name not in self._of_folder:
            own = [_mask_folder(folder.listing)] if folder.name else []
            same = [_listing(self._top.path / folder.name)] if folder.name and self._top else []
            self._of_folder[folder.name] = [listing for listing in (*own, *same, self._top) if listing]
        return self._of_folder[folder.name]

    def notes(self) -> Iterator[str]:
        """Masks that more than one picture would use."""
        for mask, names in self._pictures_of.items():
            if len(names) > 1:
                yield f"{named(names)} share the mask {mask.name}."


def _mask_folder(listing: Listing) -> Listing | None:
    name = next((name for name in listing.folders if name.lower() == MASK_FOLDER), None)
    return _listing(listing.path / name) if name else None


def _listing(path: Path) -> Listing | None:
    try:
        return Listing(path)
    except OSError:
        return None


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
