"""Fingerprints of a run's start tell a change of any bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import run_alone, tiny_config, write_token_shards
from test_train import run

from rear_scale.run import fingerprints
from rear_scale.run.fingerprints import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_changes_with_one_value_its_place_and_its_sign(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    expected = digest(values)
    assert digest(values.clone()) == expected
    assert digest(values.T.contiguous().T) == expected  # the layout in memory is no matter
    assert digest(values.flip(1)) != expected
    other = values.clone()
    other[2, 3] = other[2, 3] == 0
    assert digest(other) != expected
    monkeypatch.setattr(fingerprints, "_PART", 5)  # in several parts
    assert digest(values) == expected
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))
    assert digest(torch.empty(0)) == "0" * 16


def test_a_run_records_them_when_it_begins_and_never_again(tmp_path: Path, tokens: Path) -> None:
    file = tmp_path / "run/fingerprints.json"
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=1"))
    text = file.read_text()
    found = json.loads(text)
    assert (found["step"], found["samples"], len(found["order"])) == (0, 100, fingerprints.BATCHES)
    assert "blocks.1.mlp.fc1.weight" in found["weights"]
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=2"))
    assert file.read_text() == text
    # A run from before they were recorded stays without them: its first weights are gone.
    file.unlink()
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.stop_at_step=3"))
    assert not file.exists()
    other = tmp_path / "other"
    other.mkdir()
    cfg = tiny_config(other, write_token_shards(tmp_path / "set", 99), "strategy=single", "run.seed=1")
    run_alone(run, cfg)
    changed = json.loads((other / "run/fingerprints.json").read_text())
    assert {name for name in found if found[name] != changed[name]} == {"data", "samples", "weights", "order"}
