"""Models in MLflow's registry. Only drivers import this module, since importing mlflow takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator.config.redaction import redact
from orchestrator.storage import urls
from orchestrator.tracking import mlflow_env, sqlite_store

# Before the imports below: mlflow reads some variables on import.
mlflow_env.configure_mlflow()

import mlflow.pyfunc  # noqa: E402
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from orchestrator.tracking import tracking_uri as uris  # noqa: E402
from orchestrator.tracking.mlflow_tracker import MLFLOW_ERRORS, convert_error, iter_pages  # noqa: E402
from orchestrator.tracking.tracker import TrackingError  # noqa: E402

MODEL_URI_PREFIX = "models:/"
DIGEST_TAG = "orchestrator.digest"
_ALREADY_THERE = "RESOURCE_ALREADY_EXISTS"
_NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class ModelPackage:
    """An MLflow model: code that MLflow runs to load it, and files; nothing is pickled.

    python_model: local path of the model's file. code_paths: local folders of packages that it imports. artifacts: name
    to local path. requirements: of pip. signature, input_example: MLflow's.
    """

    python_model: str
    code_paths: Sequence[str]
    artifacts: Mapping[str, str]
    requirements: Sequence[str]
    signature: Any
    input_example: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str) -> None:
        """Write the MLflow model to a new local folder."""
        mlflow.pyfunc.save_model(
            path=folder,
            python_model=self.python_model,
            code_paths=list(self.code_paths),
            artifacts=dict(self.artifacts),
            pip_requirements=list(self.requirements),
            signature=self.signature,
            input_example=self.input_example,
            metadata=dict(self.metadata),
        )


class ModelRegistry:
    """The registered models of one MLflow store. Every method raises TrackingError, or TrackerUnreachableError."""

    def __init__(self, uri: str) -> None:
        """uri: as MlflowTracker takes it. Raises TrackingError for an invalid one; connects to nothing."""
        self._uri = uris.parse_tracking_uri(uri)
        if self._uri.sqlite_path is not None:
            sqlite_store.update_artifact_locations(self._uri.sqlite_path)
        self._client = MlflowClient(self._uri.raw, self._uri.raw)

    def find_version(self, name: str, digest: str) -> str | None:
        """Return the version of the model `name` with this digest; None when there is none, or its files are lost."""
        if "'" in name:
            raise TrackingError(f"model name {name!r} must have no quote, which MLflow cannot search for")
        with self._convert_errors(f"look for model {name!r}"):
            versions = [version for version in self._iter_versions(name) if version.tags.get(DIGEST_TAG) == digest]
            versions.sort(key=lambda version: int(version.version))
            return next((str(version.version) for version in versions if self._has_files(version)), None)

    def register_model(
        self, name: str, digest: str, run_id: str, folder: str, description: str, tags: Mapping[str, str]
    ) -> str:
        """Store the MLflow model in a local folder with a run, make it a version of the model `name`, and return that.

        description: for people, Markdown. A second call, after an interruption or a loss of files, completes the
        version.
        """
        with self._convert_errors(f"register model {name!r}"):
            # Each digest has its own path: an older version must not get the files of a newer one.
            path = _get_artifact_path(digest)
            self._client.log_artifacts(run_id, folder, path)
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != _ALREADY_THERE:
                    raise
            for known in self._iter_versions(name):
                if known.tags.get(DIGEST_TAG) == digest and known.run_id == run_id:
                    return str(known.version)  # its files had been lost
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{path}"
            short = {key: redact(text)[:5000] for key, text in {**tags, DIGEST_TAG: digest}.items()}
            return str(
                self._client.create_model_version(
                    name, source, run_id, tags=short, description=redact(description)
                ).version
            )

    def set_alias_if_unset(self, name: str, alias: str, version: str) -> str:
        """Set the alias unless a version with files has it, and return the version that has it. People may move it."""
        with self._convert_errors(f"name version {version} of model {name!r} {alias!r}"):
            try:
                holder = self._client.get_model_version_by_alias(name, alias)
                if str(holder.version) == version or self._has_files(holder):
                    return str(holder.version)
            except MlflowException as error:
                if error.error_code not in (_NOT_FOUND, "INVALID_PARAMETER_VALUE"):
                    raise
            self._client.set_registered_model_alias(name, alias, version)
            return version

    def find_models_with_alias(self, alias: str) -> list[str]:
        """Return the names of the models of this project that have a version with the alias, in order."""
        with self._convert_errors(f"look for models with the alias {alias!r}"):
            models = iter_pages(partial(self._client.search_registered_models, max_results=100))
            names = [str(model.name) for model in models if alias in model.aliases]
            return sorted(
                name for name in names if DIGEST_TAG in self._client.get_model_version_by_alias(name, alias).tags
            )

    def download_model(self, model: str, folder: str) -> str:
        """Return the local folder, below `folder`, with the files of a model that `register_model` registered.

        model: models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest.
        """
        # MLflow's own download of models:/... always uses the store of the environment.
        with self._convert_errors(f"fetch {model!r}"):
            version = self._resolve_version(model)
            digest = version.tags.get(DIGEST_TAG)
            if digest is None or not version.run_id:
                raise TrackingError(f"{model!r} must be a model that this project registered")
            if (local := self._find_moved_folder(version)) is not None:
                return local
            path = _get_artifact_path(digest)
            if not self._has_files(version):
                url = self._uri.redact(f"{self._client.get_run(version.run_id).info.artifact_uri}/{path}")
                raise TrackingError(
                    f"{model!r} (version {version.version}) must have its files in {url}, which holds none; rerun the "
                    "job that made the ensemble to register it anew"
                )
            return str(self._client.download_artifacts(version.run_id, path, folder))

    def _has_files(self, version: ModelVersion) -> bool:
        """Return whether a version's files are among the artifacts of its run, or at its source."""
        if self._find_moved_folder(version) is not None:
            return True
        digest = version.tags.get(DIGEST_TAG)
        if digest is None or not version.run_id:
            return True  # not registered by this project
        try:
            return bool(self._client.list_artifacts(version.run_id, _get_artifact_path(digest)))
        except MlflowException as error:
            if error.error_code != _NOT_FOUND:
                raise
            return False  # its run was deleted

    def _find_moved_folder(self, version: ModelVersion) -> str | None:
        """Return the local folder of a version whose read-only store was moved; None for any other."""
        if self._uri.sqlite_path is None or not version.source:
            return None
        url = sqlite_store.resolve_artifact_location(self._uri.sqlite_path, version.source)
        if url == version.source or not os.path.isdir(folder := urls.to_local_path(url)):
            return None
        return folder

    def _resolve_version(self, model: str) -> ModelVersion:
        reference = model.removeprefix(MODEL_URI_PREFIX)
        name, by_alias, alias = reference.rpartition("@")
        if by_alias:
            return self._client.get_model_version_by_alias(name, alias)
        name, _, version = reference.rpartition("/")
        if version == "latest" and (versions := list(self._iter_versions(name))):
            return max(versions, key=lambda version: int(version.version))
        if not name or not version.isdecimal():
            raise TrackingError(
                f"model must be an existing {MODEL_URI_PREFIX}NAME@ALIAS, {MODEL_URI_PREFIX}NAME/VERSION or "
                f"{MODEL_URI_PREFIX}NAME/latest, got {model!r}"
            )
        return self._client.get_model_version(name, version)

    def _iter_versions(self, name: str) -> Iterator[ModelVersion]:
        return iter_pages(partial(self._client.search_model_versions, f"name='{name}'", max_results=100))

    @contextmanager
    def _convert_errors(self, doing: str) -> Iterator[None]:
        """Turn MLflow's errors into TrackingErrors, not chained: their texts may hold credentials."""
        try:
            yield
        except MLFLOW_ERRORS as error:
            raise convert_error(error, self._uri, doing) from None


def _get_artifact_path(digest: str) -> str:
    """Return the path of a model among the artifacts of its run."""
    return f"models/{digest}"
