"""Kills and disk errors at the file calls of the launchers: nothing torn, lost or different, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import kills
import pytest

DISK = ("ENOSPC", "EIO", "EDQUOT")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kills.Server]:
    try:
        server = kills.Server(tmp_path_factory.mktemp("shim"))
    except OSError as error:
        pytest.skip(str(error))
    yield server
    server.end()


def _check(found: kills.Report, least: int) -> None:
    print({name: value for name, value in vars(found).items() if value})
    assert not found.findings, "\n".join(found.findings)
    assert found.done + found.not_reached >= least, vars(found)
    assert found.done >= least / 2, vars(found)


@pytest.mark.parametrize(
    ("job", "calls"),
    [
        ("single", 5),
        ("ddp", 3),
        ("sample", 2),
        ("evaluate", 2),
        ("pretokenize", 3),
        ("convert-portable", 2),
    ],
)
def test_a_kill_before_some_file_calls_changes_nothing(server: kills.Server, job: str, calls: int) -> None:
    _check(server.ask(job, calls), least=calls)


@pytest.mark.parametrize(("job", "calls"), [("single", 2), ("sample", 3)])
def test_a_full_or_failing_disk_at_some_writes_is_said_and_loses_nothing(
    server: kills.Server, job: str, calls: int
) -> None:
    _check(server.ask(job, calls, DISK), least=calls)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("job", [name for name, job in kills.JOBS.items() if job.ranks == 1])
def test_a_kill_before_any_file_call_changes_nothing(server: kills.Server, job: str) -> None:
    found = server.ask(job)
    _check(found, least=sum(found.calls))


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("job", "calls"),
    [("fsdp2", 60), ("zero1", 60), ("zero3", 30), ("sample-two", 20), ("evaluate-two", 20), ("pretokenize-two", 20)],
)
def test_a_kill_of_either_rank_changes_nothing(server: kills.Server, job: str, calls: int) -> None:
    _check(server.ask(job, calls), least=calls)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(("job", "calls"), [("single", None), ("zero1", 40), ("sample", None)])
def test_a_full_or_failing_disk_at_any_write_is_said_and_loses_nothing(
    server: kills.Server, job: str, calls: int | None
) -> None:
    _check(server.ask(job, calls, DISK), least=40)
