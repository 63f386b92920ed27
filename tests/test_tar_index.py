"""Tar files of any writer: what is understood is read in full, everything else is refused by name and byte."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import CODEBOOK_SIZE, NUM_TOKENS, run_alone
from PIL import Image

from rear_scale.config import InputError, TokenizerConfig
from rear_scale.evaluate.images.image_set import open_image_set
from rear_scale.shards.images import open_images, write_images
from rear_scale.shards.plain import index_plain
from rear_scale.shards.sources import open_source
from rear_scale.shards.tar_index import members, read_member, scan
from rear_scale.shards.walk import HIDDEN, LeftOut
from rear_scale.world import World

LONG = "/".join(["folder of a long name"] * 12)


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write(path: Path, *entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return path


def five_images(path: Path) -> Path:
    return write(path, *(part for n in range(5) for part in (entry(f"{n}.cls", b"1"), entry(f"{n}.png", png(n)))))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.png", "./a.png", "/x/a.png", "é.png", f"{'n' * 90}.png", f"{LONG}/{'f' * 40}.png"])
def test_names_of_every_form_are_read(tmp_path: Path, form: int, name: str) -> None:
    if form == tarfile.USTAR_FORMAT and len(name) > 255:
        name = name[-150:]
    path = write(tmp_path / "x.tar", entry(name, b"content"), entry("z.png", b"next"), form=form)
    found = members(path)
    assert [member.name for member in found] == [name.removeprefix("./").removeprefix("/"), "z.png"]
    assert [read_member(path, member.location) for member in found] == [b"content", b"next"]


def test_sizes_and_names_of_pax_records_count(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", entry("short", b"12345678", pax_headers={"path": "é/a.png", "size": "8"}))
    assert members(path) == [("é/a.png", 3 * 512, 8)]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_tars_of_the_tar_command_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / LONG).mkdir(parents=True)
    (folder / LONG / "a.png").write_bytes(b"a" * 600)
    (folder / "b.png").write_bytes(b"b")
    os.link(folder / "b.png", folder / "c.png")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"c")
    with open(folder / "sparse.png", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    for options in (["--format=gnu"], ["--format=pax"], ["--format=gnu", "-V", "label"], ["-b", "100"]):
        subprocess.run(["tar", *options, "--sort=name", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True)
        content = {
            member.name: read_member(tmp_path / "x.tar", member.location) for member in members(tmp_path / "x.tar")
        }
        assert content == {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
    for form in ("gnu", "pax"):
        subprocess.run(["tar", f"--format={form}", "-Scf", tmp_path / "x.tar", "-C", folder, "sparse.png"], check=True)
        with pytest.raises(InputError, match=r"x.tar, byte \d+: .*sparse.png is a sparse file.*without --sparse"):
            members(tmp_path / "x.tar")


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a header": (lambda data: damaged(data, 4 * 512), r"x\.tar is damaged at byte 2048: not a tar header"),
    "the first header": (lambda data: damaged(data, 5), r"x\.tar is damaged at byte 0"),
    "a size": (lambda data: damaged(data, 4 * 512 + 130), r"x\.tar is damaged at byte 2048"),
    "a header of zeros": (
        lambda data: data[:2048] + bytes(512) + data[2560:],
        "has data after its end mark at byte 2048",
    ),
    "cut in a member": (lambda data: data[: 5 * 512 + 9], r"x\.tar is truncated at byte 2569"),
    "cut between members": (lambda data: data[: 4 * 512], r"x\.tar is truncated at byte 2048: it has no end mark"),
    "cut in a header": (lambda data: data[: 4 * 512 + 100], r"x\.tar is truncated at byte 2148"),
    "two tars in one": (lambda data: data + data, r"x\.tar has data after its end mark .*tar --concatenate"),
    "rubbish behind": (lambda data: data + b"\0" * 5000 + b"x", "has data after its end mark"),
    "nothing": (lambda data: b"", r"x\.tar is damaged at byte 0: not a tar header"),
    "gzip": (gzip.compress, r"x\.tar is compressed \(gzip\).*Unpack it"),
    "bzip2": (bz2.compress, r"x\.tar is compressed \(bzip2\)"),
    "xz": (lzma.compress, r"x\.tar is compressed \(xz\)"),
    "zstd": (lambda data: b"\x28\xb5\x2f\xfd" + data, r"x\.tar is compressed \(zstd\)"),
    "zip": (lambda data: b"PK\x03\x04" + data, r"x\.tar is a zip file"),
    "a page": (lambda data: b"<!DOCTYPE html><title>404</title>" + data, r"x\.tar is an HTML page"),
    "git-lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", r"x\.tar is a git-lfs pointer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_damage_is_refused_by_every_command(tmp_path: Path, change: str) -> None:
    path = five_images(tmp_path / "x.tar")
    function, message = CHANGES[change]
    path.write_bytes(function(path.read_bytes()))
    tokenizer = TokenizerConfig(num_tokens=NUM_TOKENS, codebook_size=CODEBOOK_SIZE)
    for command in (
        lambda: open_source(tmp_path),
        lambda: run_alone(_score, tmp_path),
        lambda: run_alone(_score, path),
        lambda: index_plain(tmp_path, tokenizer, tmp_path, on_error="raise", max_skipped_fraction=0.0),
    ):
        with pytest.raises(InputError, match=message) as caught:
            command()
        assert "\n" not in str(caught.value)


def _score(world: World, path: Path) -> tuple[int, list[int] | None]:
    found = open_image_set(path, world)
    parts = [found.read(block)[1] for block in found.blocks]
    return found.count, None if parts[0] is None else np.concatenate(parts).tolist()


def test_our_own_image_shards_are_read_by_the_same_rules(tmp_path: Path) -> None:
    images = [(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), 0)] * 3
    shard = write_images(tmp_path / "set", images, 8, ["a"]).folder / "shard-000000.tar"
    whole = shard.read_bytes()
    for change in ("a header", "cut in a member", "cut between members", "gzip"):
        shard.write_bytes(CHANGES[change][0](whole))
        with pytest.raises(InputError, match="shard-000000.tar is"):
            open_images(tmp_path / "set").load()
    shard.write_bytes(whole)
    with tarfile.open(shard, "a") as tar:
        tar.addfile(*(lambda info, data: (info, io.BytesIO(data)))(*entry("9.png", png(1))))
    with pytest.raises(InputError, match="holds 4 images, but index.json says 3"):
        open_images(tmp_path / "set").load()


def test_links_are_resolved_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    hard = entry("b.png", kind=tarfile.LNKTYPE, linkname="./a.png")
    write(path, entry("a.png", b"1234"), hard)
    assert members(path) == [("a.png", 512, 4), ("b.png", 512, 4)]
    for link, message in (
        (entry("b.png", kind=tarfile.SYMTYPE, linkname="a.png"), "b.png is a link to a.png.*--dereference"),
        (entry("b.png", kind=tarfile.LNKTYPE, linkname="/etc/passwd"), "a link to /etc/passwd, which is not before it"),
        (entry("b.png", kind=tarfile.FIFOTYPE), "b.png is of type b'6', which is not a file"),
        (entry("b.png", kind=tarfile.CHRTYPE), "b.png is of type b'3'"),
        (entry("../b.png", b"x"), r"'../b.png' is not a path inside of a folder"),
    ):
        write(path, entry("a.png", b"1234"), link)
        with pytest.raises(InputError, match=message):
            members(path)


def test_a_member_or_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for entries, message in (
        ([entry("a.png", b"1"), entry("b.png"), entry("./a.png", b"2")], r"a.png occurs twice, again at byte \d+"),
        ([entry("a.png"), entry("b.png"), entry("a.cls")], r"the key a occurs again at byte \d+.*tar --sort=name"),
        ([entry("a.png"), entry("a.PNG")], "the key a has .png twice"),
        ([entry("d/a.b.png"), entry("d/c.png"), entry("d/a.c.png")], "the key d/a occurs again"),
    ):
        write(path, *entries)
        with pytest.raises(InputError, match=message):
            scan(path)


def test_hidden_members_and_folders_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tar",
        entry("./", kind=tarfile.DIRTYPE),
        entry("./a", kind=tarfile.DIRTYPE),
        entry("./a/0.png", png(1)),
        entry("./a/._0.png", b"x"),
        entry("__MACOSX/a/0.png", b"x"),
        entry("a/.thumbnails/0.png", b"x"),
        entry("a/.link.png", kind=tarfile.SYMTYPE, linkname="0.png"),
        entry("README", b"x"),
    )
    left_out = LeftOut()
    assert [sample.key for sample in scan(path, left_out)] == ["a/0"]
    assert left_out.counts == {HIDDEN: 4, "files of other formats": 1}


def test_tars_of_webdataset_in_all_its_forms(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n:03d}", "png": png(n), "cls": str(n), "json": b"{}"} for n in range(3)]
    for name in ("x.tar", "x.tar.gz"):
        folder = tmp_path / name
        folder.mkdir()
        with webdataset.TarWriter(f"{folder}/{name}") as tar:
            for sample in samples:
                tar.write(sample)
    assert [image.label for image in open_source(tmp_path / "x.tar").read(0, 3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"x\.tar\.gz is compressed"):
        open_source(tmp_path / "x.tar.gz")


def test_images_of_a_key_are_one_or_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write(path, entry("0.cls", b"3"), entry("0.png", png(0)), entry("0.mask.png", png(1)))
    assert run_alone(_score, path) == (1, [3])
    write(path, *(entry(f"a.{n}.{kind}", data) for n in range(3) for kind, data in (("png", png(n)), ("cls", b"2"))))
    assert run_alone(_score, path) == (3, [2, 2, 2])
    write(path, entry("0.png", png(0)), entry("0.webp", png(1)), entry("0.cls", b"3"))
    with pytest.raises(InputError, match=r"the key 0 has several images \(png, webp\)"):
        run_alone(_score, path)
    image = next(open_source(tmp_path).read(0, 1))
    assert image.problem == "it has png, webp, cls, but needs one image (png, jpg, jpeg, webp, bmp) and cls"


def test_a_name_that_is_not_utf8_is_a_bad_image(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write(tmp_path / "x.tar", entry(f"{name}.cls", b"1"), entry(f"{name}.png", png(0)), form=form)
        image = next(open_source(tmp_path).read(0, 1))
        assert (image.name, image.problem) == ("x.tar/caf\\xe9", "its name is not UTF-8")
        with pytest.raises(InputError, match="its name is not UTF-8, as for 1 of 1 images"):
            run_alone(_score, tmp_path / "x.tar")


def test_a_class_that_the_map_lacks_is_refused_and_one_that_is_none_is_a_bad_image(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", entry("0.cls", "²".encode()), entry("0.png", png(0)))
    assert "which is not a class id" in next(open_source(tmp_path).read(0, 1)).problem
    (tmp_path / "map").write_text("cat 0")
    write(tmp_path / "x.tar", entry("0.cls", b"dog"), entry("0.png", png(0)))
    with pytest.raises(InputError, match=r"cls is 'dog', which is not in the class map"):
        next(open_source(tmp_path, tmp_path / "map").read(0, 1))


def header(name: bytes = b"a.png", size: bytes = b"00000000010\0", kind: bytes = b"0") -> bytes:
    """A tar header with the right checksum."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124 : 124 + len(size)] = name, b"0000644\0", size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(size=b"\xff" * 12), "a size of -1"),
        (header(size=b"\xff" + b"\x80" + b"\0" * 10), "a size of -"),
        (header(size=b"\x80" + b"\x7f" * 11), "truncated at byte|a size of"),
        (header(kind=b"x", size=b"\x80" + b"\0" * 3 + b"\x10" * 8), "an extension record of"),
        (header(kind=b"x", size=b"\xff" * 12), "an extension record of -1 bytes"),
        (header(kind=b"x", size=b"00000001000\0") + b"0 path=x\n".ljust(512, b"\0"), "a malformed pax record"),
        (header(kind=b"x", size=b"00000001000\0") + b"11 size=-5\n".ljust(512, b"\0") + header(), "a size of -5"),
        (header(kind=b"g", size=b"00000001000\0") + b"10 path=x\n".ljust(512, b"\0") + header(), "names all members"),
        (header(kind=b"L", size=b"00000001000\0") + b"x".ljust(512, b"\0"), "a member's header is missing"),
        (
            2 * (header(kind=b"L", size=b"00000000005\0") + b"a.png".ljust(512, b"\0")) + header(),
            "the member before it is missing",
        ),
        (
            header(kind=b"L", size=b"00000000005\0") + b"a\0png".ljust(512, b"\0") + header(),
            "a malformed long name",
        ),
        (header(name=b"\0"), "is not a path inside of a folder"),
        (header(kind=b"Z"), "of type b'Z'"),
    ],
)
def test_headers_that_lead_readers_astray_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.tar").write_bytes(data + bytes(1024))
    with pytest.raises(InputError, match=message):
        members(tmp_path / "x.tar")


@pytest.mark.timeout(20)
def test_long_records_take_time_in_proportion(tmp_path: Path) -> None:
    records = b"5 a=\n" * 200_000
    data = header(kind=b"x", size=b"%011o\0" % len(records)) + records.ljust(-(-len(records) // 512) * 512, b"\0")
    name = b"a/" * 300_000
    long = header(kind=b"L", size=b"%011o\0" % len(name)) + name.ljust(-(-len(name) // 512) * 512, b"\0")
    content = b"0123456789".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(data + header() + content + long + header() + content + bytes(1024))
    assert [len(member.name) for member in members(tmp_path / "x.tar")] == [5, 599_999]
