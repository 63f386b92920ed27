"""Renamed config keys and values: read from files of earlier versions, refused from users with the new name."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rear_scale import config
from rear_scale.config import InputError
from rear_scale.config.renamed import KEYS, VALUES, downgraded, upgraded
from rear_scale.config.values import leaves

TODAY = config.to_dict(config.load("demo.yaml"))
BEFORE = downgraded(TODAY)
# (old key, old value, new key, new value) of every renamed field and every renamed value.
RENAMED = [
    *((old, leaves(BEFORE)[old], new, leaves(TODAY)[new]) for old, new in KEYS.items()),
    *((key, old, key, new) for key, values in VALUES.items() for old, new in values.items()),
]


@pytest.mark.parametrize(("old", "value", "new", "expected"), RENAMED, ids=lambda case: str(case)[:40])
def test_an_old_name_is_read_from_saved_files_and_refused_from_users(
    old: str, value: Any, new: str, expected: Any, tmp_path: Path
) -> None:
    *sections, name = old.split(".")
    saved = copy.deepcopy(TODAY)
    section = saved
    for part in sections:
        section = section[part]
    section.pop(new.rpartition(".")[2])
    section[name] = value

    # Of a checkpoint or a weight file, and when a run is resumed from it.
    cfg = config.from_file(saved, "meta.json")
    assert leaves(config.to_dict(cfg))[new] == expected
    config.check_resumable(cfg, saved, "step_5")
    # The config.yaml of a run folder, and the same file as a user's own.
    for folder in ("run", "own"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(yaml.safe_dump(saved))
    (tmp_path / "run/starts.jsonl").touch()
    assert config.load(str(tmp_path / "run/config.yaml")) == cfg
    shown = ",".join(value) if isinstance(value, list) else json.dumps(value).strip('"')
    refusal = rf"^{re.escape(old)}[= ].*renamed.*{re.escape(new if new != old else f'{new}={expected}')}"
    with pytest.raises(InputError, match=refusal):
        config.load(str(tmp_path / "own/config.yaml"))
    with pytest.raises(InputError, match=refusal):
        config.load("demo.yaml", [f"{old}={shown}"])


def test_an_old_name_in_a_list_of_keys_is_read_and_refused_as_a_key_is(tmp_path: Path) -> None:
    for old, new in KEYS.items():
        saved = {**TODAY, "resume": {"allow": ["optim.lr", old]}}
        assert config.from_file(saved, "meta.json").resume.allow == ["optim.lr", new]
        refusal = rf"^resume.allow=\[{re.escape(old)}\] names a key that was renamed to {re.escape(new)}"
        with pytest.raises(InputError, match=refusal):
            config.load("demo.yaml", [f"resume.allow=[optim.lr,{old}]"])
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(InputError, match=refusal):
        config.load(str(tmp_path / "own.yaml"))
    # A damaged file: the check of types names what is wrong in it.
    assert upgraded({"resume": {"allow": [["optim.lr"], 3]}}) == {"resume": {"allow": [["optim.lr"], 3]}}


def test_saved_settings_keep_their_old_names_in_hashes() -> None:
    assert upgraded(BEFORE) == TODAY
    sample = BEFORE["sample"]
    assert (sample["quantiser"], sample["copies"]) == ("trunc255", None)
    assert BEFORE.keys() == TODAY.keys()
    # A damaged file: the check of keys names what is wrong in it.
    assert upgraded({"data": 3, "sample": {"quantiser": ["round"]}}) == {
        "data": 3,
        "sample": {"uint8_rounding": ["round"]},
    }
