"""Square crops of image files, equal to the pixel to those of the published pretokenization scripts."""

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

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")  # of image files that are read, in any letter case
# The formats that they may have, whatever the extension. Without PostScript, for which Pillow starts another program, and
# without formats that almost any bytes are valid in.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_MOST_BYTES = 1 << 30  # of an image file: the whole file is read at once
EXIF = ("ignore", "apply")  # what is done about the orientation tag of a camera
CROPS = {"center": 1, "flip": 2, "ten": 10}  # crops of one image, by the name of pretokenize.crops
_TEN_CROP_SCALE = 1.1  # ten crops are cut from a centre crop this much larger
_THIN = 16  # from this ratio of the sides on, only the crop is enlarged and not the whole image
_MARGIN = 8  # pixels around the crop, more than bicubic interpolation uses


class BadImage(Exception):
    """An image that cannot be decoded. The message is the same on every machine and in every run."""


@cache
def _formats() -> tuple[str, ...]:
    """The formats of _FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def check_bytes(size: int) -> None:
    """Raises BadImage for a file size (bytes) that is too large for an image."""
    if size > _MOST_BYTES:
        raise BadImage(f"its {size:,} bytes are more than an image file may have ({_MOST_BYTES:,})")


@contextmanager
def _bad_image_rule() -> Iterator[None]:
    """Turns every error of Pillow into a BadImage: its plugins raise all kinds, and damaged sizes lead to MemoryError."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        # Pillow's own message contains the address of an object.
        raise BadImage("not an image of a format that is read") from None
    except Exception as error:
        name, text = type(error).__name__, reason(error)
        raise BadImage(name if text == name else f"{name}: {text}") from error


@_bad_image_rule()
def decode_image(data: bytes, *, deep: bool = True, exif: str = "ignore") -> Image.Image:
    """The RGB image of a file's bytes: any mode that Pillow reads, transparency dropped, 16-bit grey scaled to 8 bits.

    deep: False refuses images of more than 8 bits per value, because the user has not said how to scale them. exif: one of
    EXIF. Raises BadImage for bytes that are no image, are truncated, or need more memory than there is.
    """
    if data and (what := mistaken_for(data)):
        raise BadImage(f"the file {what.split('. ')[0]}")
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        image.load()
        if exif == "apply":
            ImageOps.exif_transpose(image, in_place=True)
        if not deep and image.mode.startswith(("I", "F")):
            raise BadImage(f"more than 8 bits per value (Pillow mode {image.mode}). Convert it to 8 bits first")
        if image.mode.startswith("I"):
            # Pillow's conversion clips such values at 255, so that nearly every pixel is white. Keep the high byte, as Pillow
            # does for 16-bit colour.
            return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


@_bad_image_rule()
def cut(image: Image.Image, image_size: int, crops: str) -> np.ndarray:
    """The crops of an RGB image, uint8 [n, S, S, 3] with n = CROPS[crops].

    center: the centre crop; flip: it and its mirror image; ten: four corners and centre of a centre crop 1.1 times as
    large, then the same five of its mirror image.
    """
    if crops == "ten":
        return ten_crop(center_crop(image, int(image_size * _TEN_CROP_SCALE)), image_size)
    pixels = center_crop(image, image_size)
    return np.stack([pixels, pixels[:, ::-1]]) if crops == "flip" else pixels[None]


@_bad_image_rule()
def center_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """The centre crop of an RGB image of any size, uint8 [S, S, 3], as ADM cuts it (Dhariwal & Nichol 2021, arXiv:2105.05233).

    Of a small image with one side at least 16 times the other, only the crop is enlarged: the whole image would take memory
    in proportion to its long side. Raises BadImage when the memory does not suffice.
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
    """The square at a corner (left, top) of the image scaled to `size`, computed without scaling the rest of the image."""
    # By axis: first and last pixel of a window around the square, and the start and length of the square in the window.
    window, box = [], []
    for whole, scaled, first in zip(image.size, size, corner, strict=True):
        start, end = first * whole / scaled, (first + image_size) * whole / scaled
        near, far = max(0, int(start) - _MARGIN), min(whole, int(end) + 1 + _MARGIN)
        window.append((near, far))
        # Relative to the window: Pillow stores the box in single precision, and large numbers would shift the samples.
        box.append((start - near, end - near))
    (left, right), (top, bottom) = window
    part = image.crop((left, top, right, bottom))
    # Horizontally first, as Pillow does for the whole image; for the window alone it may choose the other order, which rounds
    # differently.
    across = (box[0][0], 0, min(box[0][1], part.width), part.height)
    part = part.resize((image_size, part.height), Image.Resampling.BICUBIC, box=across)
    down = (0, box[1][0], image_size, min(box[1][1], part.height))
    return part.resize((image_size, image_size), Image.Resampling.BICUBIC, box=down)


def ten_crop(pixels: np.ndarray, image_size: int) -> np.ndarray:
    """Ten crops, uint8 [10, S, S, 3], of pixels (uint8 [P, P, 3], P >= S): top left, top right, bottom left, bottom right,
    centre, and the same five of the mirror image. The last is not the mirror image of the fifth where P - S is odd."""
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
