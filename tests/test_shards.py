from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import CODEBOOK_SIZE, NUM_CLASSES, NUM_TOKENS, write_token_shards
from PIL import Image

from rear_scale.config import InputError
from rear_scale.files import unfinished
from rear_scale.locks import locked
from rear_scale.shards import writer
from rear_scale.shards.images import open_images, write_images
from rear_scale.shards.reader import BatchOrder, check_fits, open_tokens
from rear_scale.shards.record import BLOCK_SAMPLES, SHARD_SAMPLES, read_codebook, read_manifest
from rear_scale.shards.tar_index import scan


def test_webdataset_itself_reads_the_shards(tmp_path: Path) -> None:
    tokens = np.arange(5000 * 3).reshape(5000, 3) % 60_000
    labels = np.arange(5000) % 7
    writer.write_shard(tmp_path, 2, tokens, labels, source="test")
    blocks = list(webdataset.WebDataset(str(tmp_path / "shard-000002.tar"), shardshuffle=False).decode())
    assert [block["__key__"] for block in blocks] == ["00000016", "00000017"]
    assert [len(block["label.npy"]) for block in blocks] == [BLOCK_SAMPLES, 5000 - BLOCK_SAMPLES]
    assert blocks[0]["tokens.npy"].dtype == np.uint16
    assert np.array_equal(np.concatenate([block["tokens.npy"] for block in blocks]), tokens)
    assert np.array_equal(np.concatenate([block["label.npy"] for block in blocks]), labels)


def test_two_writers_of_a_file_do_not_share_its_unfinished_name(tmp_path: Path) -> None:
    """As two containers do, whose processes have the same numbers."""
    one, other = unfinished(tmp_path / "block.npz"), unfinished(tmp_path / "block.npz")
    assert one != other
    assert one.parent == other.parent == tmp_path
    assert one.suffix == ".part"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        writer.write_shard(tmp_path / name, 0, np.ones((10, 4), int), np.ones(10, int), source=name)
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_a_finished_shard_is_found_only_intact_and_of_the_same_source(tmp_path: Path) -> None:
    shard = writer.write_shard(tmp_path, 0, np.ones((10, 4), int), np.arange(10) % 3, source="weights 1")
    found = writer.finished_shard(tmp_path, 0, source="weights 1")
    assert found is not None
    assert found[0] == shard
    assert found[1].tolist() == [4, 3, 3]
    assert writer.finished_shard(tmp_path, 0, source="weights 2") is None
    assert writer.finished_shard(tmp_path, 1, source="weights 1") is None
    data = bytearray((tmp_path / shard.file).read_bytes())
    data[600] ^= 1
    (tmp_path / shard.file).write_bytes(data)
    assert writer.finished_shard(tmp_path, 0, source="weights 1") is None


def test_shard_ranges_cover_everything_once() -> None:
    ranges = list(writer.shard_ranges(SHARD_SAMPLES * 2 + 5))
    assert ranges == [
        (0, 0, SHARD_SAMPLES),
        (1, SHARD_SAMPLES, 2 * SHARD_SAMPLES),
        (2, 2 * SHARD_SAMPLES, 2 * SHARD_SAMPLES + 5),
    ]


def test_a_set_is_read_back_in_order_over_several_shards(tmp_path: Path) -> None:
    folder = write_token_shards(tmp_path / "set", SHARD_SAMPLES + 100, seed=3)
    assert len(read_manifest(folder).shards) == 2
    opened = open_tokens(folder, str(tmp_path / "cache"))
    blocks = [
        block
        for shard in read_manifest(folder).shards
        for block in webdataset.WebDataset(str(folder / shard.file), shardshuffle=False).decode()
    ]
    assert np.array_equal(opened.tokens, np.concatenate([block["tokens.npy"] for block in blocks]))
    assert np.array_equal(opened.labels, np.concatenate([block["label.npy"] for block in blocks]))
    tokens, labels = opened.rows(torch.tensor([SHARD_SAMPLES + 3, 5]))
    assert tokens.dtype == labels.dtype == torch.int64
    assert np.array_equal(tokens.numpy(), opened.tokens[[SHARD_SAMPLES + 3, 5]])


