from __future__ import annotations


def test_every_case_is_read_by_some_test(unread: str | None) -> None:
    assert unread is None, f"{unread}.json belongs to no family in tests/parity/conftest.py, so nothing checks it"
