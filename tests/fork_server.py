"""Starts Python programs for tests without their imports, which take four of the five seconds of CPU time of most starts.

    Popen([sys.executable, "launchers/train.py", "--config", "demo.yaml"], stderr=subprocess.PIPE, text=True)

A server, one per process that asks for it, has imported torch, DeepSpeed and the package, and has no other thread. It forks a
child for each start. The child takes arguments, environment, folder, file descriptors, session and signals of the start, runs
the program as `python` would, and ends with its exit code. What the program starts in turn in Python is forked from it.

What such a start does not show: imports from nothing and their order, another hash seed, the end of the interpreter, and what
libraries read from the environment when they are loaded. A start whose variables of that kind are others than the server's is
a real one, as is one of another program. `torchrun`, which has threads and so cannot be forked, is replaced by a loop that
starts, watches and ends ranks as it does, without its own output.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import inspect
import json
import os
import pkgutil
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent

# Variables that a library may read while it is loaded, and those of these names that are read later.
_READ_WHEN_LOADED = (
    "PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "TORCH", "PYTORCH", "DS_", "DEEPSPEED", "CUDA",
    "NCCL_", "GLOO_", "TRITON_", "MPL",
)  # fmt: skip
_READ_LATER = (
    "TORCHELASTIC_", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CPP_LOG_LEVEL", "CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR",
    # Set by imports of DeepSpeed, torch and scikit-learn in this process, as in the server.
    "DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
)  # fmt: skip
# Neither a GPU nor threads: a process that has used either cannot be forked.
_OF_SERVER = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_MOST_DESCRIPTORS = 1 << 16
_TORCHRUN_LOOKS_S = 0.1
_TORCHRUN_PATIENCE_S = 30.0

_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_NAMES = tuple(inspect.signature(_execute_child).parameters)[1:]


@dataclass(frozen=True)
class Program:
    """What a command line runs."""

    kind: str  # "file", "module", "code", or "torchrun"
    what: str  # the path, the module's name, the code
    arguments: tuple[str, ...]
    unbuffered: bool = False


def program_of(words: Sequence[str], env: Mapping[str, str]) -> Program | None:
    """None for what is not run by this Python, or with options that are not known here."""
    found = shutil.which(words[0], path=env.get("PATH", os.defpath))
    if found is None or Path(found).parent != BIN:
        return None
    rest = tuple(words[1:])
    if not Path(found).name.startswith("python"):
        with open(found, "rb") as file:
            ours = file.readline().strip() == b"#!" + os.fsencode(sys.executable)
        if not ours:
            return None
        return Program("torchrun" if Path(found).name == "torchrun" else "file", found, rest)
    unbuffered = rest[:1] == ("-u",)
    rest = rest[unbuffered:]
    if len(rest) > 1 and rest[0] in ("-c", "-m"):
        return Program("code" if rest[0] == "-c" else "module", rest[1], rest[2:], unbuffered)
    if rest and not rest[0].startswith("-"):
        return Program("file", rest[0], rest[1:], unbuffered)
    return None


def read_when_loaded(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that may have to be there before the imports."""
    return {
        name: value
        for name, value in env.items()
        if name.startswith(_READ_WHEN_LOADED) and not name.startswith(_READ_LATER)
    }


def _forkable(call: types.SimpleNamespace, base: Mapping[str, str]) -> Program | None:
    """The program of a start that a child of a process with the variables `base` can stand for."""
    env = os.environ if call.env is None else call.env
    plain = call.close_fds and not call.shell and call.gid is call.gids is call.uid is None and call.umask < 0
    if not plain or isinstance(call.args, (str, bytes, os.PathLike)) or call.executable is not None:
        return None
    if read_when_loaded(env) != read_when_loaded(base):
        return None
    return program_of([os.fspath(word) for word in call.args], env)


class Popen(subprocess.Popen):
    """subprocess.Popen, with a child of the server where one can stand for the program."""

    _ended: socket.socket | None = None  # says how the child ended

    def _execute_child(self, *given: Any) -> None:
        call = types.SimpleNamespace(**dict(zip(_NAMES, given, strict=True)))
        # The server has one environment; a machine's GPUs may be looked for in the other.
        hidden = (os.environ if call.env is None else call.env).get("CUDA_VISIBLE_DEVICES") == ""
        program = _forkable(call, _the_server().base) if hidden and call.preexec_fn is None else None
        if program is None:
            _execute_child(self, *given)
            return
        self._ended, theirs = socket.socketpair()
        standard = [call.p2cread, call.c2pwrite, call.errwrite]
        fds = {number: number if fd == -1 else fd for number, fd in enumerate(standard)}
        fds |= {int(fd): int(fd) for fd in call.pass_fds}
        start = {
            "program": [program.kind, program.what, program.arguments, program.unbuffered],
            "env": dict(os.environ if call.env is None else call.env),
            "cwd": os.path.abspath(call.cwd or os.getcwd()),
            "new_session": call.start_new_session,
            "fds": list(fds),
        }
        with theirs:
            self.pid = _the_server().start(start, [*fds.values(), theirs.fileno()])
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            call.p2cread, call.p2cwrite, call.c2pread, call.c2pwrite, call.errread, call.errwrite
        )

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._ended is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        if self._ended.fileno() == -1:  # collected together with this object, which nobody waits for any more
            return self.pid, signal.SIGKILL
        if wait_flags & os.WNOHANG and not select.select([self._ended], [], [], 0)[0]:
            return 0, 0
        status = self._ended.recv(4)
        self._ended.close()
        # Without a word the server has ended, and its children with it.
        return self.pid, int.from_bytes(status, "little") if status else signal.SIGKILL

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._ended is None:
            return super()._internal_poll(*given, **named)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


