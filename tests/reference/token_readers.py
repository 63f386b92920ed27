"""Two plain readers of token sequences: the jsonl file of the released code, and WebDataset with one sample per key."""

from __future__ import annotations

import json
import linecache
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class JsonlDataset(Dataset):
    """Lines {"class_id": int, "tokens": [int, ...]}: counted once, then fetched one by one."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with open(path) as lines:
            self.count = sum(1 for _ in lines)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        entry = json.loads(linecache.getline(self.path, index + 1))
        return torch.tensor(entry["tokens"]), torch.tensor(entry["class_id"])


def jsonl_batches(path: str | Path, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """int64 tokens [B, N] and classes [B], shuffled anew each epoch, without end."""
    loader = DataLoader(JsonlDataset(path), batch_size=batch_size, shuffle=True, drop_last=True, num_workers=0)
    while True:
        yield from loader


def webdataset_batches(tars: list[str], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """int64 tokens [B, N] and classes [B] of samples `tokens.npy` and `cls`, shuffled by shard and buffer, without end."""
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode()
        .to_tuple("tokens.npy", "cls")
        .map_tuple(lambda tokens: torch.from_numpy(tokens).long(), torch.tensor)
    )
    loader = DataLoader(samples, batch_size=batch_size, drop_last=True, num_workers=0)
    while True:
        yield from loader
