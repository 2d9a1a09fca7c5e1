"""Reading pictures: by content and never by name, within limits, whole or not at all.

Picture files come from strangers. Only six decoders can be reached, the size is checked before a pixel is decoded, and
whatever a decoder trips over becomes one error that names the file and the reason.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from lorabake.base.errors import UserError
from lorabake.dataset.colour import opacity, to_grey, to_srgb
from lorabake.dataset.wholeness import looks_whole

_ORIENTATION = 0x0112
"""The EXIF tag that says how the camera was held."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture with this EXIF orientation upright."""


class UnreadableImage(UserError):
    """A picture file that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path} cannot be used: {reason}")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may ask of this machine."""

    max_pixels: int = 200_000_000
    """Most pixels a picture may decode to. 200 megapixels is above any camera and takes 600 MB as RGB."""

    max_file_bytes: int = 512 * 1024 * 1024
    """Longest file that is read; some decoders hold the whole file in memory."""


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture says about itself before it is decoded."""

    width: int
    """Pixels from left to right, once upright."""
    height: int
    """Pixels from top to bottom, once upright."""
    format: str
    """What the content is, whatever the file is called: PNG, JPEG, WEBP, AVIF, BMP or GIF."""


def read_rgb(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as 8-bit sRGB, upright, with transparency flattened on white.

    Raises:
        UnreadableImage: it is not a picture, is cut short or broken, moves, or is over the limits.
    """
    rgb = _upright(path, limits, to_srgb)
    assert rgb is not None
    return rgb


def read_mask(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as 8-bit grey, upright: white counts, black and transparent do not. Colour profiles say nothing of masks.

    Raises:
        UnreadableImage: see `read_rgb`.
    """
    grey = _upright(path, limits, to_grey)
    assert grey is not None
    return grey


def read_opacity(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image | None:
    """How opaque the picture is, as 8-bit grey, upright; None if nothing in it can be transparent.

    Raises:
        UnreadableImage: see `read_rgb`.
    """
    return _upright(path, limits, opacity)


def _upright(path: Path, limits: ImageLimits, take: Callable[[Image.Image], Image.Image | None]) -> Image.Image | None:
    """What ``take`` takes of the decoded picture, turned upright."""
    with _opened(path, limits) as (image, _):
        # The orientation is taken before decoding, so that `examine` and this function always agree on it.
        orientation = _orientation(image)
        image.load()
        taken = take(image)
        if taken is not None and orientation != 1:
            return taken.transpose(_UPRIGHT[orientation])
        return image.copy() if taken is image else taken


def examine(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> Header:
    """The header, and a decode only when the file looks cut short: quick for healthy files, right about half-copied ones.

    Raises:
        UnreadableImage: see `read_rgb`; damage in the middle of a file of the right length is not noticed here.
    """
    with _opened(path, limits) as (image, file):
        header = _header(image)
        position = file.tell()
        suspicious = not looks_whole(file, header.format)
        file.seek(position)
        if suspicious:
            image.load()
    return header


@contextlib.contextmanager
def _opened(path: Path, limits: ImageLimits) -> Iterator[tuple[ImageFile.ImageFile, BinaryIO]]:
    """The picture with its header read and within limits; whatever goes wrong inside the block becomes UnreadableImage."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could wait for ever
            raise UnreadableImage(path, "it is not a regular file")
        if status.st_size == 0:
            raise UnreadableImage(path, "the file is empty (0 bytes)")
        if status.st_size > limits.max_file_bytes:
            allowed = f"{limits.max_file_bytes / 2**20:.0f} MiB"
            raise UnreadableImage(path, f"the file has {status.st_size / 2**20:.0f} MiB; at most {allowed} are read")
        with path.open("rb") as file:
            image = _identify(path, file)
            _check(path, image, limits)
            yield image, file
    except UnreadableImage:
        raise
    except Exception as error:  # decoders fed hostile bytes raise anything: struct.error, SyntaxError, MemoryError …
        raise UnreadableImage(path, _reason(error)) from error


def _identify(path: Path, file: BinaryIO) -> ImageFile.ImageFile:
    """Open ``file`` with the decoder its first bytes ask for.

    `Image.open` is not used: it reaches every decoder Pillow has, and its size check is one global number for the whole
    process.
    """
    head = file.read(64)
    file.seek(0)
    decoder = _decoder(head)
    if decoder is None:
        raise UnreadableImage(path, _what_instead(head))
    return decoder(file)


def _decoder(head: bytes) -> Callable[[BinaryIO], ImageFile.ImageFile] | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if head.startswith(b"\xff\xd8\xff"):  # also multi-picture JPEGs of phones, of which only the main picture is wanted
        return JpegImagePlugin.JpegImageFile
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if head[4:8] == b"ftyp" and (b"avif" in head[8:] or b"avis" in head[8:]):
        return AvifImagePlugin.AvifImageFile
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if head.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    return None


def _what_instead(head: bytes) -> str:
    convert = "Convert it to PNG or JPEG."
    if head[4:8] == b"ftyp":
        return f"it is a HEIC/HEIF picture or a video, which is not read. {convert}"
    if head.startswith((b"\x00\x00\x00\x0cJXL ", b"\xff\x0a")):
        return f"it is a JPEG XL picture, which is not read. {convert}"
    if head.startswith((b"II*\x00", b"MM\x00*")):
        return f"it is a TIFF or raw picture, which is not read. {convert}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "it holds a web page or an SVG drawing, not a picture. Download it again."
    return "its content is not PNG, JPEG, WebP, AVIF, BMP or GIF"


def _check(path: Path, image: ImageFile.ImageFile, limits: ImageLimits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImage(path, f"its size is {width}x{height}")
    if width * height > limits.max_pixels:
        given, allowed = width * height / 1e6, limits.max_pixels / 1e6
        raise UnreadableImage(path, f"{width}x{height} is {given:.0f} megapixels; at most {allowed:.0f} are decoded")
    if getattr(image, "is_animated", False):
        raise UnreadableImage(path, "animated: it has more than one frame. Save the frame you want as PNG.")


def _header(image: ImageFile.ImageFile) -> Header:
    width, height = image.size
    if _orientation(image) >= 5:  # 5 to 8 swap the sides
        width, height = height, width
    return Header(width, height, image.format or "")


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1 to 8, from what stands before the pixels; 1 when there is none or it makes no sense."""
    try:
        # The base class on purpose: the PNG class decodes the whole picture to look for EXIF behind the pixels.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "decoding it needs more memory than there is"
    if isinstance(error, OSError) and error.errno is not None:
        return f"the system says: {error.strerror}"
    said = str(error) or type(error).__name__
    return f"the file is cut short ({said})" if "truncated" in said.lower() else f"the picture is broken ({said})"
