"""Ensembles in MLflow's model registry: registered once, served by `mlflow models serve`, fetched by name.

Importable without torch and mlflow; registering needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_json
from orchestrator.storage import commit, urls
from orchestrator.training.run_dir import get_final_weights_dir

CHAMPION_ALIAS = "champion"
MODEL_URI_PREFIX = "models:/"
# Imports of the code that is stored with the model; pinned to the versions that made it.
REQUIREMENTS = (
    *("mlflow", "numpy", "torch", "safetensors", "pydantic", "fsspec", "tenacity"),
    *("opencv-python-headless", "pillow", "simplejpeg"),
)
_INVALID_NAME_CHARS = re.compile(r"[/:'\"`]")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model."""

    model: str
    version: str
    is_new: bool  # else the same ensemble was registered before
    alias: str  # empty when the alias belongs to another version

    @property
    def uri(self) -> str:
        """The URI for MLflow's commands."""
        return f"{MODEL_URI_PREFIX}{self.model}{f'@{self.alias}' if self.alias else f'/{self.version}'}"


def make_model_name(family: str, dataset: str, digest: str) -> str:
    """Return the model name of a family's ensembles on a dataset, so that each dataset has its champion."""
    dataset = dataset[:60]  # the whole name may have 256 characters
    return f"{family}-{digest[:8]}" if family.endswith(f"-{dataset}") else f"{family}-{dataset}-{digest[:8]}"


def register_ensemble(
    tracking: str, run_id: str, model: str, ensemble: str, runs: Sequence[str], titles: Sequence[str], about: str = ""
) -> RegisteredVersion:
    """Register the ensemble of finished runs as a version of `model`; the same ensemble again changes nothing.

    tracking: URI of the MLflow store. run_id: of the ensemble's run there, which holds the model as an artifact.
    runs: URLs of the members' folders, in order. titles: readable names of the classes, or none. about: Markdown.
    The first version gets the alias, which only users move. Raises FileNotFoundError, CommitError or StorageError for
    weights that cannot be read, TrackingError.
    """
    from orchestrator.tracking.model_registry import ModelRegistry  # MLflow takes seconds to import

    model = _INVALID_NAME_CHARS.sub("-", model)
    registry = ModelRegistry(tracking)
    digest = compute_digest(runs, titles)
    known = registry.find_version(model, digest)
    number = known
    if number is None:
        names = [urls.get_basename(run) for run in runs]
        tags = {"orchestrator.ensemble": ensemble, "orchestrator.members": ",".join(names)}
        with tempfile.TemporaryDirectory(prefix="model-") as scratch:
            folder = write_package(scratch, runs, titles, {"ensemble": ensemble, "members": names})
            number = registry.register_model(model, digest, run_id, folder, about, tags)
    champion = registry.set_alias_if_unset(model, CHAMPION_ALIAS, number)
    return RegisteredVersion(model, str(number), known is None, CHAMPION_ALIAS if champion == number else "")


def compute_digest(runs: Sequence[str], titles: Sequence[str]) -> str:
    """Return a hash of the members' final weights in order and of the titles. Raises FileNotFoundError, CommitError."""
    if not runs:
        raise ConfigError("members must hold at least one model, got none; name one")
    weights = [checkpoint_dir.read_weights_digest(get_final_weights_dir(run)) for run in runs]
    return hashlib.sha256(json.dumps([weights, list(titles)]).encode()).hexdigest()[:16]


def write_package(scratch: str, runs: Sequence[str], titles: Sequence[str], metadata: Mapping[str, Any]) -> str:
    """Write an ensemble below a local folder as an MLflow model, of code and files, no pickles; return its folder."""
    from orchestrator.ensemble import mlflow_model  # MLflow takes seconds to import
    from orchestrator.tracking.model_registry import save_model  # the same

    weights = Path(scratch, mlflow_model.WEIGHTS_ARTIFACT)
    weights.mkdir()
    for number, run in enumerate(runs, start=1):
        # Names sort in the order of the members.
        (weights / f"{number:04d}-{urls.get_basename(run)}.safetensors").write_bytes(
            _read_exported_weights(get_final_weights_dir(run))
        )
    titles_file = Path(scratch, f"{mlflow_model.TITLES_ARTIFACT}.json")
    titles_file.write_text(json.dumps(list(titles)), encoding="utf-8")
    folder = os.path.join(scratch, "model")
    save_model(
        folder,
        python_model=mlflow_model.__file__,
        code_paths=[str(Path(__file__).parents[1])],
        artifacts={mlflow_model.WEIGHTS_ARTIFACT: str(weights), mlflow_model.TITLES_ARTIFACT: str(titles_file)},
        # After a plus comes the build, which package indexes do not know.
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        signature=mlflow_model.SIGNATURE,
        input_example=mlflow_model.make_input_example(),
        metadata=dict(metadata),
    )
    return folder


def find_champions(tracking: str) -> list[str]:
    """Return the URIs of all champions of this project in an MLflow store. Raises TrackingError."""
    from orchestrator.tracking.model_registry import ModelRegistry  # MLflow takes seconds to import

    names = ModelRegistry(tracking).find_models_with_alias(CHAMPION_ALIAS)
    return [f"{MODEL_URI_PREFIX}{name}@{CHAMPION_ALIAS}" for name in names]


def fetch_weights(tracking: str, model: str, scratch: str) -> tuple[list[str], list[str]]:
    """Return local files of a registered model's weights, in order, and the classes' titles.

    scratch: a local folder for the download. Raises TrackingError; ConfigError for a model that is no ensemble.
    """
    from orchestrator.tracking.model_registry import ModelRegistry  # MLflow takes seconds to import

    folder = Path(ModelRegistry(tracking).download_model(model, scratch))
    weights = sorted(str(path) for path in folder.glob("artifacts/weights/*.safetensors"))
    try:
        titles = parse_json((folder / "artifacts" / "titles.json").read_bytes())
    except (OSError, ValueError):
        titles = None
    if not weights or not isinstance(titles, list):
        raise ConfigError(f"model must be an ensemble that this project registered, got {model!r}; set another one")
    return weights, titles


def _read_exported_weights(final: str) -> bytes:
    """Return the averaged weights of a run as a safetensors file, verified."""
    exports = [data for name, data in commit.read_folder(final).items() if name.endswith(".safetensors")]
    if exports:
        return exports[0]
    # Only weights without an export need torch.
    from orchestrator.checkpoint import checkpoint

    loaded = checkpoint.load_final_weights(final)
    about = {"recipe": loaded.recipe, "classes": list(loaded.classes), "weights": loaded.digest}
    return bytes(checkpoint.export_safetensors(loaded.averaged, about))
