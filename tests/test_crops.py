"""Images that are odd: thin ones, damaged ones, those that take too much memory, those that a camera turned."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run_alone
from PIL import Image, PngImagePlugin

from rear_scale.config import InputError
from rear_scale.evaluate.images.image_set import open_image_set
from rear_scale.evaluate.metrics.statistics_file import images_of, write_statistics
from rear_scale.shards import crops
from rear_scale.shards.crops import BadImage, center_crop, cut, decode_image
from rear_scale.shards.sources import open_source
from rear_scale.world import World


def encoded(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_thin_images_are_cut_as_from_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    differing = total = 0
    for short in (1, 2, 3, 5, 8, 11, 16, 23):
        for long in (16 * short, 17 * short + 1, 40 * short + 3, 90 * short + 1):
            for height, width in ((short, long), (long, short)):
                image = Image.fromarray(noise(height, width))
                part = center_crop(image, 24)
                with monkeypatch.context() as patch:
                    patch.setattr(crops, "_THIN", 10**9)
                    whole = center_crop(image, 24)
                assert part.shape == whole.shape == (24, 24, 3)
                # Places of samples are in single precision: now and then a value rounds the other way.
                assert np.abs(part.astype(int) - whole).max() <= 1
                differing, total = differing + (part != whole).sum(), total + part.size
    assert differing < 1e-3 * total


def test_images_that_are_not_thin_are_enlarged_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "_scaled_part", lambda *arguments: pytest.fail("not thin"))
    for height, width in ((24, 24), (10, 100), (100, 10), (1, 15), (300, 3), (400, 10_000)):
        center_crop(Image.fromarray(noise(height, width)), 24 if height != 300 else 2)


_THIN_IMAGE = """
import io, resource, sys
import numpy as np
from PIL import Image
from rear_scale.shards.crops import cut, decode_image
shape = [int(side) for side in sys.argv[1].split("x")]
file = io.BytesIO()
Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(file, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert cut(decode_image(file.getvalue()), 256, "ten").shape == (10, 256, 256, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("shape", ["1x65000", "65000x1", "3x400000"])
def test_thin_images_take_little_memory(shape: str) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    command = [sys.executable, "-c", _THIN_IMAGE, shape]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment, check=True)
    assert int(found.stdout) < 100_000, "kilobytes"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecursionError("maximum recursion depth exceeded"),
        SyntaxError("broken PNG file"),
        OSError(5, "Input/output error"),
        ZeroDivisionError("division by zero"),
        Image.DecompressionBombError("Image size exceeds limit"),
        ValueError("<object at 0x7f00aa>\nsecond line"),
    ],
)
def test_whatever_a_decoder_raises_makes_a_bad_image(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    data = encoded(noise(8, 8))

    def fail(*arguments, **named):
        raise error

    for target, name in ((PngImagePlugin.PngImageFile, "load"), (Image.Image, "convert"), (Image.Image, "resize")):
        with monkeypatch.context() as patch, pytest.raises(BadImage, match=type(error).__name__) as caught:
            patch.setattr(target, name, fail)
            cut(decode_image(data), 16, "ten")
        assert "\n" not in str(caught.value)
        assert "0x7f" not in str(caught.value)


def test_decompression_bombs_are_bad_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage, match="DecompressionBombError"):
        decode_image(encoded(noise(50, 50)))


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a/0.png", "wb") as file:
        file.truncate(2 << 30)  # takes no space
    image = next(open_source(tmp_path).read(0, 1))
    with pytest.raises(BadImage, match="its 2,147,483,648 bytes are more than an image file may have"):
        image.decode()
    with pytest.raises(InputError, match=r"0\.png .byte 0.: its 2,147,483,648 bytes are more"):
        run_alone(_read, tmp_path, 8, "ignore")


def test_postscript_under_the_name_of_an_image_runs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: pytest.fail("a program was run"))
    with pytest.raises(BadImage, match="not an image of a format that is read"):
        decode_image(encoded(noise(8, 8), "EPS"))


def turned(pixels: np.ndarray, orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_orientation_is_ignored_or_applied(form: str) -> None:
    pixels = noise(6, 9)
    as_seen = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 6: np.rot90(pixels, -1)}
    as_seen[8] = np.rot90(pixels)
    for orientation, seen in as_seen.items():
        data = turned(pixels, orientation, form)
        assert np.array_equal(decode_image(data), pixels)
        assert np.array_equal(decode_image(data, exif="apply"), seen)
        palette = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.quantize(255).save(palette, "PNG", transparency=0, exif=image.getexif())
        assert decode_image(palette.getvalue(), exif="apply").size == seen.shape[1::-1]


def _read(world: World, folder: Path, size: int | None, exif: str) -> tuple[np.ndarray, str, str]:
    found = open_image_set(folder, world, size, exif)
    return found.read(found.blocks[0])[0], found.identity, found.preprocessing


def test_evaluation_applies_the_orientation_on_request_and_says_so(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(turned(pixels, 6, "PNG"))
    (tmp_path / "images/b.png").write_bytes(encoded(pixels))
    stored, identity, rule = run_alone(_read, tmp_path / "images", 8, "ignore")
    seen, other, other_rule = run_alone(_read, tmp_path / "images", 8, "apply")
    assert np.array_equal(stored, [pixels, pixels])
    assert np.array_equal(seen, [np.rot90(pixels, -1), pixels])
    assert identity != other
    assert other_rule == f"{rule}, turned as EXIF says"
    from test_evaluate_sources import moments

    about = {"count": 2, "size": [8, 8], "preprocessing": other_rule}
    write_statistics(tmp_path / "x.npz", {"pool": moments()}, {"pool": "weights"}, about)
    assert images_of(tmp_path / "x.npz").preprocessing == other_rule


def test_unreadable_files_of_samples_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise(8, 8)))

    def fail(*arguments, **named):
        raise MemoryError

    monkeypatch.setattr("rear_scale.evaluate.images.image_set._File.data", fail)
    with pytest.raises(InputError, match=r"a\.png \(byte 0\)"):
        run_alone(_read, tmp_path, 8, "ignore")
