"""wandb in every state of disrepair: no run waits for it, fails with it, or says more than a line about it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import metrics, run_alone, tiny_config
from test_train import run

from rear_scale.config import ExperimentConfig, InputError
from rear_scale.run import sink as sink_module
from rear_scale.run import wandb as wandb_sink
from rear_scale.run.folder import RunFolder
from rear_scale.run.wandb import WandbSink, check_wandb, open_sink


def raising(error: BaseException) -> Callable[..., None]:
    def call(*arguments: object, **named: object) -> None:
        raise error

    return call


_entered = threading.Event()


def hanging(*arguments: object, **named: object) -> None:
    _entered.set()
    threading.Event().wait()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A wandb without a server. What was logged is in `sent`; functions may be replaced."""
    sent: list[dict] = []
    page = SimpleNamespace(
        sent=sent,
        log=sent.append,
        summary=SimpleNamespace(update=sent.append),
        define_metric=lambda *names, **options: None,
        finish=lambda exit_code: sent.append({"exit_code": exit_code}),
    )
    page.init = lambda **settings: page
    wandb = SimpleNamespace(
        init=lambda **settings: page.init(**settings), Settings=lambda **options: options, Image=lambda file: file
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _entered.clear()
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return page


def never_waits(wait: Callable[..., bool]) -> Callable[..., bool]:
    """Condition.wait, which queues and events wait in, as an error in the thread of the test."""

    def checked(self: threading.Condition, timeout: float | None = None) -> bool:
        assert threading.current_thread() is not threading.main_thread(), "the run waits"
        return wait(self, timeout)

    return checked


def sink(folder: Path) -> WandbSink:
    cfg = ExperimentConfig()
    cfg.run.name, cfg.wandb.mode = "r" * 200, "offline"
    opened = open_sink(cfg, RunFolder(folder))
    assert opened is not None
    return opened


@pytest.mark.parametrize(
    ("part", "fault", "unsent"),
    [
        ("init", raising(ConnectionResetError("Connection lost")), 3),
        ("init", raising(SystemExit(1)), 3),
        ("init", hanging, 3),
        ("define_metric", raising(ValueError("odd")), 3),
        ("log", raising(BrokenPipeError(32, "Broken pipe")), 3),
        ("log", raising(KeyboardInterrupt()), 3),
        ("log", hanging, 2),  # one is on its way
        ("finish", raising(ConnectionResetError("Connection lost")), 0),
        ("finish", raising(TimeoutError("no answer")), 0),
        ("finish", hanging, 0),
    ],
)
def test_a_sink_that_fails_or_hangs_costs_a_line(
    stub: SimpleNamespace,
    part: str,
    fault: Callable,
    unsent: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    setattr(stub, part, fault)
    opened = sink(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "wait", never_waits(threading.Condition.wait))
        for step in range(2):
            opened.log({"step": step})
        opened.image(2, "samples", tmp_path / "sheet.png")
    if fault is hanging and part != "finish":
        assert _entered.wait(300)
    while fault is hanging and part == "finish" and len(stub.sent) < 3:
        time.sleep(0.01)
    # After an error the shorter limit holds; the other one is longer than a test may take.
    monkeypatch.setattr(sink_module, "_FINISH_S", 3600)
    monkeypatch.setattr(sink_module, "_FINISH_AFTER_ERROR_S", 0.2 if fault is hanging else 300)
    opened.finish(exit_code=1)
    said = capsys.readouterr().err.splitlines()
    assert sum("The run continues without wandb" in line for line in said) == 1
    assert opened.unsent == unsent
    assert said[1:] == ([f"wandb: {unsent} entries were not sent; {tmp_path}/metrics.jsonl has them"] if unsent else [])


def test_a_sink_that_is_slow_drops_what_does_not_fit(
    stub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sink_module, "_MOST_WAITING", 5)
    door = threading.Event()
    monkeypatch.setattr(stub, "init", lambda **settings: door.wait() and stub)
    opened = sink(tmp_path)
    for step in range(9):
        opened.log({"step": step})
    door.set()
    opened.finish(exit_code=0)
    assert stub.sent == [*({"step": step} for step in range(5)), {"exit_code": 0}]
    assert capsys.readouterr().err == f"wandb: 4 entries were not sent; {tmp_path}/metrics.jsonl has them\n"


def test_a_run_is_done_whatever_becomes_of_its_page(
    stub: SimpleNamespace, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.finish = raising(ConnectionResetError("Connection lost"))
    run_alone(run, tiny_config(tmp_path, tokens, "strategy=single", "train.total_steps=2", "wandb.mode=offline"))
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert stub.sent == metrics(tmp_path / "run")
    assert (
        "wandb: end: ConnectionResetError: Connection lost. The run continues without wandb" in capsys.readouterr().err
    )


def settings(folder: Path, mode: str = "online", project: str = "rear_scale") -> ExperimentConfig:
    cfg = ExperimentConfig()
    cfg.wandb.mode, cfg.wandb.project, cfg.run.dir = mode, project, str(folder / "run")
    return cfg


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has never logged in, and a server that refuses connections."""
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_CONFIG_DIR",
        "NETRC",
        "WANDB_DISABLED",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    return tmp_path


@pytest.mark.parametrize("project", ["team/rear", "a b%", "", "  ", "x" * 129, "what?", "a:b", "back\\slash"])
def test_odd_projects_are_refused_in_either_mode(home: Path, project: str) -> None:
    for mode in ("offline", "online"):
        with pytest.raises(InputError, match=r"^wandb\.project=.* is not a name that wandb accepts"):
            check_wandb(settings(home, mode, project), 0)
    check_wandb(settings(home, "disabled", project), 0)


def test_a_key_is_looked_for_where_wandb_keeps_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"needs a key for http://127\.0\.0\.1:9, and none was found\. Run `wandb login`"
    ):
        check_wandb(settings(home), 1)
    (home / ".netrc").write_text("machine elsewhere login user password key\n")
    with pytest.raises(InputError, match="none was found"):
        check_wandb(settings(home), 1)
    (home / ".netrc").write_text("machine 127.0.0.1 login user password key\n")
    (home / ".netrc").chmod(0o600)
    check_wandb(settings(home), 1)
    (home / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_wandb(settings(home), 1)


@pytest.mark.parametrize("server", ["http://127.0.0.1:9", "http://name.invalid", "no-url"])
def test_a_server_that_does_not_answer_refuses_a_new_run_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(InputError, match=rf"{server} does not answer \(.*\)\. Use wandb\.mode=offline"):
        check_wandb(settings(home), 0)
    (home / "run/checkpoints/step_00000004").mkdir(parents=True)
    check_wandb(settings(home), 0)


def test_a_server_that_is_silent_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_sink, "_ANSWER_S", 0.1)
    monkeypatch.setattr(wandb_sink.urllib.request, "urlopen", hanging)
    assert wandb_sink._unreachable("http://127.0.0.1:9") == "no answer in 0 s"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("Offline", "offline"), ("dryrun", "offline"), ("run", "online"), ("DISABLED", "disabled"), ("", "online")],
)
def test_every_word_of_wandb_mode_is_understood(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, expected: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_sink._mode(settings(home)) == expected
    assert wandb_sink._mode(settings(home, "disabled")) == "disabled"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_sink._mode(settings(home)) == "disabled"


@pytest.mark.parametrize("mode", ["Offline", "OFFLINE", "DryRun"])
def test_wandb_reads_its_mode_in_its_own_spelling(
    stub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    seen: list[str] = []
    monkeypatch.setattr(stub, "init", lambda **settings: seen.append(os.environ["WANDB_MODE"]) or stub)
    sink(tmp_path).finish(exit_code=0)
    assert seen == ["offline"]


@pytest.mark.parametrize("mode", ["shared", "off", "1"])
def test_another_mode_is_refused_before_a_start_and_said_at_an_end(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(InputError, match=f"WANDB_MODE={mode} is not online, offline or disabled"):
        check_wandb(settings(home), 0)
    assert open_sink(settings(home), RunFolder(home)) is None
    assert f"WANDB_MODE={mode} is not online" in capsys.readouterr().err


def test_a_package_that_is_missing_or_hidden_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(home)])
    with pytest.raises(
        InputError, match=r"not installed\. Install it: pip install 'wandb', or use wandb\.mode=disabled"
    ):
        check_wandb(settings(home, "offline"), 0)
    (home / "wandb").mkdir()
    with pytest.raises(InputError, match=f"which is hidden by {home}/wandb, or not installed"):
        check_wandb(settings(home, "offline"), 0)
    (home / "wandb/__init__.py").write_text("")
    sys.path_importer_cache.clear()
    with pytest.raises(InputError, match=f"which is hidden by {home}/wandb, or not installed"):
        check_wandb(settings(home, "offline"), 0)
