"""Reading pictures: exact for good ones, one clear error for bad ones."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from lorabake.dataset.image import Header, ImageLimits, UnreadableImage, examine, read_rgb

FORMATS = {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {"quality": 80}, "AVIF": {"quality": 80}, "BMP": {}, "GIF": {}}


def noise(width: int = 48, height: int = 32) -> Image.Image:
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels_HWC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


# --- good pictures ---


def test_png_pixels_come_back_exactly(tmp_path: Path) -> None:
    image = noise()
    path = saved(tmp_path / "a.png", encoded(image, "PNG"))
    read = read_rgb(path)
    assert read.mode == "RGB"
    assert read.tobytes() == image.tobytes()


def size(path: Path) -> tuple[int, int]:
    """As the header says it."""
    header = examine(path)
    return header.width, header.height


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(tmp_path: Path, format: str) -> None:
    path = saved(tmp_path / "a", encoded(noise(), format, **FORMATS[format]))
    assert examine(path) == Header(48, 32, format) and read_rgb(path).size == (48, 32)
    assert read_rgb(path).size == (48, 32)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", encoded(noise(), "PNG"))
    assert examine(path).format == "PNG"
    assert read_rgb(path).tobytes() == noise().tobytes()


def test_one_pixel(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"))
    assert read_rgb(path).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_turns_upright(tmp_path: Path, format: str, orientation: int) -> None:
    marked = Image.new("RGB", (64, 32), "black")
    marked.paste((255, 255, 255), (0, 0, 32, 16))  # white: where the first stored row and column begin
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = saved(tmp_path / "a", encoded(marked, format, exif=exif))
    read = read_rgb(path)
    assert size(path) == read.size == ((64, 32) if orientation < 5 else (32, 64))
    # EXIF 2.32, tag 274: where row 0 and column 0 of the stored picture are once it is upright.
    row0, column0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    x = 4 if "left" in (row0, column0) else read.width - 4
    y = 4 if "top" in (row0, column0) else read.height - 4
    bright = np.asarray(read.convert("L"))
    assert bright[y, x] > 200
    assert bright[read.height - 1 - y, read.width - 1 - x] < 60


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_broken_exif_does_not_cost_the_picture(tmp_path: Path, exif: bytes) -> None:
    path = saved(tmp_path / "a.jpg", encoded(noise(), "JPEG", exif=exif))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_rgb(path).size == size(path) == (48, 32)


def test_alpha_shows_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    read = read_rgb(saved(tmp_path / "a.png", encoded(rgba, "PNG")))
    assert [read.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]


def test_palette_grey_and_colour_keys(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    plain = read_rgb(saved(tmp_path / "p.png", encoded(palette, "PNG")))
    assert [plain.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (200, 100, 50)]
    keyed = read_rgb(saved(tmp_path / "pt.png", encoded(palette, "PNG", transparency=0)))
    assert [keyed.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(7, 255), (7, 0)])
    read = read_rgb(saved(tmp_path / "la.png", encoded(grey, "PNG")))
    assert [read.getpixel((x, 0)) for x in range(2)] == [(7, 7, 7), (255, 255, 255)]
    bits = read_rgb(saved(tmp_path / "1.png", encoded(Image.new("1", (1, 1), 1), "PNG")))
    assert bits.getpixel((0, 0)) == (255, 255, 255)
    key = read_rgb(
        saved(tmp_path / "k.png", encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    )
    assert key.getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    read = read_rgb(saved(tmp_path / "a.png", encoded(Image.fromarray(levels), "PNG")))
    assert np.asarray(read)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = np.asarray(read_rgb(path))[8, 8]
    assert red > 245
    assert max(green, blue) < 10


def test_icc_profile_is_honoured(tmp_path: Path) -> None:
    swapped = _profile_with_red_and_green_swapped()
    path = saved(tmp_path / "a.png", encoded(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", icc_profile=swapped))
    red, green, _ = np.asarray(read_rgb(path))[0, 0].tolist()
    assert green > 240
    assert red < 15


def _srgb_profile() -> tuple[bytearray, dict[bytes, int]]:
    """An sRGB profile, and where in it each tag's row of the table is."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    # ICC.1:2022 7.3: after 128 bytes of header, a count, then (signature, offset, size) of each tag.
    rows = range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)
    return profile, {bytes(profile[row : row + 4]): row for row in rows}


def _profile_with_red_and_green_swapped() -> bytes:
    profile, rows = _srgb_profile()
    red, green = (slice(rows[name] + 4, rows[name] + 12) for name in (b"rXYZ", b"gXYZ"))
    profile[red], profile[green] = profile[green], profile[red]
    return bytes(profile)


def _profile_nearly_srgb() -> bytes:
    """sRGB as another program rounds it: the red primary is off by 50 / 65536, which moves some pixels by 1 or 2."""
    profile, rows = _srgb_profile()
    offset = int.from_bytes(profile[rows[b"rXYZ"] + 4 : rows[b"rXYZ"] + 8], "big")
    x = slice(offset + 8, offset + 12)
    profile[x] = (int.from_bytes(profile[x], "big") + 50).to_bytes(4, "big")
    return bytes(profile)


