"""Work side by side on one machine: numbered pieces, of which several processes take one after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from rear_scale.config import InputError
from rear_scale.progress import LINES_VARIABLE, say
from rear_scale.world import end_with_parent


def side_by_side(jobs: int, numbers: Sequence[int], run: Callable[[int], None]) -> str | None:
    """Calls `run` with each number, in so many processes at a time. Returns how one of them has ended by itself; None = none.

    The processes end with this one. Raises KeyboardInterrupt once all of them have ended.
    """
    context = multiprocessing.get_context("fork")
    # The numbers wait in a pipe. Each process reads the next one when it is free, so that one that is killed loses no other.
    reader, writer = os.pipe()
    os.write(writer, b"".join(number.to_bytes(4, "little") for number in numbers))
    os.close(writer)
    devices = torch.cuda.device_count()
    interrupted = context.RawArray("b", jobs)

    def work(job: int) -> None:
        def interrupt(*_: object) -> NoReturn:
            interrupted[job] = 1
            raise KeyboardInterrupt

        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as nohup and scripts set it
            signal.signal(signal.SIGINT, interrupt)
        end_with_parent(signal.SIGTERM)
        os.environ[LINES_VARIABLE] = "1"  # two bars that are redrawn in place would overwrite each other
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices_of(job, jobs, devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
        try:
            while number := os.read(reader, 4):
                run(int.from_bytes(number, "little"))
        except KeyboardInterrupt:
            os._exit(130)
        except InputError as error:
            say(str(error))
            os._exit(2)

    workers = [context.Process(target=work, args=(job,)) for job in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        # Ctrl-C in a terminal reaches all processes, a signal of kill only this one. A second one would keep a process from
        # waiting for what it has started.
        for job, worker in enumerate(workers):
            worker.join(1)
            if worker.is_alive() and worker.pid is not None and not interrupted[job]:
                os.kill(worker.pid, signal.SIGINT)
        for worker in workers:
            worker.join()
        raise
    finally:
        os.close(reader)
    codes = [worker.exitcode or 0 for worker in workers]
    if 130 in codes:
        raise KeyboardInterrupt
    code = next(filter(None, codes), 0)
    if not code:
        return None
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def devices_of(job: int, jobs: int, devices: int, visible: str | None) -> str:
    """The part of this machine's GPUs that one of several jobs uses, for CUDA_VISIBLE_DEVICES.

    Each GPU has one job, or each job one of the GPUs where there are fewer of them. visible: the variable's value before.
    """
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    if jobs >= devices:
        return names[job % devices]
    return ",".join(names[job * devices // jobs : (job + 1) * devices // jobs])
