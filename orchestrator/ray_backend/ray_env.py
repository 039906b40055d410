"""Ray's switches for everything the project runs. Ray reads some when it is imported, so jobs call this before."""

from __future__ import annotations

import atexit
import getpass
import os
import re
import secrets
import shutil
import sys
import tempfile

from orchestrator.config.arg_parser import exit_with_error
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_json
from orchestrator.config.redaction import redact
from orchestrator.ray_backend.ray_compat import check_fast_start_variable
from orchestrator.ray_backend.run_spec import Destination, Placement
from orchestrator.ray_backend.temp_dir import make_temp_dir

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
}
# What bash does not take literally in the middle of a word.
_SHELL_CHARACTERS = re.compile(r"""[\s|&;<>()$`\\"'*?]|\{[^{}]*(,|\.\.)[^{}]*\}""")


def prepare_process() -> None:
    """Make the process independent of where it was started: a notebook, or a container with a made-up user.

    Libraries read these variables while they are imported, so jobs call this before; workers inherit them.
    """
    # A notebook names a canvas of its own, which other processes lack. We draw into files alone.
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
    """Refuse places and surroundings that cannot work (one line, exit status 2), then set Ray's switches."""
    try:
        destination.resolve()
        check_ray_environment()
    except ConfigError as error:
        exit_with_error(prog, error)
    set_ray_variables(placement)


def check_ray_environment() -> None:
    """Check what a cluster takes from this process: RAY_ADDRESS, or for a private one the interpreter and temp dir.

    Raises ConfigError.
    """
    check_fast_start_variable()
    if has_existing_cluster():
        check_ray_address(os.environ["RAY_ADDRESS"])
        return
    check_interpreter_path()
    make_temp_dir()


def check_ray_address(address: str) -> None:
    """Raise ConfigError for a RAY_ADDRESS that a driver cannot connect to."""
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS must be HOST:PORT of a Ray head, got {redact(address)}, the form of a job server's or a Ray "
            "client's address; unset RAY_ADDRESS to start a private cluster, or submit this job: "
            "ray job submit --working-dir . -- python jobs/..."
        )


def check_interpreter_path() -> None:
    """Raise ConfigError for a path that breaks Ray's workers: it is pasted into a shell line without quotes."""
    if (found := _SHELL_CHARACTERS.search(sys.executable)) is not None:
        raise ConfigError(
            f"the interpreter's path must hold no {found[0]!r}, got {sys.executable}: Ray's workers would never start; "
            "move the clone, or make its .venv in a folder without spaces and characters of the shell"
        )


def set_ray_variables(placement: Placement | None = None) -> None:
    """Set what the user did not set of Ray's switches; without a placement for jobs that train nothing."""
    placement = placement or Placement()
    prepare_process()
    for name, value in _RAY_VARIABLES.items():
        os.environ.setdefault(name, value)
    # An end or a death is seen at the next poll: at Ray's 2 s small runs pay for it (pitfalls 3).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(placement.poll_seconds))
    if placement.is_elastic:
        # For a group that does not fit since a node has just gone: then the next look finds how many do. Ray: 60 s.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if has_existing_cluster():
        return
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        # A token for the private cluster alone; without one Ray would write its own into the user's home.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def has_existing_cluster() -> bool:
    """Whether this process runs on a cluster that was given to it (ray job submit, or RAY_ADDRESS)."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def get_submission_id() -> str | None:
    """The id of the submitted job that this process is the driver of; what `ray job logs` and `stop` take."""
    try:
        found = parse_json(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)


_TUNE_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files: the journals have all of it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the session's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs that are not validated have no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of records that nobody reads
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the sweep tells them, a line each
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # trials that begin together; the sweep hands out no more than may begin
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints failures whatever its verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def set_tune_variables() -> None:
    """Set what the user did not set."""
    for name, value in _TUNE_VARIABLES.items():
        os.environ.setdefault(name, value)
