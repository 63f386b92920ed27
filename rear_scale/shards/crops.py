"""Image files -> square crops, to the pixel as the published pretokenization scripts cut them."""

# S side of a crop in pixels, n crops

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rear_scale.shards.walk import reason
from rear_scale.untrusted import mistaken_for

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")  # of the files that are read, in any case
# What they may hold, whatever their extension says. Not PostScript, which Pillow hands to another program, and no format
# that any bytes may pass for.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_MOST_BYTES = 1 << 30  # of an image file: the whole file is read at once
EXIF = ("ignore", "apply")  # what is done about the orientation that a camera notes beside the pixels
CROPS = {"center": 1, "flip": 2, "ten": 10}  # crops of one image, by the name of pretokenize.crops
_TEN_CROP_SCALE = 1.1  # ten crops are cut from a centre crop this much larger
_THIN = 16  # from this ratio of the sides on, the crop is enlarged without the rest
_MARGIN = 8  # pixels beside the crop, more than bicubic interpolation reaches


class BadImage(Exception):
    """An image that cannot be decoded. The message is the same wherever and whenever it is read."""


@cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def check_bytes(size: int) -> None:
    """Raises BadImage for the size (bytes) of a file that is too large to be read as an image."""
    if size > _MOST_BYTES:
        raise BadImage(f"its {size:,} bytes are more than an image file may have ({_MOST_BYTES:,})")


@contextmanager
def _bad_image_rule() -> Iterator[None]:
    """Whatever an image leads Pillow to (its plugins raise any error, damaged sizes take any memory) is a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        # Pillow's message holds the address of an object.
        raise BadImage("not an image of a format that is read") from None
    except Exception as error:
        name, text = type(error).__name__, reason(error)
        raise BadImage(name if text == name else f"{name}: {text}") from error


@_bad_image_rule()
def decode_image(data: bytes, *, deep: bool = True, exif: str = "ignore") -> Image.Image:
    """The RGB image of a file's bytes: any mode that Pillow reads, transparency dropped, 16-bit grey scaled to 8 bits.

    deep: false refuses more than 8 bits a value, where nothing may be scaled by a rule that nobody has named. exif: one of
    EXIF. Raises BadImage when it is no image, truncated, or takes more memory than there is.
    """
    if data and (what := mistaken_for(data)):
        raise BadImage(f"the file {what.split('. ')[0]}")
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        image.load()
        if exif == "apply":
            ImageOps.exif_transpose(image, in_place=True)
        if not deep and image.mode.startswith(("I", "F")):
            raise BadImage(
                f"more than 8 bits a value (Pillow mode {image.mode}). Convert it to 8 bits first, by the rule that you mean"
            )
        if image.mode.startswith("I"):
            # Pillow clips such values at 255 and makes nearly every pixel white; of 16-bit colour it keeps the high byte.
            return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


@_bad_image_rule()
def cut(image: Image.Image, image_size: int, crops: str) -> np.ndarray:
    """uint8 [n, S, S, 3]: the crops of an RGB image, n = CROPS[crops].

    center: the centre crop; flip: it and its mirror image; ten: four corners and centre of a centre crop 1.1 times as
    large, then the same five of its mirror image.
    """
    if crops == "ten":
        return ten_crop(center_crop(image, int(image_size * _TEN_CROP_SCALE)), image_size)
    pixels = center_crop(image, image_size)
    return np.stack([pixels, pixels[:, ::-1]]) if crops == "flip" else pixels[None]


@_bad_image_rule()
def center_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """uint8 [S, S, 3] of an RGB image of any size: ADM's centre crop (Dhariwal & Nichol 2021, arXiv:2105.05233).

    Where a small image has one side 16 times the other or more, only the crop is enlarged: the whole would take memory in
    proportion to the long side. Raises BadImage when there is too little memory all the same.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    if scale > 1 and max(size) >= _THIN * image_size:
        return np.asarray(_scaled_part(image, size, (left, top), image_size))
    image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)[top : top + image_size, left : left + image_size]


def _scaled_part(image: Image.Image, size: tuple[int, int], corner: tuple[int, int], image_size: int) -> Image.Image:
    """The square at a corner (left, top) of the image scaled to a size, without scaling the rest."""
    window, box = [], []  # of whole pixels around the square, and the square in it; first corners, then sides or ends
    for whole, scaled, first in zip(image.size, size, corner, strict=True):
        start, end = first * whole / scaled, (first + image_size) * whole / scaled
        near, far = max(0, int(start) - _MARGIN), min(whole, int(end) + 1 + _MARGIN)
        window.append((near, far))
        # Pillow keeps a box in single precision: small numbers, or the places of samples move.
        box.append((start - near, end - near))
    (left, right), (top, bottom) = window
    part = image.crop((left, top, right, bottom))
    # Across first, as Pillow enlarges a whole image; of a part alone it may go the other way, and rounds otherwise.
    across = (box[0][0], 0, min(box[0][1], part.width), part.height)
    part = part.resize((image_size, part.height), Image.Resampling.BICUBIC, box=across)
    down = (0, box[1][0], image_size, min(box[1][1], part.height))
    return part.resize((image_size, image_size), Image.Resampling.BICUBIC, box=down)


def ten_crop(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 [10, S, S, 3] of pixels (uint8 [P, P, 3], P >= S): top left, top right, bottom left, bottom right, centre, and
    the same five of the mirror image. The last is not the mirror image of the fifth where P - S is odd."""
    far = len(pixels) - image_size
    middle = round(far / 2)
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return np.stack(
        [
            side[top : top + image_size, left : left + image_size]
            for side in (pixels, pixels[:, ::-1])
            for top, left in corners
        ]
    )
