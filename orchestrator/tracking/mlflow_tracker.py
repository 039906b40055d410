"""Tracker that records in MLflow. Only drivers import this module, since importing mlflow takes seconds."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.config.json_text import parse_json
from orchestrator.config.redaction import redact
from orchestrator.tracking import mlflow_env, mlflow_errors, sqlite_store

# Before the imports below: mlflow reads some variables on import.
mlflow_env.configure_mlflow()

from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from orchestrator.tracking import login  # noqa: E402
from orchestrator.tracking import tracking_uri as uris  # noqa: E402
from orchestrator.tracking.tracker import (  # noqa: E402
    EXPERIMENT_TAGS,
    FinalStatus,
    MetricPoint,
    TrackedRun,
    TrackerUnreachableError,
    TrackingError,
)

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

KEY_TAG = "orchestrator.key"
PARENT_TAG = "mlflow.parentRunId"
FOLDER_TAG = "orchestrator.folder"
HEARTBEAT_TAG = "orchestrator.heartbeat"
CLOSED_AS_STALE_TAG = "orchestrator.reaped"
CHECKED_TAG = "orchestrator.checked"  # of an experiment: time of the latest write check
_HEARTBEAT_SECONDS = 10.0
_LATEST_SECONDS = 1e11  # unix time; MLflow's databases keep an end time as milliseconds in 64 bits
STALE_HEARTBEAT_SECONDS = 60.0  # a live driver's heartbeat changes several times within
_METRICS_PER_BATCH = 1000
_ITEMS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000
_TRIAL_FOLDER = re.compile(r"/sweeps/[^/]+/models/[^/]+$")
_MAX_TAG_LENGTH = 5000  # older servers; newer ones take 8000
_INVALID_NAME_CHARACTERS = re.compile(r"[^\w.\-/: ]", re.ASCII)
_CONNECT_SECONDS = 5.0
_RUNS_PER_PAGE = 1000


class MlflowTracker:
    """Tracker of one experiment of one MLflow store.

    A key has the same MLflow run permanently. The first call connects. Params, tags and texts are stored without the
    credentials of URLs.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: str | None = None) -> None:
        """uri: http(s)://..., sqlite:////absolute/path.db or an SQL database.

        artifact_root: URL of the artifacts of a new experiment; None: the server's choice, or a folder beside the
        sqlite file.

        Raises TrackingError for an invalid URI.
        """
        self._uri = uris.parse_tracking_uri(uri)
        self._experiment_name = experiment
        self._artifact_root = artifact_root
        self._connected: tuple[MlflowClient, str] | None = None
        self._steps: dict[str, _LastRecordedSteps] = {}
        self._heartbeats: dict[str, float] = {}
        self._stale_candidates: dict[str, tuple[str, float]] = {}  # by run: its heartbeat, and since when
        self._stale_seconds = 0.0
        # This variable makes MLflow nest new runs wrongly (mlflow#15713).
        if os.environ.pop("MLFLOW_RUN_ID", None) is not None:
            _log.info("MLFLOW_RUN_ID removed from this process: runs are found by their key")

    def check(self) -> None:
        """Find or create the experiment and tag it, which needs the permissions that runs need.

        Takes about 10 s for an unreachable server.
        """
        with mlflow_env.use_short_timeouts(), self._convert_errors("record runs (tried before the start)", Exception):
            client, experiment_id = self._connect()
            client.set_experiment_tag(experiment_id, CHECKED_TAG, _format_heartbeat())

    def check_readable(self) -> None:
        """Do the part of `check` that writes nothing, for a store that exists. Raises TrackingError."""
        with mlflow_env.use_short_timeouts(), self._convert_errors("be used", Exception):
            experiment = self._make_client().get_experiment_by_name(self._experiment_name)
            if experiment is not None:
                self._check_active(experiment)

    def open_run(self, run: TrackedRun) -> str:
        """Return the id of the run with this key, new or set back to RUNNING; existing params stay."""
        if "'" in run.key or "`" in run.key:
            raise TrackingError(f"run key {run.key!r} must have no quote, which MLflow cannot search for")
        tags = {**run.tags, KEY_TAG: run.key, HEARTBEAT_TAG: _format_heartbeat()}
        with self._convert_errors(f"open run {run.name!r}"):
            client, experiment_id = self._connect()
            mlflow_run = _find_run(client, experiment_id, run)
            if run.parent_id is not None and (mlflow_run is None or PARENT_TAG not in mlflow_run.data.tags):
                tags[PARENT_TAG] = run.parent_id  # a run that is nested elsewhere stays there
            if mlflow_run is not None:
                client.update_run(mlflow_run.info.run_id, status="RUNNING")
            else:
                short = {name: redact(text)[:_MAX_TAG_LENGTH] for name, text in tags.items()}
                mlflow_run = client.create_run(experiment_id, tags=short, run_name=run.name)
            run_id = str(mlflow_run.info.run_id)
            self._send_tags(client, run_id, tags)
            self._send_params(client, mlflow_run, run.params)
            self._steps[run_id] = _LastRecordedSteps(client, mlflow_run)
            self._heartbeats[run_id] = time.monotonic()
        return run_id

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Add the points past the last recorded step of their name, and a heartbeat."""
        with self._convert_errors(f"log to run {run_id}"):
            client, _ = self._connect()
            if run_id not in self._steps:
                self._steps[run_id] = _LastRecordedSteps(client, client.get_run(run_id))
            try:
                for batch in _iter_batches(self._steps[run_id].select_new(points), _METRICS_PER_BATCH):
                    client.log_batch(run_id, metrics=batch, synchronous=True)
                if time.monotonic() - self._heartbeats.get(run_id, -_HEARTBEAT_SECONDS) >= _HEARTBEAT_SECONDS:
                    self._send_tags(client, run_id, {HEARTBEAT_TAG: _format_heartbeat()})
                    self._heartbeats[run_id] = time.monotonic()
                    if any(
                        time.monotonic() - since >= STALE_HEARTBEAT_SECONDS
                        for _, since in self._stale_candidates.values()
                    ):
                        self.close_stale_runs(self._stale_seconds)
            except BaseException:
                # A batch whose answer was lost may have been recorded: query MLflow next time.
                del self._steps[run_id]
                raise

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or replace tags, each cut to 5000 characters."""
        with self._convert_errors(f"tag run {run_id}"):
            self._send_tags(self._connect()[0], run_id, tags)

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Store a text as the artifact `path`."""
        with self._convert_errors(f"store {path} of run {run_id}"):
            self._connect()[0].log_text(run_id, redact(text), path)

    def log_file(self, run_id: str, local_path: str, artifact_folder: str = "") -> None:
        """Store a local file under its own name in the artifact folder."""
        if not os.path.isfile(local_path):
            raise TrackingError(f"artifact {local_path!r} is not a file; give the path of an existing one")
        with self._convert_errors(f"store {local_path} of run {run_id}"):
            self._connect()[0].log_artifact(run_id, local_path, artifact_folder or None)

    def log_table(self, run_id: str, path: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Store a table that MLflow's page renders; path ends in .json.

        MLflow's own log_table appends to an older table, so a second call would double the rows.
        """
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1 or not path.endswith(".json"):
            raise TrackingError(f"table {path!r} must have a .json path and columns of equal length, got {lengths}")
        table = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        with self._convert_errors(f"store {path} of run {run_id}"):
            client, _ = self._connect()
            client.log_text(run_id, redact(json.dumps(table)), path)
            try:
                tables = parse_json(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
            except ValueError:
                tables = []
            tables = tables if isinstance(tables, list) else []  # a user may have edited the tag
            entry = {"path": path, "type": "table"}
            if entry not in tables:
                self._send_tags(client, run_id, {"mlflow.loggedArtifacts": json.dumps([*tables, entry])})

    def close_run(self, run_id: str, status: FinalStatus) -> None:
        """Set the final status and the end time."""
        with self._convert_errors(f"close run {run_id}"):
            self._connect()[0].set_terminated(run_id, status)
        self._steps.pop(run_id, None)
        self._heartbeats.pop(run_id, None)

    def get_run_url(self, run_id: str) -> str:
        """Return a link, or for a database the command that serves the page and the link it will have."""
        with self._convert_errors(f"look up run {run_id}"):
            page = f"/#/experiments/{self._connect()[1]}/runs/{run_id}"
        if self._uri.sqlite_path is None and self._uri.database is None:
            return self._uri.base_url + page
        # Without the login, MLflow's server would read its owner's files for every user of the machine.
        store = shlex.quote(self._uri.redacted)
        server = f"{mlflow_errors.MLFLOW} server --app-name {login.APP_NAME} --backend-store-uri {store}"
        return f"{server}  # then http://127.0.0.1:5000{page}"

    def close_stale_runs(self, stale_seconds: float) -> list[str]:
        """Close as KILLED, at their last heartbeat, RUNNING runs of dead drivers; return their ids.

        Runs without a heartbeat are not of this project. Clocks of machines differ, so an old heartbeat is a first sign
        only. A run is closed once its heartbeat has not changed for STALE_HEARTBEAT_SECONDS of this process's clock: by
        a later call, which `log_metrics` makes in time.
        """
        self._stale_seconds, closed, now = stale_seconds, [], time.monotonic()
        with self._convert_errors("close stale runs"):
            client, experiment_id = self._connect()
            candidates: dict[str, tuple[str, float]] = {}
            for run in list(_iter_running_runs(client, experiment_id)):
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
            root = self._artifact_root
            if self._uri.sqlite_path is not None:
                self._check_reachable()
                sqlite_store.update_artifact_locations(self._uri.sqlite_path)
                # MLflow's own default is ./mlruns below the working directory.
                root = root or sqlite_store.get_artifact_root(self._uri.sqlite_path)
            client = self._make_client()
            self._connected = client, self._get_or_create_experiment(client, root)
        return self._connected

    def _make_client(self) -> MlflowClient:
        self._check_reachable()
        return MlflowClient(self._uri.raw, self._uri.raw)

    def _check_reachable(self) -> None:
        """Raise within seconds when the store cannot be reached: MLflow would retry for minutes."""
        if self._uri.sqlite_path is not None:
            path = Path(self._uri.sqlite_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            _check_sqlite(path)
        if self._uri.database is not None:
            socket.create_connection(self._uri.database, _CONNECT_SECONDS).close()

    def _get_or_create_experiment(self, client: MlflowClient, root: str | None) -> str:
        experiment = client.get_experiment_by_name(self._experiment_name)
        if experiment is None:
            try:
                return str(client.create_experiment(self._experiment_name, root, EXPERIMENT_TAGS))
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
                f"experiment {self._experiment_name!r} was deleted in MLflow at {self._uri.redacted}; restore it with"
                f" MLFLOW_TRACKING_URI={self._uri.redacted} {mlflow_errors.MLFLOW} experiments restore --experiment-id"
                f" {experiment.experiment_id}, or set another name with --experiment"
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
        for batch in _iter_batches(new, _ITEMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=batch, synchronous=True)

    def _send_tags(self, client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
        items = [RunTag(name, redact(text)[:_MAX_TAG_LENGTH]) for name, text in tags.items()]
        for batch in _iter_batches(items, _ITEMS_PER_BATCH):
            client.log_batch(run_id, tags=batch, synchronous=True)

    @contextmanager
    def _convert_errors(self, doing: str, *more: type[Exception]) -> Iterator[None]:
        """Turn MLflow's errors, and `more`, into TrackingErrors, not chained: their texts may hold credentials."""
        try:
            yield
        except TrackingError:
            raise
        except (*MLFLOW_ERRORS, *more) as error:
            raise convert_error(error, self._uri, doing) from None


def _find_run(client: MlflowClient, experiment_id: str, run: TrackedRun) -> Run | None:
    """Return the oldest run of this key; else the oldest under an ensemble's key followed by this one."""
    for condition in (f"= '{run.key}'", f"LIKE '%{run.key}'"):
        candidates = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` {condition}", order_by=["start_time ASC"])
        # LIKE has wildcards and ignores case. A trial's recipe that is trained alone is another run.
        for candidate in candidates:
            key, tags = candidate.data.tags[KEY_TAG], candidate.data.tags
            if key == run.key or (key.endswith(run.key) and _is_trial(tags) == _is_trial(run.tags)):
                return candidate
    return None


def _is_trial(tags: Mapping[str, str]) -> bool:
    return _TRIAL_FOLDER.search(tags.get(FOLDER_TAG, "")) is not None


class _LastRecordedSteps:
    """The last recorded step of each metric of a run; queried once per name, then cached."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self._run_id = run.info.run_id
        self._unqueried = set(run.data.metrics)
        self._last: dict[str, int] = {}

    def select_new(self, points: Sequence[MetricPoint]) -> list[Metric]:
        """Return metrics for the points past the last step; from now on these steps count as recorded."""
        metrics = []
        for point in points:
            name = _INVALID_NAME_CHARACTERS.sub("_", point.name)
            if name in self._unqueried:
                history = self._client.get_metric_history(self._run_id, name)
                self._last[name] = max(metric.step for metric in history)
                self._unqueried.discard(name)
            if name not in self._last or point.step > self._last[name]:
                metrics.append(Metric(name, float(point.value), int(point.time * 1000), point.step))
                self._last[name] = point.step
        return metrics


# Raised by MLflow's clients when a store cannot be used.
MLFLOW_ERRORS: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError)


def convert_error(error: Exception, uri: uris.TrackingUri, doing: str) -> TrackingError:
    """Return the TrackingError for an error of MLflow, with its fix; TrackerUnreachableError for a transient one."""
    # SQLAlchemy adds the statement with its values.
    full_text = uri.redact(f"{type(error).__name__}: {error}".partition("\n[SQL")[0])
    text = (mlflow_errors.summarize_silence(full_text) or full_text[:600]).rstrip(". ") + "."
    if (schema := mlflow_errors.explain_schema_mismatch(full_text, uri.redacted, _is_known_revision)) is not None:
        return TrackingError(f"MLflow at {uri.redacted} cannot {doing}: {schema}")
    status = _get_http_status(error)
    if status is not None and 429 != status < 500:
        return TrackingError(
            f"MLflow at {uri.redacted} refused to {doing}: "
            f"{text}{mlflow_errors.explain_rejection(status, full_text, uri.redacted)}"
        )
    return TrackerUnreachableError(
        f"MLflow at {uri.redacted} cannot {doing}: {text} "
        f"{mlflow_errors.explain_no_response(uri.sqlite_path is not None, full_text)}"
    )


def _get_http_status(error: Exception) -> int | None:
    """Return the HTTP status of an answer, 0 when a module is missing and no request was sent, None without answer."""
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())  # type: ignore[no-untyped-call]
    return 0 if isinstance(error, ImportError) else None


def _is_known_revision(revision: str) -> bool:
    """Return whether this MLflow has the migration to a schema revision; True when that is unknown.

    MLflow has no API for it. An older database is the likelier case, and its advice does no harm.
    """
    try:
        migrations = resources.files("mlflow.store.db_migrations") / "versions"
        return any(entry.name.startswith(f"{revision}_") for entry in migrations.iterdir())
    except (ImportError, OSError):
        return True


def _check_sqlite(path: Path) -> None:
    """Raise sqlite3.Error when an existing database cannot be read and locked: MLflow would retry for minutes.

    Raises TrackingError for a read-only folder: SQLite writes its journal beside the database.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TrackingError(
            f"tracking: folder {path.parent} of {path.name} is not writable for this user; change its mode or owner, or"
            " set another place with --tracking"
        )
    if path.exists():
        with closing(
            sqlite3.connect(sqlite_store.make_sqlite_uri(str(path), "rw"), uri=True, timeout=_CONNECT_SECONDS)
        ) as database:
            database.execute("begin immediate")  # fails for a damaged, read-only or locked database
            database.rollback()


def _iter_running_runs(client: MlflowClient, experiment_id: str) -> Iterator[Run]:
    condition = "attributes.status = 'RUNNING'"
    return iter_pages(
        partial(client.search_runs, [experiment_id], condition, ViewType.ACTIVE_ONLY, max_results=_RUNS_PER_PAGE)
    )


def iter_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the items of all pages of one of MLflow's searches, called as `search(page_token=...)`."""
    token: str | None = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _iter_batches(items: list[_Item], length: int) -> Iterator[list[_Item]]:
    for start in range(0, len(items), length):
        yield items[start : start + length]


def _format_heartbeat() -> str:
    return f"{time.time():.1f}"


def _parse_heartbeat(beat: str) -> float:
    """Return the unix time in a heartbeat tag; NaN without one, or for a time that MLflow cannot store."""
    try:
        seconds = float(beat)
    except ValueError:
        return math.nan
    return seconds if 0 <= seconds <= _LATEST_SECONDS else math.nan
