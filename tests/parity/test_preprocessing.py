"""Crops and colours to the pixel, against the published pretokenization and sampling scripts."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import torch
from PIL import Image

from rear_scale.sample.uint8_rounding import to_uint8
from rear_scale.shards.crops import center_crop, cut


def sha256(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def test_crops(case) -> None:
    size, larger = case.json["image_size"], case.json["ten_crop_pre_size"]
    for name, expected in case.json["cases"].items():
        width, height = expected["pil_size_w_h"]
        generator = np.random.default_rng([case.json["seed"], zlib.crc32(name.encode())])
        noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        assert sha256(noise) == expected["input_sha256"], "numpy draws another stream: nothing else can match"
        image = Image.fromarray(noise)
        (centre,) = cut(image, size, "center")
        ten = cut(image, size, "ten")
        if f"{name}/center_crop_256_slice" in case:
            middle = slice(size // 2 - 2, size // 2 + 2)
            assert np.array_equal(centre[middle, middle], case.arrays[f"{name}/center_crop_256_slice"]), name
        if f"{name}/ten_crop_slices" in case:
            assert np.array_equal(ten[:, :3, :3], case.arrays[f"{name}/ten_crop_slices"]), name
        assert sha256(centre) == expected["center_crop_256_sha256"], name
        assert sha256(center_crop(image, larger)) == expected["center_crop_281_sha256"], name
        assert [sha256(crop) for crop in ten] == expected["ten_crop_sha256"], name
        plain, mirrored = cut(image, size, "flip")
        assert np.array_equal(plain, centre)
        assert np.array_equal(mirrored, centre[:, ::-1])


def test_colours_are_truncated(case) -> None:
    if "float_image" in case:
        found = to_uint8(torch.from_numpy(case.arrays["float_image"]), "truncate")
        assert np.array_equal(found, case.arrays["uint8_from_float_image"])
