"""Which files below a folder count as images, for every command; and how what is left out is said."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from helpers import run_alone
from PIL import Image

from rear_scale import progress
from rear_scale.config import DataConfig, InputError, TokenizerConfig
from rear_scale.evaluate.images.image_set import open_image_set
from rear_scale.shards import walk as walking
from rear_scale.shards.crops import EXTENSIONS, BadImage
from rear_scale.shards.reader import open_manifest
from rear_scale.shards.sources import open_source
from rear_scale.shards.tar_index import tar_shards
from rear_scale.shards.walk import HIDDEN, LEADS_BACK, LEADS_NOWHERE, LeftOut, shown, walk
from rear_scale.world import World

LATIN = os.fsdecode(b"caf\xe9.png")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), len(path.name), np.uint8)).save(path, "PNG")
    return path


def two_classes(folder: Path) -> Path:
    for name in ("a/0.png", "a/deep/1.png", "b/2.png"):
        picture(folder / name)
    return folder


def names(folder: Path) -> list[str]:
    return [file.name for file in walk(folder, EXTENSIONS).files]


@pytest.mark.parametrize(
    "hidden",
    [
        "a/.ipynb_checkpoints/0-checkpoint.png",
        "a/deep/.thumbnails/large/1.png",
        "a/._0.png",
        ".class/0.png",
        "__MACOSX/a/0.png",
        "a/lost+found/0.png",
        "b/@eaDir/2.png/SYNOPHOTO_THUMB_M.png",
        "$Recycle.Bin/0.png",
        "b/System Volume Information/0.png",
    ],
)
def test_hidden_names_and_folders_of_the_system_are_left_out_by_all(tmp_path: Path, hidden: str) -> None:
    folder = two_classes(tmp_path / "images")
    picture(folder / hidden)
    found = walk(folder, EXTENSIONS)
    assert [file.name for file in found.files] == ["a/0.png", "a/deep/1.png", "b/2.png"]
    assert found.left_out.counts == {HIDDEN: 1}
    source = open_source(folder)
    assert (len(source), source.class_names) == (3, ["a", "b"])
    assert run_alone(_count, folder) == 3


def _count(world: World, folder: Path) -> int:
    return open_image_set(folder, world).count


def test_a_link_is_followed_once_for_each_real_folder_whatever_the_names(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "images")
    elsewhere = tmp_path / "elsewhere"
    picture(elsewhere / "5.png")
    picture(elsewhere / "inner/6.png")
    for link, target in {
        "a/all": ".",
        "a/up": "..",
        "b/above": "../..",
        "b/neighbour": "../a/deep",
        "b/inner": elsewhere / "inner",
        "b/z": elsewhere,
        "b/zz": elsewhere,
        "root": ".",
    }.items():
        (folder / link).symlink_to(target)
    found = walk(folder, EXTENSIONS)
    assert [file.name for file in found.files] == ["a/0.png", "a/deep/1.png", "b/2.png", "b/inner/6.png", "b/z/5.png"]
    # a/all, a/up, b/above, b/neighbour, b/z/inner, b/zz and root.
    assert found.left_out.counts == {LEADS_BACK: 7}
    assert found.folders == ["a", "b"]
    assert open_source(folder).labels == [0, 0, 1, 1, 1]


def test_a_class_that_is_a_link_to_another_is_refused_as_an_empty_one(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "images")
    (folder / "c").symlink_to("a")
    with pytest.raises(
        InputError, match=r"1 of 3 class folders hold no readable files, c among them .left out: 1 links"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dangling", "a broken link"),
        ("itself", "Too many levels of symbolic links"),
        ("pipe", "not a regular file"),
        ("socket", "not a regular file"),
        ("latin", "its name is not UTF-8"),
        ("latin folder", "its name is not UTF-8"),
        ("link to a folder that is a file", "Not a directory"),
    ],
)
def test_files_that_cannot_be_read_are_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    folder = two_classes(tmp_path / "images")
    bad = folder / "b/3.png"
    if kind == "dangling":
        bad.symlink_to("/nowhere/x.png")
    elif kind == "itself":
        bad.symlink_to("3.png")
    elif kind == "pipe":
        os.mkfifo(bad)
    elif kind == "socket":
        monkeypatch.chdir(folder / "b")  # the path of a socket may have 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("3.png")
    elif kind == "latin":
        picture(folder / "b/x.png").rename(folder / "b" / LATIN)
    elif kind == "latin folder":
        picture(folder / "b/c/x.png").parent.rename(folder / "b" / LATIN.removesuffix(".png"))
    else:
        bad.symlink_to("2.png/x.png")
    source = open_source(folder)
    images = list(source.read(0, len(source)))
    assert len(images) == 4
    with pytest.raises(BadImage, match=reason):
        images[3].decode()
    assert images[3].name.isascii()
    with pytest.raises(InputError, match=rf"images/b/.*: {reason}, as for 1 of 4 images"):
        run_alone(_count, folder)


def test_a_file_that_goes_away_or_fails_after_the_listing_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two_classes(tmp_path / "images")
    source = open_source(folder)
    (folder / "a/0.png").unlink()
    whole = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "1.png":
            raise OSError(5, "Input/output error")
        if path.name == "2.png":
            raise MemoryError
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    problems = [image.problem for image in source.read(0, 3)]
    assert problems == ["No such file or directory", "Input/output error", "MemoryError"]


def test_a_folder_that_ends_like_an_image_is_none(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "images")
    (folder / "a/x.png").mkdir()
    picture(folder / "b/y.webp/z.png")
    assert names(folder) == ["a/0.png", "a/deep/1.png", "b/2.png", "b/y.webp/z.png"]


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_classes(tmp_path / "images")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(walking.os, "scandir", refuse)
    with pytest.raises(
        InputError, match=r"a/deep cannot be listed \(Permission denied\), so its files would be missing"
    ):
        open_source(folder)


def test_links_that_may_be_classes_and_lead_nowhere_are_refused(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "images")
    (folder / "a/sub").symlink_to("/nowhere/sub")
    assert walk(folder, EXTENSIONS).left_out.counts == {LEADS_NOWHERE: 1}
    (folder / "c").symlink_to("/nowhere/class")
    with pytest.raises(InputError, match="images/c is a broken link that may be a class"):
        open_source(folder)
    tars = tmp_path / "tars"
    tars.mkdir()
    (tars / "x.tar").symlink_to("/nowhere/x.tar")
    with pytest.raises(InputError, match="a broken link: .*x.tar"):
        open_source(tars)


def test_a_class_name_that_is_not_utf8_is_named_in_ascii(tmp_path: Path) -> None:
    folder = two_classes(tmp_path / "images")
    (folder / "a").rename(folder / LATIN.removesuffix(".png"))
    with pytest.raises(InputError, match=r"the class folder caf\\xe9 has a name that is not UTF-8") as caught:
        open_source(folder)
    assert str(caught.value).isascii()


def test_the_order_depends_on_the_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    for name in ("b/1.png", "a-1/0.png", "a/10.png", "a/2.png", "a/x/0.png", "a/x-1.png", "a b/1.png"):
        picture(folder / name)
    expected = ["a/10.png", "a/2.png", "a/x/0.png", "a/x-1.png", "a b/1.png", "a-1/0.png", "b/1.png"]
    assert names(folder) == expected
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return self.entries

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(walking.os, "scandir", Backwards)
    assert names(folder) == expected


def test_what_is_left_out_is_said_once_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.say_once.cache_clear()
    folder = two_classes(tmp_path / "images")
    for name in ("a/x.gif", "a/y.GIF", "b/notes.txt", "b/LICENSE", "b/.hidden", "b/._x"):
        (folder / name).write_bytes(b"x")
    picture(folder / "cover.png")
    for _ in range(2):
        open_source(folder).say_notes()
    assert capsys.readouterr().err == (
        f"note: {folder}: left out: 4 files of other formats (.gif 2, .txt 1, without extension 1; first: a/x.gif); "
        "2 hidden or system names (first: b/._x); 1 images outside of class folders (first: cover.png)\n"
    )
    run_alone(_count, folder)
    assert "left out: 4 files of other formats" in capsys.readouterr().err


def test_images_beside_tars_are_counted(tmp_path: Path) -> None:
    import webdataset

    picture(tmp_path / "a/beside.png")
    picture(tmp_path / "over.png")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as tar:
        tar.write({"__key__": "0", "png": (tmp_path / "over.png").read_bytes(), "cls": b"0", "gif": b"x"})
    assert len(open_source(tmp_path)) == 1
    assert "2 images beside tar shards (first: a/beside.png)" in open_source(tmp_path).left_out.line()
    assert run_alone(_count, tmp_path) == 1


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "X.TAR.ZST", "x.tar.xz", "x.tbz2"])
def test_compressed_tars_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for command in (
        lambda: tar_shards(tmp_path),
        lambda: open_source(tmp_path),
        lambda: open_manifest(str(tmp_path), TokenizerConfig(), DataConfig(train=str(tmp_path))),
        lambda: run_alone(_count, tmp_path),
    ):
        with pytest.raises(InputError, match=rf"{name} is compressed, but members of a tar are read by offset"):
            command()
    with pytest.raises(InputError, match=rf"{name} is compressed"):
        run_alone(_count, tmp_path / name)


def test_names_are_shown_on_one_line_of_ascii() -> None:
    for raw, text in (
        (b"caf\xe9\n\t\x1b[31m", "caf\\xe9\\n\\t\\x1b[31m"),
        ("é\u2028".encode(), "é\\u2028"),
        (b"a\\b", "a\\b"),
    ):
        assert shown(os.fsdecode(raw)) == text
    assert shown("\ud800") == "\\ud800"
    assert LeftOut().line() is None
