"""Common parts of all launchers: the command line, errors as one line, and a clean end of the process."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import re
import select
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import psutil

from rear_scale import config, device, places, world
from rear_scale.checkpoint.average import MOVING_AVERAGE, averaged
from rear_scale.checkpoint.folder import Checkpoint
from rear_scale.checkpoint.open import given_keys, load_config, open_with_config
from rear_scale.checkpoint.writer import Unwritten
from rear_scale.config import ExperimentConfig, InputError
from rear_scale.config.other_names import our_name
from rear_scale.files import DISK_ERRORS
from rear_scale.optim.posthoc_ema import LONGEST
from rear_scale.peers import LostRanks
from rear_scale.progress import say
from rear_scale.run.folder import is_config_of_run
from rear_scale.run.stages import STAGE_VARIABLE
from rear_scale.shards.storage import is_remote, not_checked

EXIT_INPUT_ERROR = 2
_WAIT_FOR_RANK_0_S = 10.0  # before another rank prints its error
_WAIT_FOR_SAME_ERROR_S = (
    2.0  # before a rank prints a traceback, so that it can name the other ranks that have the same one
)
_WAIT_FOR_ENDED_RANK_S = 1.0  # before the other ranks report that it ended, so that its own error stands above
_RUNNERS = ("deepspeed", "ds")  # the commands of the package
_CLOCKS_DIFFER_S = 5.0  # allowed difference between the clocks of a shared file system and of this machine
# Errors of a file system that mean that the user chose a wrong path, and not that the disk failed.
_CODE_OF_CLOSED_PIPE = 141  # that of programs which SIGPIPE ends
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    cfg: ExperimentConfig
    args: argparse.Namespace
    ranks: world.Ranks
    # The dotted keys that the user sets; only known for a command line with --config.
    given: frozenset[str] = field(default=frozenset(), kw_only=True)


@dataclass(frozen=True)
class CheckpointCommand(Command):
    """A command line whose config is that of a checkpoint."""

    checkpoint: Checkpoint


class Parser(argparse.ArgumentParser):
    """An argument parser that shows commands as they are typed here, in a checkout or an installed copy. Descriptions keep their
    lines, and options are written out.

    Its error for --section.field explains that config values are set without dashes.
    """

    def __init__(self, **settings: Any) -> None:
        if not places.IN_CHECKOUT:
            settings.setdefault("prog", f"python -m rear_scale {Path(sys.argv[0]).stem}")
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)

    def format_help(self) -> str:
        return places.as_typed(super().format_help())

    def error(self, message: str) -> NoReturn:
        """Raises InputError for a config field written with dashes; ends the process as argparse does for other errors."""
        unknown = re.search(r"unrecognized arguments:.* --?((\w+)[\w.]*)", message)
        if unknown and unknown[2] in get_type_hints(ExperimentConfig):
            raise InputError(f"{message}. Values of the config are set without dashes: {unknown[1]}=VALUE")
        option = re.search(r"unrecognized arguments: --?([\w.-]+)", message)
        if option and (ours := our_name(option[1])):
            raise InputError(f"{message}. It is a value of the config, which is set without dashes: {ours}=VALUE")
        super().error(message)


def make_parser(
    description: str,
    *,
    from_checkpoint: bool = False,
    config: str | None = "a file in configs/, or a path",
    first: tuple[str, str] | None = None,
) -> argparse.ArgumentParser:
    """A parser with --config, --checkpoint (if wanted), overrides and --dry-run; launchers add their own options.

    config: the help of --config; None = without it. first: name and help of an argument before the overrides.
    """
    parser = Parser(
        description=description,
        epilog="Overrides have the form section.field=value; --dry-run --full prints every field with its value.",
    )
    if from_checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=Path,
            metavar="PATH",
            help="a run folder, one of its checkpoints, or a weight file of ours or of a released model",
        )
        config = (
            "with a weight file: the config to use instead of the one that fits it; without --checkpoint: the config"
        )
    if config is not None:
        parser.add_argument("--config", metavar="NAME.yaml", help=config)
    if first is not None:
        parser.add_argument(first[0], metavar=first[0].upper(), help=first[1])
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replaces a value of the config")
    parser.add_argument("--dry-run", action="store_true", help="print what follows from the config, and stop")
    parser.add_argument("--full", action="store_true", help="with --dry-run: print the resolved config too")
    # The deepspeed launcher adds this option. Its value is not used: the environment variable LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_ema_option(parser: argparse.ArgumentParser) -> None:
    """Adds --ema [SIGMA_REL], whose value is the length that checkpoint.average.averaged takes, or None."""
    parser.add_argument(
        "--ema",
        type=_length,
        nargs="?",
        const=MOVING_AVERAGE,
        metavar="SIGMA_REL",
        help="in place of the weights, an average of this length from the snapshots of optim.posthoc_ema; without a number, "
        "the moving average of optim.ema_decay",
    )


def _length(text: str) -> float:
    try:
        length = float(text)
    except ValueError:
        length = 0.0
    if not 0 < length < LONGEST:
        raise argparse.ArgumentTypeError(
            f"{text} is not a length between 0 and {LONGEST:.4f}. Use --ema 0.1, or put --ema alone at the end"
        )
    return length


def ema_words(length: float | None) -> list[str]:
    """The option of a command line that repeats a value of --ema."""
    return [] if length is None else ["--ema"] if length == MOVING_AVERAGE else ["--ema", f"{length:g}"]


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> Command:
    """The parsed command line, before any process group exists. Raises InputError for a config that is missing or wrong.

    arguments: the words to parse; None = those of this process.
    """
    # parse_intermixed_args: options may stand before, between and after overrides.
    args = parser.parse_intermixed_args(arguments)
    if args.config is None:
        raise InputError("--config is missing. Use --config NAME.yaml, for instance --config demo.yaml")
    cfg, given = _config_of(args.config, args.overrides), given_keys(args.config, args.overrides)
    command = Command(cfg, args, world.discover(), given=given)
    # A file in the current directory shadows the one of the same name in configs/; tell the user so.
    path, known = Path(args.config), config.CONFIG_DIR / args.config
    if command.ranks.rank == 0 and path.is_file() and known.is_file() and not path.samefile(known):
        say(f"--config {args.config}: {path.resolve()}, not the file of that name in {config.CONFIG_DIR}")
    return command


def _config_of(name: str, overrides: Sequence[str]) -> ExperimentConfig:
    """The config of --config. Paths in that of a run are found from its folder where they are not found from here."""
    cfg = config.with_home(load_config(name, overrides))
    if Path(name).is_file() and is_config_of_run(Path(name)):
        lines = config.found_from(cfg, Path(name).parent, config.override_keys(overrides))
        if _rank() == 0:
            for line in lines:
                say(line)
    return cfg


def parse_checkpoint(parser: argparse.ArgumentParser) -> CheckpointCommand:
    """The parsed command line with the config that the checkpoint was trained with. Raises InputError without a checkpoint."""
    args = parser.parse_intermixed_args()
    if args.checkpoint is None:
        raise InputError(
            "--checkpoint is missing. Use --checkpoint RUN, for instance --checkpoint runs/demo/rear_seed0"
        )
    figure = getattr(args, "figure", None)
    overrides = [*(config.figure_overrides(figure) if figure else []), *args.overrides]
    checkpoint, cfg = open_with_config(args.checkpoint, args.config, overrides)
    if (length := getattr(args, "ema", None)) is not None:
        checkpoint = averaged(checkpoint, length)
    return CheckpointCommand(config.with_home(cfg), args, world.discover(), checkpoint)


def parse_source(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a launcher whose first argument is not an override. Raises InputError for a wrong override."""
    args = parser.parse_intermixed_args()
    for text in args.overrides:
        config.check_override(text)
    return args


