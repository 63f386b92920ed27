from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import write_token_shards


def pytest_addoption(parser: pytest.Parser) -> None:
    default = str(Path(__file__).parent / "golden")
    parser.addoption(
        "--golden", default=default, metavar="DIR", help="cases of published implementations for tests/parity"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    long = pytest.mark.skip(reason="takes minutes; run with -m long")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "long" in item.keywords and "long" not in (config.option.markexpr or ""):
            item.add_marker(long)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 synthetic token sequences."""
    return write_token_shards(tmp_path_factory.mktemp("shards") / "train", 100)
