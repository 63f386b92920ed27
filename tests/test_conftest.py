"""What tests see of a machine's GPUs."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from helpers import launch, run_ranks

from rear_scale.world import World

# By its path: tests/parity has a conftest.py too, and either may be the module of that name.
_spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).with_name("conftest.py"))
_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_conftest)
asks_for_gpus, pytest_collection_modifyitems = _conftest.asks_for_gpus, _conftest.pytest_collection_modifyitems


@pytest.mark.parametrize(
    ("expression", "gpus"),
    [
        ("gpu", True),
        ("gpu and not long", True),
        ("gpu and long", True),
        ("", False),
        ("long", False),
        ("not gpu", False),
        ("not long", False),
        ("gpu or long", False),
        ("not gpu or gpu", False),
    ],
)
def test_gpus_are_there_for_their_own_tests_alone(expression: str, gpus: bool) -> None:
    assert asks_for_gpus(expression) == gpus


def _visible(world: World) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_processes_of_tests_see_no_gpus() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert run_ranks(2, _visible) == ["", ""]
    assert launch("python", "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))").stdout == "''\n"


class _Item:
    path = Path(__file__)

    def __init__(self, *marks: pytest.MarkDecorator) -> None:
        self.marks = {mark.name: mark.mark for mark in marks}
        self.reasons: list[str] = []

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.reasons.append(marker.kwargs["reason"])


@pytest.mark.parametrize(
    ("gpus", "reasons"), [(0, ["needs a CUDA device", "needs 2 GPUs"]), (1, ["needs 2 GPUs"]), (2, []), (8, [])]
)
def test_tests_take_the_gpus_that_they_need_or_skip(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, gpus: int, reasons: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(_conftest, "gpus_of_the_machine", lambda: 0)
    items = [_Item(), _Item(pytest.mark.gpu), _Item(pytest.mark.gpu(2))]
    pytest_collection_modifyitems(pytestconfig, items)
    assert [reason for item in items for reason in item.reasons] == reasons
    # Without -m gpu, a machine's GPUs are hidden, and the reason says so.
    monkeypatch.setattr(_conftest, "gpus_of_the_machine", lambda: 8)
    hidden = _Item(pytest.mark.gpu(99))
    pytest_collection_modifyitems(pytestconfig, [hidden])
    assert hidden.reasons == ["run it with -m gpu"]
