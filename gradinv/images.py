"""Between files, PIL images and tensors of pixels."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as transform

from gradinv.types import GradinvError, Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What `decode` reads. Pillow has decoders for 40 other formats, which are rarely used and rarely tested."""

SUFFIXES = (".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What files in FORMATS are called, in small letters: what counts as a picture in a folder."""

MAX_PIXELS = 50_000_000
"""Larger pictures are refused before they are decoded: 50 megapixels take 150 MB as RGB, and a file of a few kilobytes
can claim a thousand times that."""

MAX_BYTES = 100_000_000
"""Larger files are refused unread: a photograph of 50 megapixels is smaller, also when losslessly compressed."""

MAX_ASPECT = 20
"""Thinner pictures are refused: scaling the shorter side up to the network's size would make the longer one huge."""

_PNG = b"\x89PNG\r\n\x1a\n"

# `warnings.catch_warnings` is not safe between threads, and one large picture at a time is enough for the memory.
_DECODING = threading.Lock()


def decode(data: bytes, name: str) -> tuple[Image.Image, list[str]]:
    """The bytes of an untrusted picture file → an 8-bit RGB image, upright, without metadata, and notes.

    The notes are sentences on what was lost or chosen on the way (CMYK, 16-bit, transparency, pages); most pictures
    have none.
    Raises GradinvError, naming the file by `name`, for what is not a still picture in one of FORMATS that can be
    decoded completely, and for one beyond MAX_BYTES, MAX_PIXELS or MAX_ASPECT.
    """
    if not data:
        raise GradinvError(f"{name} is an empty file; choose another picture.")
    if len(data) > MAX_BYTES:
        raise GradinvError(f"{name} is larger than {MAX_BYTES // 1_000_000} MB; scale the picture down first.")
    too_large = f"more than {MAX_PIXELS // 1_000_000} megapixels; scale the picture down first"
    with _DECODING, warnings.catch_warnings():
        # Pillow warns of odd metadata, which is dropped, and of sizes that could exhaust the memory, which is fatal.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            try:
                picture = _loaded(data, name, too_large)
            except (ValueError, OSError) as error:
                # Pillow takes no more than 1 MB of each text or profile of a PNG, of which nothing is kept here.
                if isinstance(error, GradinvError | UnidentifiedImageError) or (bare := _bare_png(data)) == data:
                    raise
                picture = _loaded(bare, name, too_large)
            notes = _header_notes(picture, data, name)
            with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse a picture
                picture = ImageOps.exif_transpose(picture)
            image = _to_rgb(picture, name, notes)
        except GradinvError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise GradinvError(f"{name} has {too_large}.") from error
        except UnidentifiedImageError as error:
            known = ", ".join(FORMATS[:-1])
            raise GradinvError(f"{name} is not a picture; choose a file in {known} or {FORMATS[-1]} format.") from error
        except MemoryError as error:
            raise GradinvError(f"{name} does not fit into the memory; scale the picture down first.") from error
        except Exception as error:  # the decoders raise a dozen types for damaged files
            raise GradinvError(f"{name} is damaged or incomplete; save it again or choose another picture.") from error
    image.info.clear()  # the place and the time of a visitor's photograph are nobody's business
    return image, notes


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """An RGB image → pixels (3, S, S) in [0, 1]: shorter side to `resize` (antialiased), centre crop to `size`."""
    image = transform.resize(image, [preprocessing.resize], antialias=True)
    image = transform.center_crop(image, [preprocessing.size, preprocessing.size])
    return transform.pil_to_tensor(image).float() / 255


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [0, 1] → an 8-bit RGB image of that size."""
    return Image.fromarray(_to_bytes(pixels))


def to_grid(rows: Tensor) -> Image.Image:
    """Pixels (R, B, 3, H, W) in [0, 1] → one image of R × B tiles without gaps, so that `from_grid` can undo it."""
    count, batch, _, height, width = rows.shape
    return Image.fromarray(_to_bytes(rows.permute(2, 0, 3, 1, 4).reshape(3, count * height, batch * width)))


def from_grid(image: Image.Image, batch_size: int) -> Tensor:
    """The inverse of `to_grid` for square tiles: → pixels (R, B, 3, S, S) in [0, 1]."""
    side = image.width // batch_size
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    tiles = pixels.reshape(image.height // side, side, batch_size, side, 3)
    return tiles.permute(0, 2, 4, 1, 3).contiguous()


def _loaded(data: bytes, name: str, too_large: str) -> Image.Image:
    picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_header(picture, name, too_large)
    picture.load()
    return picture


def _bare_png(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile; other data, and where its chunks cannot be told, as they are."""
    if not data.startswith(_PNG):
        return data
    kept, place = [_PNG], len(_PNG)
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if end > len(data):
            return data
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _check_header(picture: Image.Image, name: str, too_large: str) -> None:
    """What the header alone decides, before anything is decoded."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise GradinvError(f"{name} is {width} × {height} pixels, {too_large}.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise GradinvError(f"{name} is {width} × {height} pixels, too thin for a square picture; crop it first.")
    if picture.format in ("GIF", "PNG", "WEBP") and getattr(picture, "is_animated", False):
        raise GradinvError(f"{name} is an animation; choose a still picture.")


def _header_notes(picture: Image.Image, data: bytes, name: str) -> list[str]:
    notes = []
    # Pillow reads colours of 16 bits as 8 bits without a word, so the depth has to be taken from the file's header.
    depth = 8
    if picture.format == "PNG":
        depth = data[24]
    elif picture.format == "TIFF":
        depth = max(getattr(picture, "tag_v2", {}).get(258, (8,)))
    if depth == 16:
        notes.append(f"{name} has 16 bits a channel and was reduced to 8.")
    if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1:
        notes.append(f"{name} has several pages, of which the first was taken.")
    return notes


def _to_rgb(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """A loaded picture of any mode → a new 8-bit RGB image; adds to the notes."""
    if picture.mode in ("I", "F"):
        raise GradinvError(f"{name} has 32 bits a pixel, whose range is not known; save it with 8 or 16 bits.")
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture).astype(np.float32) / 257  # 65535 / 255, so that white stays white
        picture = Image.fromarray(levels.round().astype(np.uint8))
    if picture.mode == "CMYK":
        notes.append(f"{name} has CMYK colours, which were converted to RGB without their colour profile.")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A").getextrema()
        if alpha == (0, 0):
            colours = picture.convert("RGB")
            if colours.getcolors(1) is not None:
                raise GradinvError(f"{name} is wholly transparent and has one colour; choose another picture.")
            notes.append(f"{name} is wholly transparent; its colours were taken as if it were not.")
            return colours
        if alpha != (255, 255):
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            notes.append(f"{name} is transparent in places; they were filled with white.")
    # A new image in any case: `convert` copies also where the mode is RGB already.
    return picture.convert("RGB")


def _to_bytes(pixels: Tensor) -> np.ndarray:
    levels = (pixels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().numpy()
