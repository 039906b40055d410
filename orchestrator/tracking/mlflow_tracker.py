"""Tracker that records in MLflow. Only drivers import this module, since importing mlflow takes seconds."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from orchestrator.config.redaction import redact
from orchestrator.tracking import login, mlflow_errors
from orchestrator.tracking import tracking_uri as uris
from orchestrator.tracking.tracker import FinalStatus, MetricPoint, TrackedRun, TrackingError

_TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_DEFAULT_TIMEOUT, _SHORT_TIMEOUT = "30", "4"  # seconds; in 30 a server can pass an artifact on to its object store
_is_timeout_default = _TIMEOUT_VARIABLE not in os.environ
# Before the imports below: mlflow reads some variables on import. The user's values stay.
for _name, _value in {
    # Two names: the second is for the libraries under it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # INFO chatter and links stay off the terminal; warnings and errors do not.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # mlflow's own are 120 s and 7 retries: a dead server would block a call for a quarter of an hour, and the replayer
    # retries anyway.
    _TIMEOUT_VARIABLE: _DEFAULT_TIMEOUT,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}.items():
    os.environ.setdefault(_name, _value)
# A warning for each retried request, of which an outage has hundreds; the last error is raised, and logged once.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

from mlflow.entities import Experiment, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

_log = logging.getLogger(__name__)

KEY_TAG = "orchestrator.key"
PARENT_TAG = "mlflow.parentRunId"
HEARTBEAT_TAG = "orchestrator.heartbeat"
CLOSED_AS_STALE_TAG = "orchestrator.reaped"
CHECKED_TAG = "orchestrator.checked"  # of an experiment: time of the latest write check
_HEARTBEAT_SECONDS = 10.0
STALE_HEARTBEAT_SECONDS = 60.0  # a live driver's heartbeat changes several times within
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 5000  # older servers; newer ones take 8000
_INVALID_NAME_CHARACTERS = re.compile(r"[^\w.\-/: ]", re.ASCII)
_PART_PREFIX = ".mlflow-part-"  # of databases that are being made
_PART_SECONDS = 3600.0  # the driver that made an older one has died


class MlflowTracker:
    """Tracker of one experiment of one MLflow store. Params, tags and texts are stored without credentials of URLs.

    A key has the same MLflow run permanently. The first call connects.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        """uri: http(s)://... or sqlite:////absolute/path.db. Raises TrackingError for another one."""
        self._uri = uris.parse_tracking_uri(uri)
        self._experiment_name = experiment
        self._connected: tuple[MlflowClient, str] | None = None
        # By run: the last recorded step of each metric, None where MLflow knows it and was not asked yet.
        self._steps: dict[str, dict[str, int | None]] = {}
        self._heartbeats: dict[str, float] = {}
        self._stale_candidates: dict[str, tuple[str, float]] = {}  # by run: its heartbeat, and since when
        self._stale_seconds = 0.0
        # This variable makes MLflow nest new runs wrongly (mlflow#15713).
        os.environ.pop("MLFLOW_RUN_ID", None)

    def check(self) -> None:
        """Find or create the experiment and tag it, which needs the permissions that runs need."""
        with _use_short_timeout(), convert_errors(self._uri, "record runs (tried before the start)", Exception):
            client, experiment_id = self._connect()
            client.set_experiment_tag(experiment_id, CHECKED_TAG, _format_heartbeat())

    def check_readable(self) -> None:
        """Do the part of `check` that writes nothing, for a store that exists. Raises TrackingError."""
        with _use_short_timeout(), convert_errors(self._uri, "be used", Exception):
            self._check_reachable()
            client = MlflowClient(self._uri.raw, self._uri.raw)
            if (experiment := client.get_experiment_by_name(self._experiment_name)) is not None:
                self._check_active(experiment)

    def open_run(self, run: TrackedRun) -> str:
        """Return the id of the run with this key, new or set back to RUNNING; existing params stay."""
        if "'" in run.key or "`" in run.key:
            raise TrackingError(f"run key {run.key!r} must have no quote, which MLflow cannot search for")
        tags = {**run.tags, KEY_TAG: run.key, HEARTBEAT_TAG: _format_heartbeat()}
        with convert_errors(self._uri, f"open run {run.name!r}"):
            client, experiment_id = self._connect()
            condition = f"tags.`{KEY_TAG}` = '{run.key}'"
            found = client.search_runs([experiment_id], condition, max_results=1, order_by=["start_time ASC"])
            mlflow_run = found[0] if found else None
            if run.parent_id is not None and (mlflow_run is None or PARENT_TAG not in mlflow_run.data.tags):
                tags[PARENT_TAG] = run.parent_id  # a run that is nested elsewhere stays there
            if mlflow_run is None:
                mlflow_run = client.create_run(experiment_id, tags=_shorten_tags(tags), run_name=run.name)
            else:
                client.update_run(mlflow_run.info.run_id, status="RUNNING")
                self._send_tags(client, mlflow_run.info.run_id, tags)
            run_id = str(mlflow_run.info.run_id)
            self._send_params(client, mlflow_run, run.params)
            self._steps[run_id] = dict.fromkeys(mlflow_run.data.metrics)
            self._heartbeats[run_id] = time.monotonic()
        return run_id

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Add the points past the last recorded step of their name, and a heartbeat."""
        with convert_errors(self._uri, f"log to run {run_id}"):
            client, _ = self._connect()
            if run_id not in self._steps:
                self._steps[run_id] = dict.fromkeys(client.get_run(run_id).data.metrics)
            try:
                client.log_batch(run_id, metrics=self._select_new(client, run_id, points), synchronous=True)
                if time.monotonic() - self._heartbeats.get(run_id, -_HEARTBEAT_SECONDS) >= _HEARTBEAT_SECONDS:
                    self._send_tags(client, run_id, {HEARTBEAT_TAG: _format_heartbeat()})
                    self._heartbeats[run_id] = time.monotonic()
                    if self._stale_candidates:
                        self.close_stale_runs(self._stale_seconds)
            except BaseException:
                # A batch whose answer was lost may have been recorded: query MLflow next time.
                del self._steps[run_id]
                raise

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or replace tags, each cut to 5000 characters."""
        with convert_errors(self._uri, f"tag run {run_id}"):
            self._send_tags(self._connect()[0], run_id, tags)

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Store a text as the artifact `path`."""
        with convert_errors(self._uri, f"store {path} of run {run_id}"):
            self._connect()[0].log_text(run_id, redact(text), path)

    def log_file(self, run_id: str, local_path: str, artifact_folder: str = "") -> None:
        """Store a local file under its own name in the artifact folder."""
        if not os.path.isfile(local_path):
            raise TrackingError(f"artifact {local_path!r} is not a file; give the path of an existing one")
        with convert_errors(self._uri, f"store {local_path} of run {run_id}"):
            self._connect()[0].log_artifact(run_id, local_path, artifact_folder or None)

    def log_table(self, run_id: str, path: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Store a table that MLflow's page renders; path ends in .json. MLflow's own log_table would append to it."""
        table = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        with convert_errors(self._uri, f"store {path} of run {run_id}"):
            client, _ = self._connect()
            client.log_text(run_id, redact(json.dumps(table)), path)
            tables, entry = [], {"path": path, "type": "table"}
            with suppress(ValueError, TypeError):  # a user may have edited the tag
                tables = [*json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))]
            if entry not in tables:
                self._send_tags(client, run_id, {"mlflow.loggedArtifacts": json.dumps([*tables, entry])})

    def close_run(self, run_id: str, status: FinalStatus) -> None:
        """Set the final status and the end time."""
        with convert_errors(self._uri, f"close run {run_id}"):
            self._connect()[0].set_terminated(run_id, status)
        self._steps.pop(run_id, None)
        self._heartbeats.pop(run_id, None)

    def get_run_url(self, run_id: str) -> str:
        """Return a link, or for a database the command that serves the page and the link it will have."""
        with convert_errors(self._uri, f"look up run {run_id}"):
            page = f"/#/experiments/{self._connect()[1]}/runs/{run_id}"
        if self._uri.sqlite_path is None:
            return self._uri.base_url + page
        # Without the login, MLflow's server would read its owner's files for every user of the machine.
        store = shlex.quote(self._uri.redacted)
        server = f"{mlflow_errors.MLFLOW} server --app-name {login.APP_NAME} --backend-store-uri {store}"
        return f"{server}  # then http://127.0.0.1:5000{page}"

    def close_stale_runs(self, stale_seconds: float) -> list[str]:
        """Close as KILLED, at their last heartbeat, RUNNING runs of dead drivers; return their ids.

        Runs without a heartbeat are not of this project. Clocks of machines differ, so a run is closed once an old
        heartbeat has not changed for STALE_HEARTBEAT_SECONDS: by a later call, which `log_metrics` makes in time.
        """
        self._stale_seconds, closed, now = stale_seconds, [], time.monotonic()
        with convert_errors(self._uri, "close stale runs"):
            client, experiment_id = self._connect()
            candidates: dict[str, tuple[str, float]] = {}
            for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
                run_id, beat = str(run.info.run_id), run.data.tags.get(HEARTBEAT_TAG, "")
                if run_id in self._steps or not abs(time.time() - _parse_heartbeat(beat)) > stale_seconds:
                    continue
                before, since = self._stale_candidates.get(run_id, ("", now))
                candidates[run_id] = (beat, since if before == beat else now)
                if before == beat and now - since >= STALE_HEARTBEAT_SECONDS:
                    self._send_tags(client, run_id, {CLOSED_AS_STALE_TAG: _format_heartbeat()})
                    client.set_terminated(run_id, "KILLED", end_time=int(_parse_heartbeat(beat) * 1000))
                    closed.append(run_id)
                    del candidates[run_id]
            self._stale_candidates = candidates
        return closed

    def _connect(self) -> tuple[MlflowClient, str]:
        if self._connected is None:
            self._check_reachable()
            if self._uri.sqlite_path is not None:
                uris.update_artifact_locations(self._uri.sqlite_path)
            client = MlflowClient(self._uri.raw, self._uri.raw)
            self._connected = client, self._get_or_create_experiment(client)
        return self._connected

    def _check_reachable(self) -> None:
        """Raise within seconds when a database cannot be read and locked: MLflow would retry for minutes.

        Raises sqlite3.Error; TrackingError for a read-only folder, since SQLite writes its journal beside the database.
        """
        if self._uri.sqlite_path is None:
            return
        path = Path(self._uri.sqlite_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise TrackingError(
                f"tracking: folder {path.parent} of {path.name} is not writable for this user; change its mode or "
                "owner, or set another place with --tracking"
            )
        if not path.exists():
            _create_database(path)
        with closing(uris.open_sqlite(str(path))) as database:
            database.execute("begin immediate")  # fails for a damaged, read-only or locked database
            database.rollback()

    def _get_or_create_experiment(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment_name)
        if experiment is None:
            # MLflow's own default is ./mlruns below the working directory; a server chooses by itself.
            root = uris.get_artifact_root(self._uri.sqlite_path) if self._uri.sqlite_path else None
            try:
                # MLflow's page opens on the runs and their curves instead of on its views for language models.
                tags = {"mlflow.experimentKind": "custom_model_development"}
                return str(client.create_experiment(self._experiment_name, root, tags))
            except MlflowException:
                # Another driver may have created it meanwhile.
                experiment = client.get_experiment_by_name(self._experiment_name)
                if experiment is None:
                    raise
        self._check_active(experiment)
        return str(experiment.experiment_id)

    def _check_active(self, experiment: Experiment) -> None:
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {self._experiment_name!r} was deleted in MLflow at {self._uri.redacted}; restore it with "
                f"{mlflow_errors.format_restore_command('experiment', experiment.experiment_id, self._uri.redacted)}, "
                "or set another name with --experiment"
            )

    def _send_params(self, client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
        known = run.data.params
        texts = {
            _INVALID_NAME_CHARACTERS.sub("_", name): redact(text)[:_MAX_PARAM_LENGTH] for name, text in params.items()
        }
        changed = sorted(name for name, text in texts.items() if known.get(name, text) != text)
        if changed:
            _log.warning("run %s: params cannot change, old values stay: %s", run.info.run_id, changed)
        new = [Param(name, text) for name, text in texts.items() if name not in known]
        client.log_batch(run.info.run_id, params=new, synchronous=True)

    def _send_tags(self, client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
        items = [RunTag(name, text) for name, text in _shorten_tags(tags).items()]
        client.log_batch(run_id, tags=items, synchronous=True)

    def _select_new(self, client: MlflowClient, run_id: str, points: Sequence[MetricPoint]) -> list[Metric]:
        """Return metrics for the points past the last step; from now on these steps count as recorded."""
        metrics, last_steps = [], self._steps[run_id]
        for point in points:
            name = _INVALID_NAME_CHARACTERS.sub("_", point.name)
            last = last_steps.get(name)
            if last is None and name in last_steps:
                last = max(metric.step for metric in client.get_metric_history(run_id, name))
            if last is None or point.step > last:
                metrics.append(Metric(name, float(point.value), int(point.time * 1000), point.step))
                last = point.step
            last_steps[name] = last
        return metrics


def _create_database(path: Path) -> None:
    """Make MLflow's tables in another file and link it to `path`.

    It takes seconds, and MLflow cannot use a database in which a killed driver made half of the tables.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # takes a second, which a server needs not

    for old in path.parent.glob(f"{_PART_PREFIX}*"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _PART_SECONDS:
                old.unlink()
    part = path.with_name(f"{_PART_PREFIX}{uuid.uuid4().hex}")
    try:
        uri = uris.make_tracking_uri(str(part))
        store = SqlAlchemyStore(uri, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        try:
            os.link(part, path)
        except OSError:  # another driver was first, or a file system without links
            if not path.exists():
                part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _shorten_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: redact(text)[:_MAX_TAG_LENGTH] for name, text in tags.items()}


@contextmanager
def _use_short_timeout() -> Iterator[None]:
    """Use a short time-out for the calls inside, since a person waits, unless the user has set one."""
    if _is_timeout_default:
        os.environ[_TIMEOUT_VARIABLE] = _SHORT_TIMEOUT
    try:
        yield
    finally:
        if _is_timeout_default:
            os.environ[_TIMEOUT_VARIABLE] = _DEFAULT_TIMEOUT


@contextmanager
def convert_errors(uri: uris.TrackingUri, doing: str, *more: type[Exception]) -> Iterator[None]:
    """Turn MLflow's errors, and `more`, into TrackingErrors, not chained: their texts may hold credentials."""
    kinds: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, *more)
    try:
        yield
    except TrackingError:
        raise
    except kinds as error:
        # SQLAlchemy adds the statement with its values.
        text = uri.redact(f"{type(error).__name__}: {error}".partition("\n[SQL")[0])
        status = int(error.get_http_status_code()) if isinstance(error, MlflowException) else 0  # type: ignore[no-untyped-call]
        raise mlflow_errors.make_error(text, status, uri, doing) from None


def _format_heartbeat() -> str:
    return f"{time.time():.1f}"


def _parse_heartbeat(beat: str) -> float:
    """Return the unix time in a heartbeat tag; NaN without one, or for a time that MLflow cannot store."""
    return float(beat) if re.fullmatch(r"\d{1,11}(\.\d+)?", beat, re.ASCII) else math.nan
