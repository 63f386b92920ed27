from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import fork_server
import pytest
import torch
from _pytest.mark.expression import Expression
from helpers import PLACE, write_token_shards

from rear_scale.device import gpus_of_the_machine


def pytest_addoption(parser: pytest.Parser) -> None:
    default = str(Path(__file__).parent / "golden")
    parser.addoption(
        "--golden", default=default, metavar="DIR", help="cases of published implementations for tests/parity"
    )


def pytest_configure(config: pytest.Config) -> None:
    fork_server.skip_fsync()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a shell; tests send Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not asks_for_gpus(config.option.markexpr or ""):
        hide_gpus()


def asks_for_gpus(expression: str) -> bool:
    """Whether `-m EXPRESSION` selects tests of GPUs and no others: with others beside them, GPUs are hidden from all."""
    if not expression:
        return False
    chosen = Expression.compile(expression)

    def selects(*marks: str) -> bool:
        return chosen.evaluate(lambda name, **_: name in marks)

    return (selects("gpu") or selects("gpu", "long")) and not (selects() or selects("long"))


def hide_gpus() -> None:
    """From this process and those that it starts: tests of the CPU compare bits and count processes, and GPUs have others."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if gpus_of_the_machine():
        os.environ["DS_ACCELERATOR"] = "cpu"  # the deepspeed launcher replaces the other variable


# Half a minute and more each, the longest first. SLURM's tests mostly wait, which leaves the cores to the others.
_LONGEST = (
    "test_slurm.py",
    "test_launchers.py",
    "test_guard.py",
    "test_resume.py",
    "test_parallel.py",
    "test_eval_e2e.py",
    "test_demo.py",
    "test_types.py",
    "test_strategy_matrix.py",
    "test_communication.py",
    "test_tokenizer_conformance.py",
    "test_planner.py",
    "test_tokenizers.py",
    "test_kills.py",
    "test_families.py",
    "test_train.py",
    "test_fake_world.py",
    "test_memory.py",
    "test_config.py",
    "test_bench.py",
    "test_evaluate_jobs.py",
    "test_study.py",
    "test_sample.py",
    "test_evaluate_large.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hidden = gpus_of_the_machine() and not asks_for_gpus(config.option.markexpr or "")
    long = pytest.mark.skip(reason="takes minutes; run with -m long")
    for item in items:
        # Not item.keywords: those hold the names of folders too.
        gpu = item.get_closest_marker("gpu")
        wanted = 0 if gpu is None else next(iter(gpu.args), 1)
        if count < wanted:
            reason = (
                "run it with -m gpu" if hidden else "needs a CUDA device" if wanted == 1 else f"needs {wanted} GPUs"
            )
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("long") and "long" not in (config.option.markexpr or ""):
            item.add_marker(long)


def pytest_collection_finish() -> None:
    """Garbage collections, of which every training begins with one, leave the hundreds of thousands of objects of imports out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def variables_of_ranks() -> Iterator[None]:
    """Joining a world sets RANK and its like in this process; the next test's world is not the one that a test joined."""
    before = {name: os.environ.get(name) for name in PLACE}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 100 synthetic token sequences."""
    return write_token_shards(tmp_path_factory.mktemp("shards") / "train", 100)