class _Server:
    """The server as the process sees it that has started it."""

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.base = {**os.environ, **_OF_SERVER}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=self.base,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(self, start: dict[str, Any], fds: Sequence[int]) -> int:
        """The process id of the child. Raises EOFError when the server has ended; its stderr says why."""
        socket.send_fds(self.connection, [json.dumps(start).encode()], fds)
        answer = self.connection.recv(64)
        if not answer:
            raise EOFError(f"the fork server ended with code {self.process.wait()}")
        return int(answer)

    def end(self) -> None:
        self.connection.close()
        self.process.wait()


_server: _Server | None = None


def _the_server() -> _Server:
    global _server
    if _server is None:
        _server = _Server()
        atexit.register(_server.end)
    return _server


def preload() -> None:
    """Imports what programs of this project import. It starts no thread."""
    import deepspeed  # noqa: F401
    import deepspeed.launcher.launch
    import deepspeed.launcher.runner  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import numpy as np  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.distributed.fsdp  # noqa: F401
    from PIL import Image

    import rear_scale

    for module in pkgutil.walk_packages(rear_scale.__path__, "rear_scale."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("helpers")
    Image.init()
    torch.set_flush_denormal(False)  # a library built for speed turns this on for the process that loads it
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after the imports: {threading.enumerate()}"


def skip_fsync() -> None:
    """Replaces os.fsync in this process by a call that returns at once, and raises for what is no open file.

    Tests kill processes, never the machine, so nothing that they read depends on what has reached the disk; waiting for it takes
    longer than the steps of a tiny training. The real one is called by starts with imports of their own and by tests/kills.py.
    """
    os.fsync = os.fstat  # type: ignore[assignment]


def _serve(connection: socket.socket) -> None:
    """Forks children until the other end of the connection is closed, or its process has ended; then ends those that are left."""
    from rear_scale.world import end_with_parent

    base = dict(os.environ)
    preload()
    skip_fsync()
    gc.collect()
    gc.freeze()
    children: dict[int, socket.socket] = {}
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with suppress(SystemExit):
            _fork_children(connection, children, base)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for child in children:
            with suppress(ProcessLookupError):
                (os.killpg if os.getpgid(child) == child else os.kill)(child, signal.SIGKILL)
        os._exit(0)


def _fork_children(connection: socket.socket, children: dict[int, socket.socket], base: dict[str, str]) -> None:
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready, _, _ = select.select([connection, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _reap(children)
        if connection not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(connection, 1 << 22, 64)
        if not message:
            return
        start = json.loads(message)
        child = _fork()
        if child == 0:
            kind, what, arguments, unbuffered = start["program"]
            become(
                Program(kind, what, tuple(arguments), unbuffered),
                env=start["env"],
                cwd=start["cwd"],
                fds=dict(zip(start["fds"], fds[:-1], strict=True)),
                new_session=start["new_session"],
                base=base,
            )
        for fd in fds[:-1]:
            os.close(fd)
        children[child] = socket.socket(fileno=fds[-1])
        connection.send(str(child).encode())


def _reap(children: dict[int, socket.socket]) -> None:
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            with suppress(OSError), children.pop(found[0]) as asked:
                asked.send(found[1].to_bytes(4, "little"))


def become(
    program: Program,
    *,
    env: Mapping[str, str],
    cwd: str | None,
    fds: Mapping[int, int],
    new_session: bool = False,
    base: Mapping[str, str] | None = None,
    first: Callable[[], object] | None = None,
) -> NoReturn:
    """Runs a program in this process, the child of a fork, as if it had been started.

    fds: the open one for each number. base: variables of the process that has imported everything; with them, what the program
    starts in turn is forked from it. first: called just before the program, after all else.
    """
    code = 1
    try:
        gc.freeze()  # what the parent holds is its own: nothing of it is closed here
        _place_descriptors(fds)
        _reset_signals()
        if new_session:
            os.setsid()
        if cwd is not None:
            os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        _as_fresh()
        if base is not None:
            subprocess.Popen._execute_child = lambda self, *given: _fork_here(self, base, *given)  # type: ignore[attr-defined]
        if first is not None:
            first()
        code = _run(program)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _place_descriptors(fds: Mapping[int, int]) -> None:
    """Gives open descriptors the numbers that they have in the program, and closes all others."""
    import fcntl

    above = max(fds) + 1
    copies = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, above) for number, fd in fds.items()}
    for number, copy in copies.items():
        os.dup2(copy, number, inheritable=True)
    kept = sorted(fds)
    for low, high in zip([-1, *kept], [*kept, _MOST_DESCRIPTORS], strict=True):
        if low + 1 < high:  # closerange(0, 0) closes all
            os.closerange(low + 1, high)


def _fork() -> int:
    """As os.fork, with all signals blocked in the child until `_reset_signals`: its handlers are still those of this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def _reset_signals() -> None:
    """What an exec does, and then Python when it starts. What is ignored stays so."""
    signal.set_wakeup_fd(-1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _as_fresh() -> None:
    """What differs from process to process, or is looked up once."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.seed()
    tempfile.tempdir = None
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.path[:] = _PATH


_PATH: list[str] = [path for path in sys.path if Path(path or ".").resolve() != HERE]


def _run(program: Program) -> int:
    """The exit code of a program."""
    if program.unbuffered:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    try:
        if program.kind == "torchrun":
            return _torchrun(program.arguments)
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        if program.kind == "module":
            sys.path.insert(0, os.getcwd())
            sys.argv = [program.what, *program.arguments]
            sys.modules.pop(program.what, None)  # it runs again, as the main module
            runpy._run_module_as_main(program.what)  # type: ignore[attr-defined]
        elif program.kind == "code":
            sys.path.insert(0, "")
            sys.argv = ["-c", *program.arguments]
            exec(compile(program.what, "<string>", "exec"), vars(main))
        else:
            path = os.path.abspath(program.what)
            sys.path.insert(0, str(Path(path).resolve().parent))
            sys.argv = [program.what, *program.arguments]
            main.__file__ = path
            exec(compile(Path(path).read_bytes(), path, "exec"), vars(main))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # without this function's own line
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _fork_here(process: Any, base: Mapping[str, str], *given: Any) -> None:
    """In place of Popen._execute_child in a child of the server: what is Python again is forked from here."""
    call = types.SimpleNamespace(**dict(zip(_NAMES, given, strict=True)))
    program = _forkable(call, base)
    # Locks that another thread holds would stay locked in the child.
    if program is None or len(os.listdir("/proc/self/task")) > 1:
        _execute_child(process, *given)
        return
    standard = [call.p2cread, call.c2pwrite, call.errwrite]
    fds = {number: number if fd == -1 else fd for number, fd in enumerate(standard)}
    sys.stdout.flush()
    sys.stderr.flush()
    child = _fork()
    if child == 0:
        become(
            program,
            env=dict(os.environ if call.env is None else call.env),
            cwd=call.cwd,
            fds=fds | {int(fd): int(fd) for fd in call.pass_fds},
            new_session=call.start_new_session,
            base=base,
            first=call.preexec_fn,
        )
    process.pid = child
    process._child_created = True
    process._close_pipe_fds(call.p2cread, call.p2cwrite, call.c2pread, call.c2pwrite, call.errread, call.errwrite)


class _Asked(Exception):
    """torchrun was sent a signal."""


def _torchrun(words: Sequence[str]) -> int:
    """As torchrun on one machine: each rank in a session of its own, all ended when one fails or the launcher is told to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--rdzv-backend")
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    from rear_scale.world import free_port

    size, port = str(args.nproc_per_node), str(free_port())
    told: list[int] = []

    def ask(number: int, frame: object) -> None:
        told.append(number)
        raise _Asked

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, ask)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", args.script, *args.arguments],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": size,
                "ROLE_NAME": "default", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none",
                "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "False",
            },
            start_new_session=True,
        )
        for rank in range(args.nproc_per_node)
    ]  # fmt: skip
    with suppress(_Asked):
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(_TORCHRUN_LOOKS_S)
    _end(ranks, told[0] if told else signal.SIGTERM)
    return int(bool(told) or any(rank.returncode for rank in ranks))


def _end(ranks: Iterable[subprocess.Popen], number: int) -> None:
    left = [rank for rank in ranks if rank.poll() is None]
    for rank in left:
        os.killpg(rank.pid, number)
    deadline = time.monotonic() + _TORCHRUN_PATIENCE_S
    for rank in left:
        try:
            rank.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(rank.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.modules["fork_server"] = sys.modules["__main__"]  # which its children replace
    _serve(socket.socket(fileno=int(sys.argv[1])))
