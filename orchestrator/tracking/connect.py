"""Opening of trackers: MLflow's, the built-in one, or a plug-in; in the background where that cannot fail."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import Plugin, create_plugin, register
from orchestrator.tracking.tracker import Tracker
from orchestrator.tracking.tracking_uri import parse_tracking_uri

MLFLOW = "mlflow"
MLFLOW_PLUGIN = Plugin(kind=MLFLOW)


@register("tracker", MLFLOW)
def open_mlflow_tracker(uri: str, experiment: str) -> Tracker:
    """Return MLflow's tracker. Raises TrackingError."""
    from orchestrator.tracking.mlflow_tracker import MlflowTracker  # MLflow takes more than a second to import

    return MlflowTracker(uri, experiment)


def open_tracker(uri: str, experiment: str, plugin: Plugin = MLFLOW_PLUGIN) -> Tracker:
    """Return the tracker that a plug-in makes of a URI, an experiment and its own arguments.

    Raises TrackingError; ConfigError when the plug-in cannot be made, or is no Tracker.
    """
    tracker = create_plugin("tracker", plugin.kind, plugin.args, uri=uri, experiment=experiment)
    names = (name for name in vars(Tracker) if not name.startswith("_"))
    if missing := [name for name in names if not callable(getattr(tracker, name, None))]:
        raise ConfigError(
            f"tracker {plugin.kind!r}: {type(tracker).__name__} must have the methods of a tracker, lacks "
            f"{', '.join(missing)}; derive it from orchestrator.tracking.tracker.Tracker"
        )
    return tracker  # type: ignore[no-any-return]


def will_create_database(uri: str, plugin: Plugin = MLFLOW_PLUGIN) -> bool:
    """Return whether the store is a database file that this job will create, in a folder where it can.

    Nothing can be wrong with such a store. An existing one can have another schema, a deleted experiment or no
    permission, which only MLflow's client detects. Raises TrackingError for an invalid URI.
    """
    path = parse_tracking_uri(uri).sqlite_path if plugin.kind == MLFLOW else None
    if path is None or os.path.lexists(path):
        return False
    above = next(folder for folder in Path(path).parents if folder.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)
