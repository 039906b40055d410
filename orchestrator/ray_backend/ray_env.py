"""Surroundings of Ray: environment variables, the folder of its files, and the guard of its private parts.

Ray reads some variables when it is imported: set them before. Ray's private parts are reached through `ray_internals`
and `fast_start` only, and those only through this module. `python -m orchestrator.ray_backend.ray_env` prints the path
for Ray's --temp-dir.
"""

from __future__ import annotations

import atexit
import getpass
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from orchestrator.config.arg_parser import exit_with_error
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_json
from orchestrator.config.redaction import redact

if TYPE_CHECKING:  # workers import this module, and not the room of recipes
    from orchestrator.ray_backend.run_spec import Destination, Placement

TESTED_RAY_VERSIONS = ("2.60.0",)  # those that the tests ran with
FAST_START_VARIABLE = "ORCHESTRATOR_FAST_START"
_RAY_VARIABLES = {
    # Clusters are closed to others; an explicit mode always wins over Ray's guesses.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Each run would start a Prometheus exporter in the driver; our metrics go to MLflow.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A worker answers Ray within milliseconds, whatever it trains; at Ray's 600 s a node that hangs costs ten minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # Two minutes' notice is usual, half of one the least; of Ray's 5 s between polls a checkpoint makes better use.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    # Ray's set-up would print on the driver's screen, where the controllers are (ray_backend/fast_start.py).
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # An end or a death is seen at the next poll: Ray's 2 s would prolong small runs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
# For a group that does not fit since a node was just lost: the next attempt counts again. Ray: 60 s.
_ELASTIC_START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
_TUNE_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files: the journals have it all
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the session's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs that are not validated have no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of Tune's own state, which is never read
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the sweep reports them, a line each
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # trials that start together; the sweep hands out no more than may start
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints failures whatever its verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
# Bash does not take these literally in the middle of a word.
_SHELL_CHARACTERS = re.compile(r"""[\s|&;<>()$`\\"'*?]|\{[^{}]*(,|\.\.)[^{}]*\}""")
# What Ray appends to its temp dir for the longest socket, in front of the kernel's limit (sun_path).
_LONGEST_SOCKET_SUFFIX = "/session_2026-11-29_06-38-34_700863_4194304/sockets/plasma_store"
_MAX_SOCKET_PATH_BYTES = 107

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_loaded: dict[str, ModuleType | None] = {}


# ------------------------------------------------------------------ environment variables
def prepare_process() -> None:
    """Make the process independent of its surroundings, such as a notebook, or a container with an arbitrary user id.

    Libraries read these variables while they are imported, so jobs call this before; workers inherit them.
    """
    # A notebook sets a backend of its own, which other processes lack. Plots are drawn into files alone.
    os.environ["MPLBACKEND"] = "Agg"
    if os.path.expanduser("~") == "~":  # no HOME, and no entry in passwd for this uid
        home = tempfile.mkdtemp(prefix="orchestrator-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def configure_ray_or_exit(prog: str, destination: Destination, placement: Placement) -> None:
    """Set Ray's variables, or exit with status 2 and one line for places or an environment that cannot work."""
    try:
        destination.resolve()
        check_ray_environment()
    except ConfigError as error:
        exit_with_error(prog, error)
    set_ray_variables(placement)


def check_ray_environment() -> None:
    """Raise ConfigError for a switch, an address, or of a private cluster an interpreter or temp dir, unfit for Ray."""
    if (switch := os.environ.get(FAST_START_VARIABLE, "")) not in ("", "0", "1"):
        raise ConfigError(f"{FAST_START_VARIABLE} must be 0 or 1, got {switch!r}; set 0 to use Ray's public API alone")
    if not has_existing_cluster():
        check_interpreter_path()
        make_temp_dir()
    elif "://" in (address := os.environ["RAY_ADDRESS"]):
        raise ConfigError(
            f"RAY_ADDRESS must be HOST:PORT of a Ray head, got {redact(address)}, the form of a job server's or a Ray "
            "client's address; unset RAY_ADDRESS to start a private cluster, or submit this job: "
            "ray job submit --working-dir . -- python jobs/..."
        )


def check_interpreter_path() -> None:
    """Raise ConfigError for a path that breaks Ray's workers: Ray pastes it into a shell line without quotes."""
    if (character := _SHELL_CHARACTERS.search(sys.executable)) is not None:
        raise ConfigError(
            f"the interpreter's path must hold no {character[0]!r}, got {sys.executable}: Ray's workers would never "
            "start; move the clone, or make its .venv in a folder without spaces and characters of the shell"
        )


def set_ray_variables(placement: Placement | None = None) -> None:
    """Set those of Ray's variables that the user did not set; without a placement for jobs that train nothing."""
    prepare_process()
    variables = dict(_RAY_VARIABLES)
    if placement is not None:
        variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(placement.poll_seconds)
        if placement.is_elastic:
            variables |= [_ELASTIC_START_TIMEOUT]
    os.environ.update(variables | os.environ)
    if not (has_existing_cluster() or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        # A token for the private cluster alone; without one Ray would write its own into the user's home.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def set_tune_variables() -> None:
    """Set those of Ray Tune's variables that the user did not set."""
    os.environ.update(_TUNE_VARIABLES | os.environ)


def has_existing_cluster() -> bool:
    """Return whether this process runs on an existing cluster (ray job submit, or RAY_ADDRESS)."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def get_submission_id() -> str | None:
    """Return the id, as `ray job stop` takes it, of the submitted job whose driver this process is; else None."""
    try:
        return str(parse_json(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------ the folder of Ray's files
def make_temp_dir() -> str:
    """Return the path for Ray's --temp-dir, below a folder that this user alone can enter; make that folder.

    Ray gives its folders mode 0777, and who can write there can replace the code of the next job. The folder lies below
    RAY_TMPDIR, else TMPDIR, else /tmp: in that folder itself when it is closed to others, else in a folder of this
    user's there. Raises ConfigError for a folder that others control, and for a path that is too long.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    base = Path(os.environ[name] if name else "/tmp").absolute()  # noqa: S108  a folder of mode 0700 is made in it
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.stat()
        is_private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        parent = base if is_private else _make_private_folder(base / f"orchestrator-{os.geteuid()}")
    except OSError as error:
        raise ConfigError(
            f"{name or 'temp dir'}: {base} must be a folder in which this user can make another, got "
            f"{error.strerror}; set RAY_TMPDIR to one"
        ) from None
    temp_dir = str(parent / "ray")
    longest = _MAX_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET_SUFFIX)
    if (length := len(os.fsencode(temp_dir))) > longest:
        raise ConfigError(
            f"{name}: the path of Ray's files must have at most {longest} bytes, since sockets lie below it, got "
            f"{length} ({temp_dir}); set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
    return temp_dir


def _make_private_folder(folder: Path) -> Path:
    above = folder.parent.stat()
    if above.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not above.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"{folder.parent} must be closed to others or have the sticky bit, got mode "
            f"{stat.S_IMODE(above.st_mode):o}: others could replace Ray's files there; set RAY_TMPDIR to another folder"
        )
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        # Another user may have made it first, or a link to elsewhere.
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(
                f"{folder} must be a folder that belongs to user {os.geteuid()}, got one that user {status.st_uid} "
                "made; have it removed, or set RAY_TMPDIR to another folder"
            ) from None
        folder.chmod(0o700)
    return folder


# ------------------------------------------------------------------ the guard of Ray's private parts
def load_ray_internals() -> ModuleType | None:
    """Return the module `ray_internals`; None when this process uses Ray's public API alone."""
    return _load("ray_internals")


def load_fast_start() -> ModuleType | None:
    """Return the module `fast_start`, which imports Ray Train; None when runs go through Ray Train's public API."""
    return _load("fast_start")


def _load(name: str) -> ModuleType | None:
    """Import a module unless something speaks against it; warn about that once in a process."""
    with _lock:
        if name not in _loaded:
            obstacle, found = None, version("ray")
            if os.environ.get(FAST_START_VARIABLE) == "0":
                obstacle = f"{FAST_START_VARIABLE} is 0"
            elif found not in TESTED_RAY_VERSIONS:
                obstacle = f"Ray {found} is not a version that it was tested with ({', '.join(TESTED_RAY_VERSIONS)})"
            if obstacle is None:
                try:
                    if name == "fast_start":
                        from orchestrator.ray_backend import fast_start as module  # only a tested Ray has what it needs
                    else:  # as above
                        from orchestrator.ray_backend import ray_internals as module  # type: ignore[no-redef]
                except Exception as error:  # a module that changed may fail in any way while it is imported
                    obstacle = f"Ray {found} lacks what it needs ({type(error).__name__}: {error})"
            if obstacle is not None and None not in _loaded.values():
                _log.warning(
                    "the fast start is off: %s; runs start through Ray's public API, which takes some seconds longer",
                    obstacle,
                )
            _loaded[name] = module if obstacle is None else None
        return _loaded[name]


if __name__ == "__main__":
    try:
        print(make_temp_dir())  # noqa: T201  for scripts
    except ConfigError as error:
        sys.exit(str(error))
