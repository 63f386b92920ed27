"""Weights & Biases: an asynchronous sink of metrics that never delays training, and the check of its settings before a start."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
import secrets
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Literal

from rear_scale.checkpoint.folder import folders
from rear_scale.config import ExperimentConfig, InputError, to_dict
from rear_scale.files import write_text_atomically
from rear_scale.places import how_to_install
from rear_scale.progress import say
from rear_scale.run.folder import RunFolder
from rear_scale.run.sink import Sink

Mode = Literal["online", "offline", "disabled"]
# Values of wandb.mode, and of WANDB_MODE that wandb accepts, including old ones.
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_LONGEST_NAME = 128  # of a project or run, by wandb's own check
_NOT_IN_PROJECTS = "/\\#?%:"
_ANSWER_S = 10.0  # time limit for an answer of wandb's server before a start


class WandbSink(Sink):
    """Sends entries to a wandb page."""

    title = "wandb"

    def __init__(self, cfg: ExperimentConfig, run: RunFolder, mode: Mode) -> None:
        self.mode = mode
        super().__init__(cfg, run)

    def log(self, metrics: dict[str, Any]) -> None:
        self._put(lambda page: page.log(metrics))

    def image(self, step: int, name: str, file: Path) -> None:
        def send(page: Any) -> None:
            import wandb

            page.log({name: wandb.Image(str(file)), "step": step})

        self._put(send)

    def summary(self, values: dict[str, float], step: int) -> None:
        self._put(lambda page: page.summary.update(values))

    def _close(self, page: Any) -> None:
        page.finish(exit_code=self.exit_code)

    def _open(self) -> Any:
        import wandb

        # With a stored id, a resumed run continues its curves.
        identity = self.run.path / "wandb_id"
        if not identity.exists():
            write_text_atomically(identity, secrets.token_hex(4))
        # wandb reads this variable itself, but does not accept all spellings that are accepted here.
        if "WANDB_MODE" in os.environ:
            os.environ["WANDB_MODE"] = self.mode
        page = wandb.init(
            project=self.cfg.wandb.project,
            name=self.cfg.run.name[:_LONGEST_NAME],
            id=identity.read_text(),
            resume="allow",
            dir=str(self.run.path),
            mode=self.mode,
            config=to_dict(self.cfg),
            # Otherwise wandb intercepts every line on stderr, in the thread that writes it.
            settings=wandb.Settings(console="off"),
        )
        # A resumed run logs some steps again, which wandb's own step counter would reject.
        page.define_metric("*", step_metric="step")
        return page


def open_sink(cfg: ExperimentConfig, run: RunFolder) -> WandbSink | None:
    """The sink of a run; None where wandb is disabled or WANDB_MODE is invalid. Rank 0 only."""
    try:
        mode = _mode(cfg)
    except InputError as error:
        say(f"wandb: {error}")
        return None
    return None if mode == "disabled" else WandbSink(cfg, run, mode)


def _mode(cfg: ExperimentConfig) -> Mode:
    """The mode of wandb: disabled, offline or online. Raises InputError for another WANDB_MODE."""
    if cfg.wandb.mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    # The environment overrides the config: the job script knows whether nodes have a network.
    given = os.environ.get("WANDB_MODE", "").strip()
    if not given:
        return _MODES[cfg.wandb.mode]
    if given.lower() not in _MODES:
        raise InputError(f"WANDB_MODE={given} is not online, offline or disabled. Set one of them, or unset it")
    return _MODES[given.lower()]


def check_wandb(cfg: ExperimentConfig, rank: int) -> None:
    """Raises InputError when wandb would fail: checks package, names, key and, on rank 0, that its server answers.

    A run that resumes is not refused when the server does not answer; the sink then reports it.
    """
    mode = _mode(cfg)
    if mode == "disabled":
        return
    project = cfg.wandb.project
    if not project.strip() or len(project) > _LONGEST_NAME or any(sign in _NOT_IN_PROJECTS for sign in project):
        raise InputError(
            f"wandb.project={project} is not a name that wandb accepts: 1 to {_LONGEST_NAME} characters, none of "
            f"{' '.join(_NOT_IN_PROJECTS)}. Use a plain name; a team is set by the variable WANDB_ENTITY"
        )
    _check_package()
    if mode == "offline":
        return
    server = _server()
    if not _has_key(server):
        raise InputError(
            f"wandb.mode=online needs a key for {server}, and none was found. Run `wandb login`, set WANDB_API_KEY, or use "
            "wandb.mode=offline"
        )
    resumes = bool(folders(RunFolder(cfg.run.dir).checkpoints))
    if rank == 0 and not resumes and (problem := _unreachable(server)) is not None:
        raise InputError(
            f"wandb.mode=online, but {server} does not answer ({problem}). Use wandb.mode=offline and `wandb sync` later"
        )


def _check_package() -> None:
    spec = importlib.util.find_spec("wandb")
    if spec is not None and spec.origin is not None and (Path(spec.origin).parent / "sdk").is_dir():
        return
    if spec is None:
        problem = "is not installed"
    else:
        location = Path(spec.origin).parent if spec.origin else Path(*list(spec.submodule_search_locations or [])[:1])
        problem = f"is hidden by {location.resolve()}, or not installed"
    raise InputError(
        f"wandb.mode needs the package wandb, which {problem}. Install it: {how_to_install('wandb')}, or use "
        "wandb.mode=disabled"
    )


def _server() -> str:
    """The URL of the server: WANDB_BASE_URL, the one that `wandb login --host` has stored, or the public one."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url.rstrip("/")
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config/wandb")
    noted = configparser.ConfigParser()
    try:
        noted.read(folder / "settings")
        return noted.get("default", "base_url", fallback="https://api.wandb.ai").rstrip("/")
    except configparser.Error:
        return "https://api.wandb.ai"


def _has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(server).hostname or server
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _unreachable(server: str) -> str | None:
    """The reason why the server gives no answer within _ANSWER_S; None when it answers in any way."""
    problems: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(server, timeout=_ANSWER_S).close()
            problems.append(None)
        except urllib.error.HTTPError:
            problems.append(None)  # an answer
        except (OSError, ValueError) as error:
            problems.append(str(getattr(error, "reason", error)))

    # In a thread, because the name lookup has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    return problems[0] if problems else f"no answer in {_ANSWER_S:.0f} s"