def test_an_srgb_profile_changes_no_pixel(tmp_path: Path) -> None:
    exact, nearly = bytes(_srgb_profile()[0]), _profile_nearly_srgb()
    converted = ImageCms.profileToProfile(
        noise(), ImageCms.ImageCmsProfile(io.BytesIO(nearly)), ImageCms.createProfile("sRGB")
    )
    assert converted is not None
    assert converted.tobytes() != noise().tobytes()  # so leaving the pixels alone is a decision, not an accident
    for profile in (exact, nearly):
        path = saved(tmp_path / "a.png", encoded(noise(), "PNG", icc_profile=profile))
        assert read_rgb(path).tobytes() == noise().tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_broken_or_foreign_profile_is_ignored(tmp_path: Path, mode: str) -> None:
    foreign = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"rubbish", foreign, foreign[:200]):
        path = saved(tmp_path / "a.png", encoded(noise().convert(mode), "PNG", icc_profile=profile))
        assert read_rgb(path).tobytes() == noise().convert(mode).convert("RGB").tobytes()


def test_multi_picture_jpeg_gives_its_main_picture(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise().save(buffer, "MPO", save_all=True, append_images=[noise(16, 16)])
    path = saved(tmp_path / "a.jpg", buffer.getvalue())
    assert examine(path).format == "JPEG"
    assert read_rgb(path).size == (48, 32)


def test_data_behind_the_end_is_harmless(tmp_path: Path) -> None:
    for format in ("PNG", "JPEG"):
        path = saved(tmp_path / "a", encoded(noise(), format) + b"\0" * 100_000)
        assert examine(path).width == 48
        assert read_rgb(path).size == (48, 32)


# --- bad pictures ---


@pytest.mark.parametrize("format", FORMATS)
def test_cut_at_every_length(tmp_path: Path, format: str) -> None:
    """Wherever a file is cut, reading and examining agree: both refuse, or the picture is all there."""
    whole_file = encoded(noise(), format, **FORMATS[format])
    whole = read_rgb(saved(tmp_path / "whole", whole_file)).tobytes()
    path = tmp_path / "cut"
    for length in range(0, len(whole_file), max(1, len(whole_file) // 150)):
        path.write_bytes(whole_file[:length])
        try:
            read = read_rgb(path)
        except UnreadableImage as error:
            assert error.path == path
            assert error.reason
            with pytest.raises(UnreadableImage):
                examine(path)
        else:
            assert read.tobytes() == whole, (
                f"{format} cut to {length} of {len(whole_file)} bytes read as something else"
            )
            examine(path)


def test_a_thumbnail_does_not_hide_the_cut(tmp_path: Path) -> None:
    thumbnail = encoded(noise(16, 16), "JPEG")
    data = encoded(noise(200, 200), "JPEG")
    with_thumbnail = data[:2] + b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    assert examine(saved(tmp_path / "a.jpg", with_thumbnail)).width == 200
    with pytest.raises(UnreadableImage, match="cut short"):
        examine(saved(tmp_path / "b.jpg", with_thumbnail[: len(with_thumbnail) // 2]))


def test_healthy_files_are_examined_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def load(image: Image.Image) -> None:
        decoded.append(image.format)

    paths = [
        saved(tmp_path / name, encoded(noise(), name, **options)) for name, options in FORMATS.items() if name != "GIF"
    ]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", load)
    monkeypatch.setattr("PIL.AvifImagePlugin.AvifImageFile.load", load)
    assert [size(path) for path in paths] == [(48, 32)] * len(paths)
    assert not decoded


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not PNG, JPEG"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not PNG, JPEG"),
        (b"\x89PNG\r\n\x1a\n", "broken"),
    ],
)
def test_what_is_not_a_picture(tmp_path: Path, data: bytes, reason: str) -> None:
    path = saved(tmp_path / "a.png", data)
    for read in (read_rgb, examine):
        with pytest.raises(UnreadableImage, match=reason):
            read(path)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path = saved(tmp_path / "a.png", png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")))
    with pytest.raises(UnreadableImage, match="30000x30000 is 900 megapixels; at most 200"):
        read_rgb(path)


def test_the_limit_is_ours_and_exact(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", encoded(noise(40, 25), "PNG"))
    assert read_rgb(path, ImageLimits(max_pixels=1000)).size == (40, 25)
    with pytest.raises(UnreadableImage, match="megapixels"):
        read_rgb(path, ImageLimits(max_pixels=999))


def test_large_pictures_need_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (14_000, 14_000)).save(path)  # 196 MP: above the number at which Pillow itself gives up
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size(path) == (14_000, 14_000)


def test_long_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", encoded(noise(), "PNG"))
    with pytest.raises(UnreadableImage, match="MiB"):
        examine(path, ImageLimits(max_file_bytes=100))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_text_bombs(tmp_path: Path, kind: bytes) -> None:
    packed = zlib.compress(b"\0" * 20_000_000, 9)
    chunk = b"name\0\0" + packed if kind != b"iTXt" else b"name\0\x01\0\0\0" + packed
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (4 * 13))
    path = saved(tmp_path / "a.png", png((b"IHDR", header), (kind, chunk), (b"IDAT", pixels), (b"IEND", b"")))
    with pytest.raises(UnreadableImage):
        read_rgb(path)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_animation_is_refused(tmp_path: Path, format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=100)
    path = saved(tmp_path / "a", buffer.getvalue())
    for read in (read_rgb, examine):
        with pytest.raises(UnreadableImage, match="animated"):
            read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        examine(tmp_path / "a.png")


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="No such file"):
        examine(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        examine(tmp_path)


@settings(max_examples=60)
@given(data=st.data(), format=st.sampled_from(sorted(FORMATS)))
def test_flipped_bytes_never_escape_as_another_error(
    data: st.DataObject, format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(encoded(noise(), format, **FORMATS[format]))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    path = saved(tmp_path_factory.mktemp("flip") / "a", bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (read_rgb, examine):
            try:
                read(path, ImageLimits(max_pixels=1_000_000))
            except UnreadableImage as error:
                assert error.reason
