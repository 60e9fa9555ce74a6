"""Decoding of untrusted files, each case with a real file, and the grid of tiles."""

from __future__ import annotations

import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import encoded
from PIL import Image

from gradinv import images
from gradinv.paths import ASSETS
from gradinv.types import GradinvError, Preprocessing


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: Pillow cannot write every kind that it reads, nor the large one in reasonable time."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ramp(width: int = 12, height: int = 10) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def refused(data: bytes, name: str) -> str:
    """The sentence with which a file is refused: one, which names the file and does not quote a Python error."""
    with pytest.raises(GradinvError) as caught:
        images.decode(data, name)
    text = str(caught.value)
    assert name in text
    assert text.endswith(".") and "\n" not in text and "Error" not in text
    return text


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(format: str) -> None:
    image, notes = images.decode(encoded(ramp(), format), "ramp")
    assert image.mode == "RGB" and notes == []
    assert np.array_equal(np.asarray(image), np.asarray(ramp()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_back_at_their_size(format: str) -> None:
    image, notes = images.decode(encoded(Image.new("RGB", (12, 10), (200, 40, 90)), format), "plain")
    assert (image.mode, image.size, notes) == ("RGB", (12, 10), [])
    assert np.abs(np.asarray(image).astype(int) - (200, 40, 90)).max() <= 4


def test_every_sample_decodes_without_a_note() -> None:
    files = sorted((ASSETS / "samples").glob("*.jpg"))
    assert len(files) == 48
    for file in files:
        image, notes = images.decode(file.read_bytes(), file.name)
        assert (image.mode, image.size, notes) == ("RGB", (288, 288), [])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_file_is_refused(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    refused(data[: len(data) // 2], f"half.{format.lower()}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"Dear diary, today I renamed a text file.\n", "is not a picture"),
        (b"", "is an empty file"),
        (encoded(ramp(), "PPM"), "is not a picture; choose a file in JPEG, PNG"),
        (encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"), "32 bits a pixel"),
        (encoded(Image.new("RGB", (1, 21))), "too thin"),
        (encoded(Image.new("RGB", (2100, 100))), "too thin"),
        *((animated(format), "is an animation; choose a still picture") for format in ("GIF", "PNG", "WEBP")),
    ],
    ids=["text", "empty", "PPM", "32 bits", "narrow", "flat", "GIF", "APNG", "WEBP"],
)
def test_what_is_no_picture_for_a_network_is_refused(data: bytes, said: str) -> None:
    assert said in refused(data, "file.png")


def test_30000_by_30000_png_is_refused() -> None:
    # White at one bit a pixel: a complete, valid file of some kilobytes that would take 2.7 GB as RGB.
    row = b"\x00" + b"\xff" * 3750
    data = png(30_000, 30_000, depth=1, colour=0, rows=row * 30_000)
    assert len(data) < 200_000
    assert "more than 50 megapixels" in refused(data, "poster.png")


# Pillow itself is silent up to 89 megapixels, warns up to 179, and raises beyond.
@pytest.mark.parametrize("side", [7_072, 10_000, 14_000])
def test_limit_of_pixels_holds_where_pillow_is_silent_or_only_warns(side: int) -> None:
    data = png(side, side, depth=1, colour=0, rows=b"\x00")
    assert "more than 50 megapixels" in refused(data, "large.png")


def test_picture_just_within_the_limit_is_accepted() -> None:
    # 7,071² = 49,999,041: one bit a pixel, so that the test stays small; the RGB image takes 150 MB for a moment.
    row = b"\x00" + b"\xff" * ((7_071 + 7) // 8)
    image, notes = images.decode(png(7_071, 7_071, depth=1, colour=0, rows=row * 7_071), "large.png")
    assert image.size == (7_071, 7_071) and image.getpixel((7_070, 7_070)) == (255, 255, 255) and notes == []


def test_file_of_too_many_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(ramp(), "PNG")
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    images.decode(data, "ramp.png")
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    assert "is larger than" in refused(data, "ramp.png")


def test_picture_at_the_limit_of_thinness_is_accepted() -> None:
    assert images.decode(encoded(Image.new("RGB", (20, 1)), "PNG"), "strip.png")[0].size == (20, 1)


def test_cmyk_jpeg_is_converted_with_a_note() -> None:
    image, notes = images.decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "print.jpg")
    red, green, blue = image.getpixel((3, 3))  # type: ignore[misc]
    assert red > 240 and green < 15 and blue < 15
    assert len(notes) == 1 and "CMYK" in notes[0]


def grey16(format: str, order: str) -> bytes:
    """0, a quarter, a half and all of the range; what is cut at 255 would be white from the second on."""
    return encoded(Image.fromarray(np.array([[0, 16384, 32768, 65535]], dtype=order)), format)


def row(mode: str, *pixels: Any) -> Image.Image:
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


def palette(**options: Any) -> bytes:
    picture = row("P", 0, 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    return encoded(picture, "PNG", **options)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
DEEP = "file has 16 bits a channel and was reduced to 8."
FILLED = "file is transparent in places; they were filled with white."
PAGES = encoded(row("RGB", RED), "TIFF", save_all=True, append_images=[row("RGB", BLUE)])
COLOUR16 = b"\x00" + struct.pack(">6H", 65535, 0, 32768, 0, 65535, 16384)
GREYS = [(v, v, v) for v in (0, 64, 128, 255)]


@pytest.mark.parametrize(
    ("data", "pixels", "notes"),
    [
        (
            encoded(row("CMYK", (0, 255, 255, 0)), "TIFF"),
            [RED],
            ["file has CMYK colours, which were converted to RGB without their colour profile."],
        ),
        (grey16("PNG", "=u2"), GREYS, [DEEP]),
        (grey16("TIFF", "<u2"), GREYS, [DEEP]),
        (grey16("TIFF", ">u2"), GREYS, [DEEP]),
        (png(2, 1, depth=16, colour=2, rows=COLOUR16), [(255, 0, 128), (0, 255, 64)], [DEEP]),
        (PAGES, [RED], ["file has several pages, of which the first was taken."]),
        (encoded(row("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))), [(0, 0, 0), WHITE], [FILLED]),
        (encoded(row("RGBA", (9, 8, 7, 255))), [(9, 8, 7)], []),
        (palette(), [RED, BLUE], []),
        (palette(transparency=1), [RED, WHITE], [FILLED]),
        (encoded(row("L", 77)), [(77, 77, 77)], []),
        (encoded(row("1", 1)), [WHITE], []),
        (encoded(row("LA", (77, 255))), [(77, 77, 77)], []),
    ],
)
def test_every_kind_of_pixel_becomes_rgb_with_a_note_of_what_is_lost(
    data: bytes, pixels: list[tuple[int, ...]], notes: list[str]
) -> None:
    image, found = images.decode(data, "file")
    assert [image.getpixel((x, 0)) for x in range(image.width)] == pixels and found == notes


def test_exif_rotation_is_applied_and_metadata_dropped() -> None:
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 16, 16))  # black is left; turned by 90° clockwise it is on top
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "my address"
    image, _ = images.decode(encoded(picture, "JPEG", exif=exif, quality=95), "phone.jpg")
    assert image.size == (16, 32)
    assert max(image.getpixel((8, 4))) < 30 and min(image.getpixel((8, 28))) > 225  # type: ignore[arg-type]
    assert not image.info and not image.getexif()


def test_damaged_exif_does_not_matter() -> None:
    data = encoded(ramp(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12\x00\x03")
    assert images.decode(data, "phone.jpg")[0].size == (12, 10)


def test_decoding_leaves_no_trace_in_the_warning_filters() -> None:
    before = list(warnings.filters)
    images.decode(encoded(ramp(), "PNG"), "ramp.png")
    assert list(warnings.filters) == before


def test_to_pixels_resizes_the_shorter_side_and_crops_the_centre() -> None:
    picture = Image.new("RGB", (96, 32), "red")
    picture.paste("lime", (32, 0, 64, 32))
    pixels = images.to_pixels(picture, Preprocessing(size=16, resize=16))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert pixels[:, 8, 8].tolist() == [0, 1, 0] and pixels[:, :, 2:14].mean((1, 2)).tolist() == [0, 1, 0]


def test_grid_of_tiles_comes_back() -> None:
    rows = torch.randint(0, 256, (2, 3, 3, 5, 5), generator=torch.Generator().manual_seed(0)).float() / 255
    grid = images.to_grid(rows)
    assert grid.size == (15, 10)
    assert np.array_equal(np.asarray(grid)[5:, 10:], np.asarray(images.to_image(rows[1, 2])))
    assert torch.equal(images.from_grid(grid, 3), rows)