def test_the_unpacked_set_is_used_again(tmp_path: Path, tokens: Path) -> None:
    said: list[str] = []
    open_tokens(tokens, str(tmp_path), said.append)
    assert len(said) == 1
    open_tokens(tokens, str(tmp_path), said.append)
    assert len(said) == 1
    # Left by a process that was killed when all was there; one that is held stays.
    (whole,) = tmp_path.iterdir()
    lock = whole.with_name(f"{whole.name}.lock")
    lock.touch()
    open_tokens(tokens, str(tmp_path), said.append)
    assert not lock.exists()
    with locked(lock):
        open_tokens(tokens, str(tmp_path), said.append)
        assert lock.exists()


def test_a_folder_name_with_braces_or_spaces_is_no_pattern(tmp_path: Path) -> None:
    folder = write_token_shards(tmp_path / "odd {a,b} name::x", 20)
    assert len(open_tokens(folder, str(tmp_path / "cache"))) == 20


def test_damage_is_named(tmp_path: Path) -> None:
    tokens = write_token_shards(tmp_path / "intact", 50)

    def broken(change) -> str:
        folder = write_token_shards(tmp_path / f"set{len(list(tmp_path.iterdir()))}", 50)
        change(folder)
        with pytest.raises(InputError) as caught:
            read_codebook(folder, read_manifest(folder))
            open_tokens(folder, str(tmp_path / "cache"))
        return str(caught.value)

    def flip(path: Path, at: int | None = None) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if at is None else at] ^= 1
        path.write_bytes(data)

    shard = "shard-000000.tar"
    assert "not found" in broken(lambda folder: (folder / shard).unlink())
    assert "is truncated or altered" in broken(lambda folder: (folder / shard).write_bytes(b"x" * 100))
    assert "has data after its end mark" in broken(lambda folder: flip(folder / shard))
    # Behind the 50 labels and the header of their file, where no block has a byte.
    place = scan(tokens / shard)[0].members["label.npy"]
    assert "checksum" in broken(lambda folder: flip(folder / shard, sum(place)))
    assert "codebook.npy" in broken(lambda folder: flip(folder / "codebook.npy"))
    assert "codebook.npy" in broken(lambda folder: (folder / "codebook.npy").unlink())
    assert "index.json" in broken(lambda folder: (folder / "index.json").unlink())
    assert "not valid JSON" in broken(lambda folder: (folder / "index.json").write_text("{"))
    assert "format" in broken(lambda folder: (folder / "index.json").write_text("{}"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_samples": "x"}, "num_samples='x' is not a whole number"),
        ({"num_samples": -1}, "num_samples=-1 is not a whole number"),
        ({"num_samples": 50}, "num_samples=50, but its 1 shards hold 60"),
        ({"crops_per_image": 0}, "crops_per_image=0 is not a whole number of at least 1"),
        ({"num_tokens": True}, "num_tokens=True"),
        ({"label_counts": 3}, "label_counts=3 is not a list"),
        ({"label_counts": [1, "x"]}, "are not whole numbers"),
        ({"label_counts": [1, 2]}, "but label_counts sum to 3"),
        ({"shards": []}, "but its 0 shards hold 0"),
        ({"shards": 3}, "shards=3 is not a list"),
    ],
)
def test_a_manifest_whose_counts_cannot_be_is_named(tmp_path: Path, change: dict, expected: str) -> None:
    folder = write_token_shards(tmp_path / "set", 60)
    values = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(InputError) as caught:
        read_manifest(folder)
    assert expected in str(caught.value)
    assert str(folder / "index.json") in str(caught.value)


