"""Models in MLflow's registry. Only drivers import this module, since importing mlflow takes seconds."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.config.redaction import redact
from orchestrator.tracking import tracking_uri as uris
from orchestrator.tracking.mlflow_tracker import convert_errors  # prepares the imports below
from orchestrator.tracking.tracker import TrackingError

DIGEST_TAG = "orchestrator.digest"
_ARTIFACT_PATH = "models/{}"  # of a digest, among the artifacts of the run

import mlflow.pyfunc  # noqa: E402
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

save_model = mlflow.pyfunc.save_model


class ModelRegistry:
    """The registered models of one MLflow store. Every method raises TrackingError, or TrackerUnreachableError."""

    def __init__(self, uri: str) -> None:
        """uri: as MlflowTracker takes it. Raises TrackingError for an invalid one; connects to nothing."""
        self._uri = uris.parse_tracking_uri(uri)
        if self._uri.sqlite_path is not None:
            uris.update_artifact_locations(self._uri.sqlite_path)
        self._client = MlflowClient(self._uri.raw, self._uri.raw)

    def find_version(self, name: str, digest: str) -> str | None:
        """Return the newest version of `name` with this digest; None when there is none, or its files are lost."""
        with convert_errors(self._uri, f"look for model {name!r}"):
            versions = (each for each in self._list_versions(name)[::-1] if each.tags.get(DIGEST_TAG) == digest)
            return next((str(each.version) for each in versions if self._has_files(each)), None)

    def register_model(
        self, name: str, digest: str, run_id: str, folder: str, description: str, tags: Mapping[str, str]
    ) -> str:
        """Store the MLflow model in a local folder with a run, make it a version of `name`, and return that."""
        with convert_errors(self._uri, f"register model {name!r}"):
            # Of its own: an older version must not get the files of a newer one.
            path = _ARTIFACT_PATH.format(digest)
            self._client.log_artifacts(run_id, folder, path)
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{path}"
            short = {key: redact(text)[:5000] for key, text in {**tags, DIGEST_TAG: digest}.items()}
            version = self._client.create_model_version(
                name, source, run_id, tags=short, description=redact(description)
            )
            return str(version.version)

    def set_alias_if_unset(self, name: str, alias: str, version: str) -> str:
        """Set the alias unless a version with files has it, and return the version that has it. People may move it."""
        with convert_errors(self._uri, f"name version {version} of model {name!r} {alias!r}"):
            try:
                holder = self._client.get_model_version_by_alias(name, alias)
                if str(holder.version) == version or self._has_files(holder):
                    return str(holder.version)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
            self._client.set_registered_model_alias(name, alias, version)
            return version

    def find_models_with_alias(self, alias: str) -> list[str]:
        """Return the names of the models of this project that have a version with the alias, in order."""
        with convert_errors(self._uri, f"look for models with the alias {alias!r}"):
            models = self._client.search_registered_models(max_results=1000)  # the most that MLflow allows
            names = sorted(str(model.name) for model in models if alias in model.aliases)
            return [name for name in names if DIGEST_TAG in self._client.get_model_version_by_alias(name, alias).tags]

    def download_model(self, model: str, folder: str) -> str:
        """Return the local folder, below `folder`, with the files of a model that `register_model` registered.

        model: models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest.
        """
        # MLflow's own download of models:/... always uses the store of the environment.
        with convert_errors(self._uri, f"fetch {model!r}"):
            version = self._resolve_version(model)
            digest = version.tags.get(DIGEST_TAG)
            if digest is None or not version.run_id:
                raise TrackingError(f"{model!r} must be a model that this project registered")
            if not self._has_files(version):
                raise TrackingError(
                    f"{model!r} (version {version.version}) must have its files among the artifacts of run "
                    f"{version.run_id}, which has none; rerun the job that made the ensemble to register it anew"
                )
            return str(self._client.download_artifacts(version.run_id, _ARTIFACT_PATH.format(digest), folder))

    def _has_files(self, version: ModelVersion) -> bool:
        """Return whether a version of this project has files; True for one of another project."""
        if (digest := version.tags.get(DIGEST_TAG)) is None or not version.run_id:
            return True
        try:
            return bool(self._client.list_artifacts(version.run_id, _ARTIFACT_PATH.format(digest)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False  # its run was deleted

    def _resolve_version(self, model: str) -> ModelVersion:
        reference = model.removeprefix("models:/")
        name, by_alias, alias = reference.rpartition("@")
        if by_alias:
            return self._client.get_model_version_by_alias(name, alias)
        name, _, version = reference.rpartition("/")
        if version == "latest" and (versions := self._list_versions(name)):
            return versions[-1]
        if not name or not version.isdecimal():
            raise TrackingError(
                f"model must be an existing models:/NAME@ALIAS, models:/NAME/VERSION or "
                f"models:/NAME/latest, got {model!r}"
            )
        return self._client.get_model_version(name, version)

    def _list_versions(self, name: str) -> list[ModelVersion]:
        """Return the versions of a model, the newest last."""
        versions = self._client.search_model_versions(f"name='{name}'", max_results=10_000)
        return sorted(versions, key=lambda version: int(version.version))