def parse_either(parser: argparse.ArgumentParser, default_config: str) -> Command:
    """A CheckpointCommand where --checkpoint is given, else a Command on --config or the default one."""
    args = parser.parse_intermixed_args()
    if args.checkpoint is not None:
        return parse_checkpoint(parser)
    if getattr(args, "ema", None) is not None:
        raise InputError(
            "--ema takes an average of a checkpoint's weights, but --checkpoint is missing. Leave --ema out"
        )
    cfg = _config_of(args.config or default_config, args.overrides)
    return Command(cfg, args, world.discover())


def run(main: Callable[[], None]) -> None:
    """Runs a launcher's main and ends the process with an exit code: 0 done, 2 bad input (one line, from rank 0), 130 Ctrl-C,
    1 any other error."""
    code = 0
    try:
        _end_with_launcher()
        device.prepare()
        main()
    except InputError as error:
        code = EXIT_INPUT_ERROR
        _say_error(str(error))
    except OSError as error:
        code = 1
        if isinstance(error, BrokenPipeError) and not _flushed():
            code = _CODE_OF_CLOSED_PIPE
        elif error.errno in _UNUSABLE or error.errno in DISK_ERRORS:
            code = EXIT_INPUT_ERROR if error.errno in _UNUSABLE else 1
            _say_error(
                f"{error.filename or 'a file'}: {error.strerror}. Make room for it there, or choose another path"
            )
        elif isinstance(error, Unwritten):
            _say_error(str(error))
        else:
            _say_traceback(error)
    except LostRanks as error:
        code = 1
        if error.first:
            time.sleep(_WAIT_FOR_ENDED_RANK_S)
            say(f"error: {error}")
    except KeyboardInterrupt as stop:
        code = 130
        if _rank() == 0:
            say(f"stopped; {str(stop) or 'the same command continues, and keeps what is finished'}")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        code = 1
        _say_traceback(error)
    if not _flushed():
        code = code or _CODE_OF_CLOSED_PIPE
    sys.stderr.flush()
    # os._exit skips the interpreter's shutdown: engines keep process groups alive during it, and gloo's threads then
    # sometimes abort the process after its work is done (exit code -6).
    os._exit(code)


