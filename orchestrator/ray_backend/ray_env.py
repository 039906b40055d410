"""Environment variables of Ray for all that the project runs. Ray reads some when it is imported: set them before."""

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
# Bash does not take these literally in the middle of a word.
_SHELL_CHARACTERS = re.compile(r"""[\s|&;<>()$`\\"'*?]|\{[^{}]*(,|\.\.)[^{}]*\}""")


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
    """Raise ConfigError for a RAY_ADDRESS, or for a private cluster an interpreter or temp dir, that Ray cannot use."""
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
    """Raise ConfigError for a path that breaks Ray's workers: Ray pastes it into a shell line without quotes."""
    if (character := _SHELL_CHARACTERS.search(sys.executable)) is not None:
        raise ConfigError(
            f"the interpreter's path must hold no {character[0]!r}, got {sys.executable}: Ray's workers would never "
            "start; move the clone, or make its .venv in a folder without spaces and characters of the shell"
        )


def set_ray_variables(placement: Placement | None = None) -> None:
    """Set those of Ray's variables that the user did not set; without a placement for jobs that train nothing."""
    placement = placement or Placement()
    prepare_process()
    for name, value in _RAY_VARIABLES.items():
        os.environ.setdefault(name, value)
    # An end or a death is seen at the next poll: Ray's 2 s would prolong small runs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(placement.poll_seconds))
    if placement.is_elastic:
        # For a group that does not fit since a node was just lost: the next attempt counts again. Ray: 60 s.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if has_existing_cluster():
        return
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        # A token for the private cluster alone; without one Ray would write its own into the user's home.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def has_existing_cluster() -> bool:
    """Return whether this process runs on an existing cluster (ray job submit, or RAY_ADDRESS)."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def get_submission_id() -> str | None:
    """Return the id, as `ray job stop` takes it, of the submitted job whose driver this process is; else None."""
    try:
        return str(parse_json(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None


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


def set_tune_variables() -> None:
    """Set those of Ray Tune's variables that the user did not set."""
    for name, value in _TUNE_VARIABLES.items():
        os.environ.setdefault(name, value)
