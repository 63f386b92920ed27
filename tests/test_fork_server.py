"""That what tests/fork_server.py starts behaves as if it had been started by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import BIN, Popen, Program, program_of
from helpers import environment, launch

_WHAT_IT_IS = """
import json, os, random, signal, sys, tempfile, threading
import torch
print(json.dumps({
    "name": __name__, "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "value": os.environ.get("GIVEN"),
    "variables": len(os.environ), "session": os.getsid(0) == os.getpid(), "descriptors": len(os.listdir("/proc/self/fd")),
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)],
    "threads": [threading.active_count(), torch.get_num_threads()],
    "temporary": tempfile.gettempdir(), "input": sys.stdin.read(), "file": globals().get("__file__"),
}))
sys.exit(3)
"""


def answers(start: type[subprocess.Popen], words: list[str], folder: Path) -> tuple[int, dict]:
    env = {**environment(), "GIVEN": "x", "TMPDIR": str(folder)}
    pipe = subprocess.PIPE
    with start(
        [sys.executable, *words], cwd=folder, env=env, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as process:
        out, _ = process.communicate("typed")
    return process.returncode, json.loads(out)


def test_a_child_is_as_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_WHAT_IT_IS)
    code, found = answers(Popen, ["-u", "script.py", "a", "--b"], tmp_path)
    assert (code, found) == answers(subprocess.Popen, ["-u", "script.py", "a", "--b"], tmp_path)
    assert (code, found["session"], found["value"], found["input"]) == (3, True, "x", "typed")


def test_a_module_and_what_a_child_starts_are_forked_too() -> None:
    code = (
        "import os, subprocess, sys; import json; print(json.dumps([os.getpid(), 'deepspeed' in sys.modules, "
        "*json.loads(subprocess.check_output([sys.executable, '-c', "
        "'import os, sys; print([os.getppid(), int(\"deepspeed\" in sys.modules)])']))]))"
    )
    own, imported, parent, imported_too = json.loads(launch("python", "-c", code).stdout)
    assert (own, imported, imported_too) == (parent, True, 1)
    done = launch("python", "-m", "rear_scale.run.requeue", "a")
    assert done.returncode == 1
    assert "IndexError" in done.stderr
    assert "fork_server" not in done.stderr


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "KeyboardInterrupt"),
        ("import sys; sys.exit('bad')", 1, "bad"),
        ("import atexit; atexit.register(lambda: print('end')); 1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('end'))).start()", 0, ""),
    ],
)
def test_its_end_is_that_of_the_program(code: str, expected: int, said: str) -> None:
    done = launch("python", "-c", code)
    assert done.returncode == expected
    assert (done.stderr.splitlines() or [""])[-1] == said
    assert done.stdout == ("end\n" if "'end'" in code else "")
    assert "fork_server" not in done.stderr


def test_signals_reach_it_and_time_runs_out() -> None:
    with Popen([sys.executable, "-c", "import time; time.sleep(3600)"], env=environment()) as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.terminate()
        assert process.wait(300) == -signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_signal_right_after_the_start_is_not_lost() -> None:
    """It may come before the child has put the server's own handlers away."""
    for delay in range(30):
        with Popen([sys.executable, "-c", "import time; time.sleep(3600)"], env=environment()) as process:
            time.sleep(delay * 1e-4)
            process.terminate()
            assert process.wait(20) == -signal.SIGTERM


def test_the_stand_in_for_torchrun_ends_all_ranks_with_one(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "open(os.environ['RANK'], 'w').write(' '.join([os.environ['WORLD_SIZE'], str(os.getpid()), *sys.argv[1:]]))\n"
        "while not os.path.exists('0') or not os.path.exists('1'): time.sleep(0.01)\n"
        "if os.environ['RANK'] == '1': sys.exit(5)\n"
        "time.sleep(3600)\n"
    )
    done = launch("torchrun", "--nproc-per-node", "2", script, "--local", "x", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    size, pid, *arguments = (tmp_path / "0").read_text().split()
    assert (size, arguments) == ("2", ["--local", "x"])
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_is_not_known_is_started_anew() -> None:
    env = {"PATH": str(BIN)}
    assert program_of(["python", "-u", "a.py", "b"], env) == Program("file", "a.py", ("b",), True)
    assert program_of(["deepspeed", "a"], env) == Program("file", str(BIN / "deepspeed"), ("a",))
    assert program_of(["torchrun", "a"], env) == Program("torchrun", str(BIN / "torchrun"), ("a",))
    for words in (["python", "-X", "dev", "a.py"], ["python"], ["python", "-m"], ["/bin/sh", "a"], ["nothing", "a"]):
        assert program_of(words, env) is None
    # A library reads the variable when it is loaded.
    code = "import sys; print('torch' in sys.modules)"
    assert [launch("python", "-c", code, **more).stdout for more in ({}, {"TORCH_LOGS": "x"})] == ["True\n", "False\n"]