def _flushed() -> bool:
    """Writes out what was printed. False where the program behind a pipe has ended, as `head` does, and takes no more."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True


def _say_error(line: str) -> None:
    # The line may hold names from untrusted files, whose control characters must not reach the terminal.
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in places.as_typed(line))
    if not _has_other_ranks():
        say(f"error: {line}")
        return
    # A launcher stops all ranks when the first one exits. So wait for rank 0 to print the same error; if this rank is
    # still alive after that, the error occurred on ranks other than 0, of which one prints it.
    ranks = _first_to_say(line, 0.0 if _rank() == 0 else _WAIT_FOR_RANK_0_S)
    if ranks:
        say(f"error: {line}" if 0 in ranks else f"error on {_listed(ranks)}: {line}")


def _say_traceback(error: BaseException) -> None:
    """Prints the traceback of an error; of several ranks with the same kind of error at the same place, one prints its own."""
    text = "".join(traceback.format_exception(error))
    ranks = []
    if _has_other_ranks():
        at = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        ranks = _first_to_say("\n".join((type(error).__name__, *at)), _WAIT_FOR_SAME_ERROR_S)
        if not ranks:
            return
    sys.stderr.write(text)
    if ranks:
        say(f"error on {_listed(ranks)}: {type(error).__name__}, see above")


def _first_to_say(error: str, wait_s: float) -> list[int]:
    """The ranks that have had the same error in this start, after a wait for them; empty where one of them has printed it.

    Ranks learn this from files in a folder that they share: that of the logs of a SLURM job, or else the machine's temporary
    folder. Where it cannot be written to, each rank is the only one it knows: an error that is printed twice is better than none.
    """
    job = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT")]
    mark = hashlib.sha256("\n".join((*job, error)).encode()).hexdigest()[:16]
    path = Path(os.environ.get("REAR_LOGS") or tempfile.gettempdir()) / f".rear_scale-{os.getuid()}-{mark}"
    own = path.with_name(f"{path.name}-{_rank()}")
    try:
        own.touch()
        time.sleep(wait_s)
        others = [other for other in path.parent.glob(f"{path.name}-*") if _is_of_this_start(other)]
        if not _is_of_this_start(path):
            path.unlink(missing_ok=True)
        path.touch(exist_ok=False)
        for other in others:
            other.unlink(missing_ok=True)
        return sorted({_rank(), *(int(other.name.rpartition("-")[2]) for other in others)})
    except FileExistsError:
        own.unlink(missing_ok=True)
        return []
    except OSError:
        return [_rank()]


def _is_of_this_start(mark: Path) -> bool:
    """Whether a mark is there and is no older than this process: others were left by an earlier start."""
    try:
        return mark.stat().st_mtime >= psutil.Process().create_time() - _CLOCKS_DIFFER_S
    except OSError:
        return False


def _listed(ranks: Sequence[int]) -> str:
    """Ascending ranks in words: rank 3, or ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _has_other_ranks() -> bool:
    """Whether the launcher's variables give this process a number among others."""
    sizes = (os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    size = next(filter(None, sizes), "1")
    return size.isdecimal() and int(size) > 1


def _rank() -> int:
    """The rank of this process from its launcher's variables; 0 where they are missing or not numbers."""
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


def _end_with_launcher() -> None:
    """Asks the kernel to kill this process when its launcher (torchrun or deepspeed) ends.

    A killed torchrun leaves its workers alive, because each has its own session. They would hang in collectives, or go on
    training and keep the run folder locked.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "CROSS_SIZE" not in os.environ:
        return  # Started by hand or by srun: the parent process may legitimately exit first.
    world.end_with_parent(signal.SIGKILL)
    _stop_with_runner()
    # The launcher may already be dead and this process reparented to PID 1 (in a container PID 1 may be the launcher itself).
    parent = os.getppid()
    if parent == 1 and not re.search(
        rb"python|torch|deepspeed|accelerate", Path(f"/proc/{parent}/cmdline").read_bytes()
    ):
        os._exit(1)


def _stop_with_runner() -> None:
    """Sends this process SIGTERM when the command `deepspeed` ends that has started its launcher on this machine.

    That command starts a second process, which starts the ranks and does not notice when the first one is killed: they would
    train on unseen.
    """
    with suppress(psutil.Error, OSError):
        launcher = psutil.Process().parent()
        runner = None if launcher is None else launcher.parent()
        if runner is None or not any(Path(word).name in _RUNNERS for word in runner.cmdline()):
            return
        ended = os.pidfd_open(runner.pid)

        def wait() -> None:
            select.select([ended], [], [])
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, name="runner", daemon=True).start()


def show_paths(
    command: Command, inputs: tuple[str, ...], outputs: tuple[str, ...], given: Sequence[tuple[str, str | Path]] = ()
) -> None:
    """Prints the dry run of a command that turns files into files: which of them exist, after the config with --full.

    given: (name, path) of input files that are not config fields, each under the option or key that names it.
    """
    if command.ranks.rank != 0:
        return
    if command.args.full:
        print(config.to_yaml(command.cfg))
    for name in (*inputs, *outputs):
        value: Any = command.cfg
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            print(f"not set: {name}")
        elif is_remote(value):
            print(not_checked(name, value))
        elif name in inputs and not Path(value).exists():
            print(f"not found: {name}={value}")
        else:
            print(f"{name}: {value}{' (exists)' if Path(value).exists() else ''}")
    for name, path in given:
        if is_remote(path):
            print(not_checked(name, str(path)))
            continue
        print(f"{name}: {path} (exists)" if Path(path).exists() else f"not found: {name}={path}")


def end(result: object, number: str = "", following: str = "") -> None:
    """The last lines of a command, on stderr of rank 0: where the result is, how good it is in one number where there is one,
    and the command that comes next, as `typed` gives it. A stage of a longer job (run/stages.py) does not say the last."""
    if _rank() != 0:
        return
    say(f"done: {result}{f' ({number})' if number else ''}")
    if following and STAGE_VARIABLE not in os.environ:
        say(f"next: {following}")


def typed(name: str, *words: object) -> str:
    """The command line of a launcher (`train`, `sample`, ...) as a user types it who has started this process as it was."""
    ranks, script = world.discover(), Path(sys.argv[0])
    folder = Path("launchers")
    if script.parent.name == "launchers" and places.IN_CHECKOUT:
        folder = script.parent
        if folder.is_relative_to(Path.cwd()):
            folder = folder.relative_to(Path.cwd())
    if ranks.launcher == "slurm" and places.IN_CHECKOUT:
        nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
        start = f"sbatch --nodes {nodes} {folder}/slurm/{name}.sbatch"
    elif ranks.world_size > 1:
        start = f"{_program('torchrun')} --nproc-per-node {ranks.local_world_size} {folder}/{name}.py"
    else:
        start = f"{_program('python')} {folder}/{name}.py"
    return places.as_typed(f"{start} {shlex.join(map(str, words))}")


def _program(name: str) -> str:
    """A program of this interpreter's environment: its name where a shell finds that one, else its path."""
    found, own = shutil.which(name), Path(sys.executable).parent / name
    if found is not None and Path(found).parent == own.parent:
        return name
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)