def test_a_cache_folder_of_somebody_else_is_not_trusted(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    open_tokens(tokens)
    user = os.getuid() + 1
    (tmp_path / f"rear_scale-{user - 1}").rename(tmp_path / f"rear_scale-{user}")
    monkeypatch.setattr("os.getuid", lambda: user)
    with pytest.raises(InputError, match=f"rear_scale-{user} belongs to another user.* Set data.cache_dir"):
        open_tokens(tokens)
    open_tokens(tokens, str(tmp_path / "own"))


def test_too_little_space_is_named(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(InputError, match="data.cache_dir"):
        open_tokens(tokens, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_shards_of_another_tokenizer_are_refused_with_both_values(tokens: Path) -> None:
    manifest = read_manifest(tokens)
    fits = {"codebook_size": CODEBOOK_SIZE, "num_tokens": NUM_TOKENS, "codebook_dim": 8, "num_classes": NUM_CLASSES}
    check_fits(manifest, "folder", **fits)
    check_fits(manifest, "folder", **{**fits, "num_classes": 1000})
    with pytest.raises(InputError, match="folder holds no samples"):
        check_fits(dataclasses.replace(manifest, num_samples=0), "folder", **fits)
    for name, value in (("codebook_size", 64), ("num_tokens", 17), ("codebook_dim", 4), ("num_classes", 3)):
        with pytest.raises(InputError, match=rf"{name}={value}, but the shards in folder have {fits[name]}"):
            check_fits(manifest, "folder", **{**fits, name: value})


@pytest.mark.parametrize(("samples", "batch"), [(100, 12), (7, 12), (12, 12)])
def test_every_sample_comes_once_per_epoch(samples: int, batch: int) -> None:
    order = BatchOrder(samples, batch, seed=0)
    steps = [order.global_batch(step) for step in range(1, 3 * samples // batch + 4)]
    ids, epochs = (torch.cat(part) for part in zip(*steps, strict=True))
    for epoch in range(3):
        assert sorted(ids[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))
        assert (epochs[epoch * samples : (epoch + 1) * samples] == epoch).all()
    assert samples < 12 or ids[:samples].tolist() != ids[samples : 2 * samples].tolist()


def test_the_order_does_not_depend_on_ranks_or_micro_steps() -> None:
    order = BatchOrder(1000, 72, seed=5)
    for step in (1, 2, 13, 14, 15):
        whole, epochs = order.global_batch(step)
        for world_size in (1, 2, 3, 8):
            for micro_steps in (1, 3):
                parts = [
                    part
                    for rank in range(world_size)
                    for part in order.rank_batches(step, rank, world_size, micro_steps)
                ]
                assert torch.equal(torch.cat([ids for ids, _ in parts]), whole)
                assert torch.equal(torch.cat([epoch for _, epoch in parts]), epochs)
                assert len({len(ids) for ids, _ in parts}) == 1


def test_another_seed_is_another_order() -> None:
    assert not torch.equal(
        BatchOrder(1000, 24, seed=0).global_batch(1)[0], BatchOrder(1000, 24, seed=1).global_batch(1)[0]
    )


def test_images_are_read_back_from_any_place(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2050, 8, 8, 3), dtype=np.uint8)
    write_images(
        tmp_path / "set",
        ((Image.fromarray(image), number % 3) for number, image in enumerate(pixels)),
        8,
        ["a", "b", "c"],
    )
    shards = open_images(tmp_path / "set")
    assert (len(shards), len(shards.shards), shards.label_counts) == (2050, 3, [684, 683, 683])
    images, labels = next(shards.batches(60, 990, 1050))
    assert np.array_equal(images, pixels[990:1050])
    assert labels.tolist() == [number % 3 for number in range(990, 1050)]
    assert [len(batch) for batch, _ in shards.batches(1000)] == [1000, 1000, 50]
    sample = next(
        iter(webdataset.WebDataset(str(tmp_path / "set/shard-000001.tar"), shardshuffle=False).decode("rgb8"))
    )
    assert np.array_equal(sample["png"], pixels[1000])
    assert sample["cls"] == 1000 % 3


def test_a_set_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="index.json lists no images"):
        write_images(tmp_path / "set", iter(()), 8, ["a"]).load()


def test_damaged_images_are_named(tmp_path: Path) -> None:
    images = ((Image.fromarray(np.zeros((8, 8, 3), np.uint8)), 0) for _ in range(3))
    folder = write_images(tmp_path / "set", images, 8, ["a"]).folder
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("00000000.png"))
    with pytest.raises(InputError, match="shard-000000.tar holds 1 images, but index.json says 3"):
        open_images(folder).load()
    folder = write_images(tmp_path / "one", [(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), 0)], 8, ["a"]).folder
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("00000000.png"))
    with pytest.raises(InputError, match="shard-000000.tar, image 1"):
        open_images(folder).load()
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep, "PNG")
    for data, expected in ((deep.getvalue(), "more than 8 bits per value"), (b"no image", "not an image")):
        with tarfile.open(folder / "shard-000000.tar", "w") as tar:
            for name, content in (("00000000.png", data), ("00000000.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with pytest.raises(InputError, match=f"image 1: {expected}"):
            open_images(folder).load()
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(InputError, match="not found"):
        open_images(folder).load()
