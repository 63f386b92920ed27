"""Image files -> square crops, to the pixel as the published pretokenization scripts cut them."""

# S side of a crop in pixels, n crops

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

CROPS = {"center": 1, "flip": 2, "ten": 10}  # crops of one image, by the name of pretokenize.crops
_TEN_CROP_SCALE = 1.1  # ten crops are cut from a centre crop this much larger


class BadImage(Exception):
    """An image that cannot be decoded. The message is the same wherever and whenever it is read."""


def decode_image(data: bytes, *, deep: bool = True) -> Image.Image:
    """The RGB image of a file's bytes: any mode that Pillow reads, transparency dropped, 16-bit grey scaled to 8 bits.

    deep: false refuses more than 8 bits a value, where nothing may be scaled by a rule that nobody has named. Raises BadImage
    when it is no image, or truncated.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
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
    except (MemoryError, BadImage):
        raise
    except UnidentifiedImageError:
        # Pillow's message holds the address of an object.
        raise BadImage("not an image that Pillow can read") from None
    except Exception as error:  # its plugins raise whatever damaged bytes lead them to
        raise BadImage(f"{type(error).__name__}: {error}") from error


def cut(image: Image.Image, image_size: int, crops: str) -> np.ndarray:
    """uint8 [n, S, S, 3]: the crops of an RGB image, n = CROPS[crops].

    center: the centre crop; flip: it and its mirror image; ten: four corners and centre of a centre crop 1.1 times as
    large, then the same five of its mirror image.
    """
    if crops == "ten":
        return ten_crop(center_crop(image, int(image_size * _TEN_CROP_SCALE)), image_size)
    pixels = center_crop(image, image_size)
    return np.stack([pixels, pixels[:, ::-1]]) if crops == "flip" else pixels[None]


def center_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """uint8 [S, S, 3] of an RGB image of any size: ADM's centre crop (Dhariwal & Nichol 2021, arXiv:2105.05233)."""
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return np.asarray(image)[top : top + image_size, left : left + image_size]


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
