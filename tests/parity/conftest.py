"""Cases of published implementations: a json and an npz each, in --golden DIR (default tests/golden).

A test module names the families that it reads in FAMILIES and asks for `case`; it then runs once for each case of those
families in DIR, under an id that begins with the case's file stem. `compare` checks an array and notes its largest error
for the table at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Case, read_case

# A json belongs to the longest of these that its stem begins with. Those of a None are read in passing by others.
FAMILIES = {
    "rear_tiny": "test_transformer",
    "rar_tiny": "test_transformer",
    "alitok_ar_tiny": "test_alitok",
    "rear_train_tiny": "test_training",
    "rar_train_tiny": "test_training",
    "schedules": "test_schedules",
    "state_dict_keys": "test_state_dicts",
    "maskgit_vqgan": "test_tokenizers",
    "titok_b64": "test_tokenizers",
    "alitok_tokenizer": "test_tokenizers",
    "preprocessing": "test_preprocessing",
    "metrics": "test_metrics",
    "inception": "test_inception",
    "eval_e2e": "test_eval_e2e",
    "lpips": "test_lpips",
    "efficientnet_lite0": None,
    "index": None,
}


@dataclass(frozen=True)
class Error:
    stem: str
    name: str
    largest: float
    tolerance: float


_errors: list[Error] = []


def family_of(stem: str) -> str | None:
    return max((family for family in FAMILIES if stem.startswith(family)), key=len, default=None)


def stems(config: pytest.Config, module: str) -> list[str]:
    """The cases that a test module reads."""
    found = sorted(path.stem for path in Path(config.getoption("--golden")).glob("*.json"))
    return [stem for stem in found if (family := family_of(stem)) and FAMILIES[family] == module]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rsplit(".", 1)[-1]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", stems(metafunc.config, module), indirect=True, scope="session")
    if "unread" in metafunc.fixturenames:
        files = sorted(path.stem for path in Path(metafunc.config.getoption("--golden")).glob("*.json"))
        metafunc.parametrize("unread", [stem for stem in files if family_of(stem) is None] or [None])


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(Path(request.config.getoption("--golden")), request.param)


@pytest.fixture
def compare(case: Case):
    """compare(name, found, expected, tolerance): largest absolute difference within the tolerance."""

    def check(name: str, found: Any, expected: Any, tolerance: float) -> None:
        found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        assert found.shape == expected.shape, (name, found.shape, expected.shape)
        largest = float(np.abs(found - expected).max(initial=0))
        _errors.append(Error(case.stem, name, largest, tolerance))
        assert largest <= tolerance, f"{case.stem} {name}: largest difference {largest:.3g} above {tolerance:.3g}"

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """For each case and kind of value, the one that comes nearest to its tolerance."""
    worst: dict[tuple[str, str], Error] = {}
    for error in _errors:
        key = (error.stem, re.split(r"[ |/]", error.name.lstrip("|"))[0] if "|" not in error.name else "gradient")
        if key not in worst or error.largest * worst[key].tolerance > worst[key].largest * error.tolerance:
            worst[key] = error
    if worst:
        terminalreporter.section("largest differences to the published implementations")
    for error in worst.values():
        terminalreporter.write_line(f"{error.stem:20} {error.name:46} {error.largest:9.2e} of {error.tolerance:.1e}")
