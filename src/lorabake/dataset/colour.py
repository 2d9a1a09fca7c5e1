"""From whatever colours a picture was stored in to 8-bit sRGB, alpha flattened on white."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

_SAME = 2
"""A profile that moves no channel by more than this (of 255) is sRGB in all but name; its pixels are left exactly as
they are."""


def to_srgb(image: Image.Image) -> Image.Image:
    """``image`` (already decoded, any mode) as mode "RGB" in sRGB.

    An embedded ICC profile is honoured; a broken one, or one that does not fit the picture's channels, is ignored.
    16-bit grey is scaled, not clipped. Transparency (a channel, a colour key or a palette entry) shows white.
    """
    profile = image.info.get("icc_profile")
    alpha = opacity(image)
    colour = _apply_profile(_colour_channels(image), profile)
    if alpha is None:
        return colour
    return Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)


def to_grey(image: Image.Image) -> Image.Image:
    """``image`` (already decoded, any mode) as mode "L": how bright every pixel is, and black where it is transparent."""
    alpha, colour = opacity(image), _colour_channels(image)
    grey = colour if colour.mode == "L" else colour.convert("RGB").convert("L")
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def opacity(image: Image.Image) -> Image.Image | None:
    """How opaque every pixel of ``image`` (already decoded) is, as mode "L"; None where nothing says that any is not."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.convert("RGBA").getchannel("A")
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
        return image.convert("RGBA").getchannel("A")
    return None


def _colour_channels(image: Image.Image) -> Image.Image:
    """The picture without alpha, in a mode an ICC profile can describe: "L", "RGB" or "CMYK"."""
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey_HW = np.asarray(image).astype(np.float32)
        return Image.fromarray(np.clip(grey_HW / 257 + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):  # by way of RGBA: a palette with transparency loses its colours otherwise
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _transform(profile, image.mode) if profile else None
    converted = ImageCms.applyTransform(image, transform) if transform else None
    return converted if converted is not None else image.convert("RGB")


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from ``profile`` to sRGB; None when there is nothing to do or the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        moved = ImageCms.applyTransform(_lattice(mode), transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if moved is None:
        return None
    plain_HWC = np.asarray(_lattice(mode).convert("RGB"), dtype=np.int16)
    nothing_moves = np.abs(np.asarray(moved, dtype=np.int16) - plain_HWC).max() <= _SAME
    return None if nothing_moves and mode != "CMYK" else transform


def _lattice(mode: str) -> Image.Image:
    """A small picture with colours from all over the cube of ``mode``."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grids = np.meshgrid(*[levels] * len(Image.new(mode, (1, 1)).getbands()), indexing="ij")
    pixels_1NC = np.stack([grid.ravel() for grid in grids], axis=-1)[None]
    if mode == "L":
        return Image.fromarray(pixels_1NC[..., 0])
    return Image.frombytes(mode, (pixels_1NC.shape[1], 1), pixels_1NC.tobytes())
