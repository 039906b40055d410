"""Models in MLflow's registry. Like tracking.mlflow imported by drivers only: mlflow costs seconds to import."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config.redaction import redact
from orchestrator.storage import urls
from orchestrator.tracking import mlflow_env, sqlite_store

# Before the imports below: mlflow reads some of it while it is imported.
mlflow_env.configure_mlflow()

import mlflow.pyfunc  # noqa: E402
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from orchestrator.tracking import tracking_uri as uris  # noqa: E402
from orchestrator.tracking.mlflow_tracker import MLFLOW_ERRORS, convert_error  # noqa: E402
from orchestrator.tracking.tracker import TrackingError  # noqa: E402

MODEL_URI_PREFIX = "models:/"
DIGEST_TAG = "orchestrator.digest"
_ALREADY_THERE = "RESOURCE_ALREADY_EXISTS"
_NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class ModelPackage:
    """A model as it is to be kept: code that MLflow runs to load it, and files; nothing is pickled.

    code: local path of the model's file. beside: local folders of packages that it imports. artifacts: local paths by
    the names under which the code finds them. requirements: as pip knows them. signature, example: MLflow's.
    """

    python_model: str
    code_paths: Sequence[str]
    artifacts: Mapping[str, str]
    requirements: Sequence[str]
    signature: Any
    input_example: Any
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str) -> None:
        """Write it as an MLflow model to a local folder that is not there yet."""
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
    """The registered models of one MLflow store. Every method raises TrackingError, or TrackerUnreachable."""

    def __init__(self, uri: str) -> None:
        """uri: as MlflowTracker takes it. Raises TrackingError for one that is refused; nothing is contacted."""
        self._uri = uris.parse_tracking_uri(uri)
        if self._uri.sqlite_path is not None:
            sqlite_store.update_artifact_locations(self._uri.sqlite_path)
        self._client = MlflowClient(self._uri.raw, self._uri.raw)

    def find_version(self, name: str, digest: str) -> str | None:
        """The version of the model `name` that was made from what has this digest; None when there is none.

        A version whose files are no longer there does not count.
        """
        if "'" in name:
            raise TrackingError(f"model name {name!r} has a quote in it; MLflow cannot search for that")
        with self._convert_errors(f"look for model {name!r}"):
            found = [one for one in self._iter_versions(name) if one.tags.get(DIGEST_TAG) == digest]
            there = (one for one in sorted(found, key=lambda one: int(one.version)) if self._has_files(one))
            return next((str(one.version) for one in there), None)

    def register_model(
        self, name: str, digest: str, run_id: str, folder: str, about: str, tags: Mapping[str, str]
    ) -> str:
        """Store the MLflow model in a local folder with a run, and make it a version of the model `name`; which one.

        about: for people, Markdown. Done again after it was cut off, or after files were lost, it makes good what was
        missing.
        """
        with self._convert_errors(f"register model {name!r}"):
            # Each under its own path: an older version must not get the files of a newer one.
            place = _get_artifact_path(digest)
            self._client.log_artifacts(run_id, folder, place)
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != _ALREADY_THERE:
                    raise
            for known in self._iter_versions(name):
                if known.tags.get(DIGEST_TAG) == digest and known.run_id == run_id:
                    return str(known.version)  # its files had been lost
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{place}"
            short = {key: redact(text)[:5000] for key, text in {**tags, DIGEST_TAG: digest}.items()}
            made = self._client.create_model_version(name, source, run_id, tags=short, description=redact(about))
            return str(made.version)

    def set_alias_if_unset(self, name: str, alias: str, version: str) -> str:
        """The version that has the alias: this one when none has it, or when the files of that version are lost.

        Later it is for people to move.
        """
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
            found: list[str] = []
            token: str | None = None
            while True:
                page = self._client.search_registered_models(max_results=100, page_token=token)
                found += [one.name for one in page if alias in one.aliases]
                token = page.token
                if not token:
                    break
            return sorted(
                name for name in found if DIGEST_TAG in self._client.get_model_version_by_alias(name, alias).tags
            )

    def download_model(self, model: str, folder: str) -> str:
        """The local folder, below `folder`, with the files of a model that `add` registered.

        model: models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest.
        """
        # Not by MLflow's own download of models:/...: it asks the store of the environment, whatever it is told.
        with self._convert_errors(f"fetch {model!r}"):
            found = self._resolve_version(model)
            digest = found.tags.get(DIGEST_TAG)
            if digest is None or not found.run_id:
                raise TrackingError(f"{model!r} is refused: not registered by this project")
            if (local := self._find_moved_folder(found)) is not None:
                return local
            if not self._has_files(found):
                where = self._uri.redact(
                    f"{self._client.get_run(found.run_id).info.artifact_uri}/{_get_artifact_path(digest)}"
                )
                raise TrackingError(
                    f"{model!r} (version {found.version}) must have its files in {where}, which holds none; rerun the "
                    "job that made the ensemble to register it anew"
                )
            return str(self._client.download_artifacts(found.run_id, _get_artifact_path(digest), folder))

    def _has_files(self, version: ModelVersion) -> bool:
        """Return whether a version's files are among the artifacts of its run, or where its source says."""
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
        """Return the local folder of a version whose store was moved and may not be written; None for any other."""
        if self._uri.sqlite_path is None or not version.source:
            return None
        place = sqlite_store.resolve_artifact_location(self._uri.sqlite_path, version.source)
        if place == version.source or not os.path.isdir(folder := urls.to_local_path(place)):
            return None
        return folder

    def _resolve_version(self, model: str) -> ModelVersion:
        what = model.removeprefix(MODEL_URI_PREFIX)
        name, by_alias, alias = what.rpartition("@")
        if by_alias:
            return self._client.get_model_version_by_alias(name, alias)
        name, _, version = what.rpartition("/")
        if version == "latest" and (found := list(self._iter_versions(name))):
            return max(found, key=lambda one: int(one.version))
        if not name or not version.isdecimal():
            raise TrackingError(
                f"{model!r} is refused: no such model; give {MODEL_URI_PREFIX}NAME@ALIAS, "
                f"{MODEL_URI_PREFIX}NAME/VERSION or {MODEL_URI_PREFIX}NAME/latest"
            )
        return self._client.get_model_version(name, version)

    def _iter_versions(self, name: str) -> Iterator[ModelVersion]:
        token: str | None = None
        while True:
            page = self._client.search_model_versions(f"name='{name}'", max_results=100, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    @contextmanager
    def _convert_errors(self, doing: str) -> Iterator[None]:
        """Turn MLflow's errors into ours. The originals are not chained: their texts may hold credentials."""
        try:
            yield
        except MLFLOW_ERRORS as error:
            raise convert_error(error, self._uri, doing) from None


def _get_artifact_path(digest: str) -> str:
    """Where a model lies among the artifacts of its run."""
    return f"models/{digest}"
