"""Where masks lie, as sd-scripts has to be told it: for each folder of pictures one folder with a mask for every picture, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorabake.dataset.companions import Masks
from lorabake.dataset.scan import MASK_FOLDER, PICTURE_EXTENSIONS, scan


def mask_folders(folders: Sequence[str]) -> dict[Path, Path] | str:
    """The folder of masks by folder of pictures, or why sd-scripts cannot be told one. Those of pictures that are not here are believed to be in ``masks``."""
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            found[folder] = folder / MASK_FOLDER
            continue
        for pictures, masks in _masks_in(folder).items():
            place = _place(masks)
            if isinstance(place, str):
                return f"{pictures}: {place}"
            found[pictures] = place
    return found or "there are no pictures."


def _masks_in(folder: Path) -> dict[Path, dict[str, Path | None]]:
    """Masks by folder and stem of their pictures, as training finds them."""
    scanned = scan(folder, ())
    masks = Masks(scanned.top)
    found: dict[Path, dict[str, Path | None]] = {}
    for picture in scanned.pictures:
        found.setdefault(picture.folder.listing.path, {})[picture.stem] = masks.of(picture)
    return found


def _place(masks: Mapping[str, Path | None]) -> Path | str:
    """The folder that holds exactly these masks, or why there is none."""
    lacking = [stem for stem, mask in masks.items() if mask is None]
    if lacking:
        return f"{lacking[0]} has no mask."
    named = {(mask.parent, mask.stem == stem) for stem, mask in masks.items() if mask}
    folders = {folder for folder, _ in named}
    if len(folders) > 1 or not all(same for _, same in named):
        return "its masks are in several folders, or are not called as their pictures."
    place = folders.pop()
    others = {item.stem for item in place.iterdir() if item.suffix.lower() in PICTURE_EXTENSIONS} - masks.keys()
    return f"{place} holds masks of other pictures too." if others else place
