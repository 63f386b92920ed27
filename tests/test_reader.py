"""Both modes of the reader over packed, plain and remote shards, and what damage does to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from helpers import CODEBOOK_DIM, CODEBOOK_SIZE, NUM_TOKENS, write_token_shards

from rear_scale.config import DataConfig, InputError, TokenizerConfig
from rear_scale.shards import writer
from rear_scale.shards.reader import TokenSet, open_manifest, open_set, open_tokens
from rear_scale.shards.record import read_manifest, write_manifest
from rear_scale.shards.tar_index import scan

TOKENIZER = TokenizerConfig("synthetic", None, 16, NUM_TOKENS, CODEBOOK_SIZE, CODEBOOK_DIM)
BATCH = 24


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """500 samples in 5 shards of 2 blocks."""
    folder = write_token_shards(tmp_path / "packed", 500)
    whole = open_tokens(folder, str(tmp_path / "whole"))
    (folder / "shard-000000.tar").unlink()
    shards = []
    block, writer.BLOCK_SAMPLES = writer.BLOCK_SAMPLES, 60
    try:
        for index, first, end in writer.shard_ranges(500, 100):
            labels = np.asarray(whole.labels[first:end]).astype(int)
            shards.append(
                writer.write_shard(folder, index, whole.tokens[first:end], labels, source="x", samples_per_shard=120)
            )
    finally:
        writer.BLOCK_SAMPLES = block
    write_manifest(folder, replace(read_manifest(folder), shards=shards, block_samples=60, samples_per_shard=100))
    writer.remove_records(folder)
    return folder


def data_config(folder: Path | str, tmp_path: Path, mode: str, **fields) -> DataConfig:
    return DataConfig(
        train=str(folder), mode=mode, cache_dir=str(tmp_path / "cache"), shuffle_streams=6, buffer_samples=20, **fields
    )


def opened(data: DataConfig, world_size: int = 1, say: Callable[[str], None] = lambda line: None) -> TokenSet:
    return open_set(data, open_manifest(data.train, TOKENIZER, data), world_size, say)


def sequence(tokens: TokenSet, steps: range) -> tuple[torch.Tensor, torch.Tensor]:
    order = tokens.order(BATCH, seed=0)
    rows = [tokens.rows(order.global_batch(step)[0]) for step in steps]
    return torch.cat([row for row, _ in rows]), torch.cat([label for _, label in rows])


def write_plain(folder: Path, tokens: TokenSet, kind: str) -> Path:
    """The same samples as ordinary WebDataset shards."""
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/part-%03d.tar", maxcount=130, verbose=0) as out:
        for number in range(len(tokens)):
            rows, labels = tokens.rows(torch.tensor([number]))
            values = rows[0].numpy()
            content = {
                "tokens.npy": values.astype(np.uint16),
                "npy": values,
                "bin": values.astype("<u2").tobytes(),
                "tokens.bin": values.astype("<i4").tobytes(),
                "json": values.tolist(),
            }[kind]
            out.write({"__key__": f"{number:06d}", kind: content, "cls": int(labels[0])})
    return folder


@pytest.mark.parametrize("mode", ["mmap", "stream"])
def test_both_modes_give_what_the_order_says_at_any_world(tmp_path: Path, packed: Path, mode: str) -> None:
    whole = open_tokens(packed, str(tmp_path / "cache"))
    tokens = opened(data_config(packed, tmp_path, mode))
    order = tokens.order(BATCH, seed=0)
    steps = range(1, 2 * 500 // BATCH + 2)
    expected = [order.global_batch(step)[0] for step in steps]
    for world_size in (1, 2, 3, 8):
        ranks = [opened(data_config(packed, tmp_path, mode), world_size) for _ in range(world_size)]
        for step, ids in zip(steps, expected, strict=True):
            parts = [
                own.rows(own.order(BATCH, seed=0).rank_batches(step, rank, world_size, 1)[0][0])
                for rank, own in enumerate(ranks)
            ]
            assert np.array_equal(torch.cat([rows for rows, _ in parts]), whole.tokens[ids.numpy()])
            assert np.array_equal(torch.cat([labels for _, labels in parts]), whole.labels[ids.numpy()])


@pytest.mark.parametrize("mode", ["mmap", "stream"])
@pytest.mark.parametrize("kind", ["tokens.npy", "npy", "bin", "tokens.bin", "json"])
def test_plain_webdataset_shards_are_read_in_the_same_order(tmp_path: Path, mode: str, kind: str) -> None:
    folder = write_token_shards(tmp_path / "packed", 300)
    plain = write_plain(tmp_path / "plain", open_tokens(folder, str(tmp_path / "cache")), kind)
    ours, theirs = (opened(data_config(path, tmp_path, mode)) for path in (folder, plain))
    steps = range(1, 27)
    if mode == "mmap":  # a stream's order follows the cut into shards
        for found, expected in zip(sequence(theirs, steps), sequence(ours, steps), strict=True):
            assert torch.equal(found, expected)
    everything = torch.arange(300)
    for found, expected in zip(theirs.rows(everything), ours.rows(everything), strict=True):
        assert torch.equal(found, expected)
    manifest = theirs.manifest
    assert (manifest.num_samples, len(manifest.shards), manifest.layout) == (300, 3, "plain")
    assert manifest.label_counts == ours.manifest.label_counts


def test_a_stream_of_equal_plain_shards_has_the_order_of_packed_ones(tmp_path: Path, packed: Path) -> None:
    tokens = opened(data_config(packed, tmp_path, "stream"))
    folder = tmp_path / "plain"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/part-%03d.tar", maxcount=100, verbose=0) as out:
        for number, (row, label) in enumerate(zip(*tokens.rows(torch.arange(500)), strict=True)):
            out.write({"__key__": f"{number}", "tokens.npy": row.numpy(), "cls": int(label)})
    theirs = opened(data_config(folder, tmp_path, "stream"))
    for found, expected in zip(sequence(theirs, range(1, 45)), sequence(tokens, range(1, 45)), strict=True):
        assert torch.equal(found, expected)


def test_an_index_is_made_again_when_a_shard_changes_and_kept_when_not(tmp_path: Path) -> None:
    source = open_tokens(write_token_shards(tmp_path / "packed", 40), str(tmp_path / "cache"))
    plain = write_plain(tmp_path / "plain", source, "bin")
    data = data_config(plain, tmp_path, "mmap")
    first = open_manifest(str(plain), TOKENIZER, data)
    made = (plain / "offsets.json").stat().st_mtime_ns
    assert open_manifest(str(plain), TOKENIZER, data) == first
    assert (plain / "offsets.json").stat().st_mtime_ns == made
    shutil.copy(plain / "part-000.tar", plain / "part-001.tar")
    assert open_manifest(str(plain), TOKENIZER, data).num_samples == 80


def test_plain_samples_that_do_not_fit_are_named_with_their_byte(tmp_path: Path) -> None:
    for number, (sample, message) in enumerate(
        (
            ({"bin": b"12345", "cls": 1}, "5 bytes are not 16 integers"),
            ({"json": [CODEBOOK_SIZE] * NUM_TOKENS, "cls": 1}, "a token is outside 0..31"),
            ({"npy": np.zeros(NUM_TOKENS), "cls": 1}, "float64"),
            ({"json": [0] * NUM_TOKENS, "cls": "dog"}, "cls is 'dog'"),
            ({"json": [0] * NUM_TOKENS}, "needs tokens .* and cls"),
        )
    ):
        folder = tmp_path / f"plain{number}"
        folder.mkdir()
        with webdataset.TarWriter(f"{folder}/a.tar") as tar:
            for key in range(200):
                tar.write({"__key__": f"a{key}", "json": [key % CODEBOOK_SIZE] * NUM_TOKENS, "cls": 0})
            tar.write({"__key__": "b", **sample})
        byte = scan(folder / "a.tar")[-1].first_byte
        data = data_config(folder, tmp_path, "stream")
        with pytest.raises(InputError, match=rf"a.tar, byte {byte}: sample b: .*{message}"):
            open_manifest(str(folder), TOKENIZER, data)
        skipping = replace(data, on_error="skip")
        manifest = open_manifest(str(folder), TOKENIZER, skipping)
        assert (manifest.num_samples, manifest.num_skipped) == (200, 1)
        (folder / "offsets.json").unlink()
        with pytest.raises(InputError, match="1 of 201 samples"):
            open_manifest(str(folder), TOKENIZER, replace(skipping, max_skipped_fraction=0.001))


def damage(folder: Path, what: str) -> tuple[str, int]:
    """Damages the third shard; its file and the byte that an error should name."""
    path = folder / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    block = scan(path)[1].first_byte
    offset = scan(path)[1].members["tokens.npy"][0]
    if what == "missing":
        path.unlink()
        return path.name, 0
    if what == "truncated":
        path.write_bytes(data[:3000])
        return path.name, 3000
    if what == "header":
        data[offset - 512 : offset - 400] = b"x" * 112
        path.write_bytes(data)
        return path.name, offset - 512
    data[offset + 300] ^= 1
    path.write_bytes(data)
    return path.name, block


@pytest.mark.parametrize("mode", ["mmap", "stream"])
@pytest.mark.parametrize("what", ["missing", "truncated", "header", "flipped"])
def test_damage_is_an_error_with_file_and_byte_or_is_skipped_up_to_a_bound(
    tmp_path: Path, packed: Path, mode: str, what: str
) -> None:
    expected = open_tokens(packed, str(tmp_path / "intact"))
    name, byte = damage(packed, what)
    everything = torch.arange(500)
    raising = data_config(packed, tmp_path, mode)
    place = name if what == "missing" else rf"{name}.*byte {byte}\b"
    with pytest.raises(InputError, match=place):
        opened(raising).rows(everything)
    said: list[str] = []
    skipping = replace(raising, on_error="skip", max_skipped_fraction=0.2)
    tokens = opened(skipping, say=said.append)
    found, labels = tokens.rows(everything)
    lost = range(260, 300) if what == "flipped" else range(200, 300)
    kept = [number for number in range(500) if number not in lost]
    assert np.array_equal(found[kept], expected.tokens[kept])
    assert np.array_equal(labels[kept], expected.labels[kept])

    # In the place of lost samples stand whole other ones.
    def samples(rows, classes) -> set[tuple[int, ...]]:
        return {(*row, label) for row, label in zip(rows.tolist(), classes.tolist(), strict=True)}

    assert samples(found[list(lost)], labels[list(lost)]) <= samples(expected.tokens[kept], expected.labels[kept])
    assert any(name in line for line in said if line.startswith("skipped"))
    if mode == "mmap":
        said.clear()
        opened(skipping, say=said.append)
        assert [line for line in said if line.startswith("skipped")], "the second start says nothing of it"
        with pytest.raises(InputError, match=place):
            opened(raising)
        shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match="more than data.max_skipped_fraction=0.01"):
        opened(replace(skipping, max_skipped_fraction=0.01)).rows(everything)


@pytest.mark.parametrize("mode", ["mmap", "stream"])
def test_a_pipe_is_read_as_a_folder_is(tmp_path: Path, packed: Path, mode: str) -> None:
    url = f"pipe:cat {packed}/{{file}}"
    remote, local = (opened(data_config(folder, tmp_path / mode, mode)) for folder in (url, packed))
    for found, expected in zip(sequence(remote, range(1, 45)), sequence(local, range(1, 45)), strict=True):
        assert torch.equal(found, expected)
    (packed / "shard-000001.tar").write_bytes((packed / "shard-000001.tar").read_bytes()[:3000])
    with pytest.raises(InputError, match=r"shard-000001.tar.* byte \d+"):
        opened(data_config(url, tmp_path / "again", mode)).rows(torch.arange(500))


def test_a_stream_that_broke_while_it_waited_is_opened_again(tmp_path: Path, packed: Path) -> None:
    url = f"pipe:cat {packed}/{{file}}"
    tokens = opened(data_config(url, tmp_path, "stream"))
    expected = open_tokens(packed, str(tmp_path / "cache"))
    tokens.rows(torch.arange(60))
    ((stream, _),) = tokens.files.open.values()
    stream.close()
    assert np.array_equal(tokens.rows(torch.arange(60, 100))[0], expected.tokens[60:100])


def test_a_remote_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    for url in ("pipe:cat /nowhere/{file}", "nothing://host/tokens"):
        with pytest.raises(InputError, match="nowhere|nothing"):
            open_manifest(url, TOKENIZER, data_config(url, tmp_path, "stream"))
    with pytest.raises(InputError, match=r"Write \{file\} there"):
        open_manifest("pipe:cat x", TOKENIZER, data_config("x", tmp_path, "stream"))


def test_a_stream_keeps_few_blocks_and_reads_each_once_per_pass(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = opened(replace(data_config(packed, tmp_path, "stream"), shuffle_streams=2, buffer_samples=20))
    order = tokens.order(BATCH, seed=0)
    reads = []
    read = tokens.files.read
    monkeypatch.setattr(tokens.files, "read", lambda *key: reads.append(key) or read(*key))
    for step in range(1, 500 // BATCH + 1):
        tokens.rows(order.global_batch(step)[0])
        assert sum(len(labels) for _, labels in tokens.cached.values()) <= tokens.capacity
    # Ten blocks; the one in which a stream ends and the next begins is read by both, at different times.
    assert len(reads) <= 12
