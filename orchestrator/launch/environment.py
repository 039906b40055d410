"""Ray's switches for everything the project runs. Ray reads some when it is imported, so jobs call this before."""

from __future__ import annotations

import atexit
import getpass
import json
import os
import secrets
import shutil
import tempfile

from orchestrator.config.cli import refuse
from orchestrator.config.errors import ConfigError
from orchestrator.launch.config import Destination, Placement

_SWITCHES = {
    # Clusters are closed to others; an explicit mode always wins over Ray's guesses.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Each run would start a Prometheus exporter in the driver; our metrics go to MLflow.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A worker answers Ray within milliseconds, whatever it trains; at Ray's 600 s a node that hangs costs ten minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # It would be one more process for each run: ours is a thread of the driver (launch/drains.py).
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray's set-up would print on the driver's screen, where the controllers are (launch/trainlog.py).
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}


def settle() -> None:
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


def prepare(prog: str, destination: Destination, placement: Placement) -> None:
    """Refuse places that cannot be (one line, exit status 2), then set what the user did not set of Ray's switches."""
    try:
        destination.resolved()
    except ConfigError as error:
        refuse(prog, error)
    switch(placement)


def switch(placement: Placement | None = None) -> None:
    """Set what the user did not set of Ray's switches; without a placement for jobs that train nothing."""
    placement = placement or Placement()
    settle()
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    # An end or a death is seen at the next poll: at Ray's 2 s small runs pay for it (pitfalls 3).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(placement.poll_seconds))
    if placement.elastic:
        # For a group that does not fit since a node has just gone: then the next look finds how many do. Ray: 60 s.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if is_submitted():
        return
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        # A token for the private cluster alone; without one Ray would write its own into the user's home.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def is_submitted() -> bool:
    """Whether this process runs on a cluster that was given to it (ray job submit, or RAY_ADDRESS)."""
    return bool(os.environ.get("RAY_ADDRESS"))


def submission_id() -> str | None:
    """The id of the submitted job that this process is the driver of; what `ray job logs` and `stop` take."""
    try:
        found = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)
