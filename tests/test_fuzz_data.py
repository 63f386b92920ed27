"""Files of data with random damage, from fixed seeds: each is read in full or refused in one line, soon and in bounded memory.

`pytest -m long tests/test_fuzz_data.py` runs many thousands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import struct
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.shards import token_files as tokens
from rear_scale.shards.blocks import TOKEN_EXTENSIONS, decode_plain
from rear_scale.shards.classes import read_class_map
from rear_scale.shards.crops import BadImage, cut, decode_image
from rear_scale.shards.sources import open_source
from rear_scale.shards.tar_index import members, read_member, scan
from rear_scale.shards.walk import HIDDEN, LeftOut

NUM_TOKENS, CODEBOOK_SIZE = 16, 32
SLOWEST_S = 20.0  # of one input, in CPU time
MOST_MEMORY = 2 << 30  # bytes more than before, of all inputs of one kind


def pixels(seed: int, side: int = 24) -> np.ndarray:
    smooth = np.linspace(0, 255, side * side * 3).reshape(side, side, 3)
    return ((smooth + np.random.default_rng(seed).integers(0, 40, smooth.shape)) % 256).astype(np.uint8)


def image_file(form: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels(seed))
    if form == "GIF":
        image = image.quantize(64)
    image.save(buffer, form, **({"progressive": True} if form == "JPEG" and seed % 2 else {}))
    return buffer.getvalue()


FORMS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
IMAGES = [image_file(form, seed) for form in FORMS for seed in range(4)]


def tar_file(form: int, hard_link: bool) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number in range(5):
            key = f"{'long/' * 30 if form != tarfile.USTAR_FORMAT else ''}{number}é"
            for extension, data in (("png", IMAGES[number % 4][:700]), ("cls", b"3")):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                if hard_link and extension == "cls":
                    info = tarfile.TarInfo(f"{key}.txt")
                    info.type, info.linkname = tarfile.LNKTYPE, f"{key}.cls"
                    tar.addfile(info)
    return buffer.getvalue()


TARS = [
    tar_file(form, link) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for link in (0, 1)
]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, a part cut off, put in, moved, doubled or zeroed."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 12))):
        at = draw.randrange(len(changed) or 1)
        length = draw.choice((1, 2, 4, 16, 512, 513))
        kind = draw.randrange(9)
        if kind <= 2 and changed:
            changed[at] = draw.choice((0, 255, 127, 128, changed[at] ^ (1 << draw.randrange(8)), draw.randrange(256)))
        elif kind == 3:
            changed[at : at + length] = draw.randbytes(length)
        elif kind == 4:
            del changed[at:]
        elif kind == 5:
            del changed[at : at + length]
        elif kind == 6:
            changed[at:at] = changed[max(0, at - length) : at]
        elif kind == 7:
            changed[at : at + length] = bytes(length)
        else:
            changed[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\1\0"))
    return bytes(changed)


def with_right_checksums(data: bytes, draw: random.Random) -> bytes:
    """A tar whose headers hold random fields under checksums that fit them."""
    changed = bytearray(data)
    for start in range(0, len(changed) - 511, 512):
        if changed[start + 257 : start + 262] == b"ustar" and draw.random() < 0.3:
            field, length = draw.choice(((0, 100), (124, 12), (156, 1), (157, 100), (345, 155), (257, 8)))
            new = draw.choice(
                (draw.randbytes(length), bytes(length), b"\xff" * length, b"7" * length, b"../x".ljust(length))
            )
            changed[start + field : start + field + length] = new[:length]
            changed[start + 148 : start + 156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return bytes(changed)


def try_tar(draw: random.Random, folder: Path) -> str:
    whole = draw.choice(TARS)
    checked = draw.random() < 0.6
    path = folder / "x.tar"
    path.write_bytes(damaged(whole, draw) if checked else with_right_checksums(whole, draw))
    intact = folder / "intact.tar.saved"
    intact.write_bytes(whole)
    left_out = LeftOut()
    found = members(path, left_out)
    for member in found:
        assert len(read_member(path, member.location)) == member.size
    if checked:
        # No header can be damaged unnoticed, so nothing may be missing; a name in a pax record alone may be another.
        assert len(found) + left_out.counts[HIDDEN] == len(members(intact)), "silently shorter"
    with contextlib.suppress(InputError):
        scan(path)
    source = open_source(folder)
    for image in source.read(0, len(source)):
        with contextlib.suppress(BadImage):
            image.decode()
    return "read"


def with_right_chunks(data: bytes, draw: random.Random) -> bytes:
    """A PNG whose chunks are damaged under checksums that fit them, sizes of the image among them."""
    changed, start = bytearray(data[:8]), 8
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        body = data[start + 4 : start + 8 + length]
        if draw.random() < 0.4:
            content = damaged(body[4:], draw) if body[4:] else draw.randbytes(3)
            if body[:4] == b"IHDR":
                sizes = struct.pack(">II", *(draw.choice((0, 1, 24, 65_000, 13_000, 1 << 31)) for _ in range(2)))
                content = draw.choice((sizes + body[12:], content.ljust(13, b"\0")[:13]))
            body = draw.choice((body[:4], body[:4], b"tRNS", b"PLTE", b"eXIf", b"zTXt", b"iCCP")) + content
        changed += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        start += 12 + length
    return bytes(changed)


def try_image(draw: random.Random, folder: Path) -> str:
    data = (
        with_right_chunks(draw.choice(IMAGES[:4]), draw) if draw.random() < 0.3 else damaged(draw.choice(IMAGES), draw)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        crops = cut(decode_image(data, deep=draw.random() < 0.5, exif=draw.choice(("ignore", "apply"))), 16, "ten")
    assert crops.shape == (10, 16, 16, 3)
    return "read"


WORDS = (
    "n01",
    "n02",
    "0",
    "1",
    "2",
    "90",
    "-1",
    "1.5",
    "4x4",
    "é",
    "{",
    '"a"',
    ":",
    "}",
    ",",
    "\t",
    "\x00",
    "²",
    "9" * 400,
)


def try_class_map(draw: random.Random, folder: Path) -> str:
    path = folder / "map"
    if draw.random() < 0.3:
        entries = {
            draw.choice(WORDS): draw.choice((0, 1, 2, -1, 70000, True, 1.0, None, "1", [], {})) for _ in range(3)
        }
        data = damaged(json.dumps(entries).encode(), draw)
    else:
        rows = (" ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(5)))
        data = draw.choice(("\n", "\r\n")).join(rows).encode()
        data = damaged(data, draw) if data and draw.random() < 0.3 else data
    path.write_bytes(data)
    ids = read_class_map(path)
    assert ids
    assert all(type(number) is int and 0 <= number < 65_536 for number in ids.values())
    lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    assert len(ids) == len(lines) or data.decode("utf-8-sig").lstrip().startswith("{"), "silently shorter"
    return "read"


TOKENIZER = TokenizerConfig(name="maskgit_vqgan", num_tokens=NUM_TOKENS, codebook_size=CODEBOOK_SIZE, codebook_dim=8)
JSONL = "".join(
    json.dumps({"class_id": number, "tokens": [(number + place) % CODEBOOK_SIZE for place in range(NUM_TOKENS)]}) + "\n"
    for number in range(6)
).encode()


def try_jsonl(draw: random.Random, folder: Path) -> str:
    path = folder / "tokens.jsonl"
    if draw.random() < 0.3:
        odd = draw.choice(
            ("null", "1e999", "[" * 3000, '"3"', "true", "1.0", "-1", "65536", "9" * 5000, "NaN", "{}", "[1]")
        )
        data = JSONL.replace(draw.choice((b'"class_id": 3', b"[3", b"[3, 4, 5")), b'"class_id": ' + odd.encode(), 1)
    else:
        data = damaged(JSONL, draw)
    path.write_bytes(data)
    found = list(tokens._checked(tokens._JsonlFile(path).read(0), TOKENIZER))
    assert len(found) == data.count(b"\n") + (not data.endswith(b"\n") and bool(data)), "silently shorter"
    assert all(0 <= label < 65_536 and row.shape == (NUM_TOKENS,) for label, row in found)
    return "read"


def alitok_file(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, codes=np.arange(10 * NUM_TOKENS).reshape(10, NUM_TOKENS) % CODEBOOK_SIZE, other=np.zeros(3))
    return buffer.getvalue()


ALITOK = [alitok_file(save) for save in (np.savez, np.savez_compressed)]


def try_alitok(draw: random.Random, folder: Path) -> str:
    path = folder / "codes.npz"
    data = draw.choice(ALITOK)
    if draw.random() < 0.3:  # another header under checksums that fit it
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            array = zipfile.ZipFile(io.BytesIO(data)).read("codes.npy")
            archive.writestr("codes.npy", damaged(array[:160], draw) + array[160:])
        data = buffer.getvalue()
    else:
        data = damaged(data, draw)
    path.write_bytes(data)
    codes = tokens._alitok_codes(path, NUM_TOKENS, 10)
    assert codes.shape == (10, NUM_TOKENS), "silently shorter"
    list(tokens._checked((("x", 0, row) for row in codes), TOKENIZER))
    return "read"


def try_plain(draw: random.Random, folder: Path) -> str:
    row = np.arange(NUM_TOKENS) % CODEBOOK_SIZE
    npy = io.BytesIO()
    np.save(npy, row)
    files = {"npy": npy.getvalue(), "json": json.dumps(row.tolist()).encode(), "bin": row.astype("<u2").tobytes()}
    kind = draw.randrange(len(TOKEN_EXTENSIONS))
    try:
        found = decode_plain(
            damaged(files[TOKEN_EXTENSIONS[kind].rpartition(".")[2]], draw), kind, NUM_TOKENS, CODEBOOK_SIZE
        )
    except ValueError as error:  # what the reader of plain shards names with file and byte
        raise InputError("a sample cannot be read") from error
    assert found.shape == (NUM_TOKENS,)
    assert 0 <= found.min() <= found.max() < CODEBOOK_SIZE
    return "read"


KINDS: dict[str, tuple[Callable[[random.Random, Path], str], int, int]] = {
    "tar": (try_tar, 120, 3000),
    "image": (try_image, 250, 8000),
    "class map": (try_class_map, 300, 3000),
    "jsonl": (try_jsonl, 200, 2000),
    "alitok": (try_alitok, 200, 2000),
    "plain": (try_plain, 300, 2000),
}


def fuzz(kind: str, count: int, folder: Path) -> dict[str, int]:
    """How many of the inputs 0 .. count - 1 of a kind were read, and refused."""
    attempt = KINDS[kind][0]
    results = {"read": 0, "refused": 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        started = time.process_time()
        try:
            results[attempt(random.Random(f"{kind} {number}"), folder)] += 1
        except (InputError, BadImage) as error:
            message = str(error)
            assert "\n" not in message, (kind, number, message)
            assert len(message) < 1500 + len(str(folder)), (kind, number, len(message))
            results["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
        assert time.process_time() - started < SLOWEST_S, (kind, number)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    assert more < MOST_MEMORY, f"{kind}: {more / 2**20:.0f} MiB"
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_in_full_or_refused(tmp_path: Path, kind: str) -> None:
    results = fuzz(kind, KINDS[kind][1], tmp_path)
    assert min(results.values()) > 0, results


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_in_full_or_refused(tmp_path: Path, kind: str) -> None:
    started = time.monotonic()
    results = fuzz(kind, KINDS[kind][2], tmp_path)
    print(f"{kind}: {results}, {time.monotonic() - started:.0f} s, pid {os.getpid()}")
