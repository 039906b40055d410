"""The public Python API: train, score and use models as the commands do, with typed results instead of exit statuses.

Importable without torch or ray: each function imports what it needs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, Unpack

from orchestrator.cli.config import EnsembleScores, Errors, TrainResult  # noqa: F401  Errors is exported
from orchestrator.config.arg_parser import JSON_SUFFIX, apply_settings
from orchestrator.config.errors import ConfigError, format_suggestion
from orchestrator.ensemble.config import EvaluateConfig, ModelChoice, TrainEnsembleConfig
from orchestrator.evaluation.scoring_task import DEFAULT_CROPS
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.run_spec import Destination, JobConfigT, Placement, build_job_presets, build_recipe_preset
from orchestrator.recipe import presets, recipe_file
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.recipe_file import RecipeFile
from orchestrator.scheduler.config import TrainModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from orchestrator.evaluation.classifier import Classifier

Location = str | os.PathLike[str]  # an absolute path or a URL
RunChoice = str | TrainResult | EnsembleScores  # a result, or the name or folder URL of a run or ensemble
_ResultT = TypeVar("_ResultT", TrainResult, EnsembleScores)


class Options(TypedDict, total=False):
    """Options of `train`, `train_ensemble` and `evaluate`.

    data: URL of a packed dataset, or "digits" for the embedded one; by default that of the preset or of the runs.
    storage: folder URL of runs; by default $ORCHESTRATOR_RUNS, else ~/orchestrator-runs.
    tracking: MLflow tracking URI; by default $MLFLOW_TRACKING_URI, else a sqlite database in the storage folder.
    experiment: MLflow experiment; by default $MLFLOW_EXPERIMENT_NAME, else "googlenet".
    settings: any flag of the command by its name, such as {"epochs": 3, "placement.workers": 2}.
    verbose: print progress and tables, which is the default.
    """

    data: Location
    storage: Location
    tracking: str
    experiment: str
    settings: Mapping[str, object] | None
    verbose: bool


def train(recipe: Recipe | str = presets.DEFAULT, **options: Unpack[Options]) -> TrainResult:
    """Train one model, as `orchestrator train` does; a finished run is not retrained, a stopped one is resumed.

    Args:
        recipe: a Recipe, the name of a preset, or the path or URL of a recipe file (.json).
        **options: data, storage, tracking, experiment, settings and verbose; see `orchestrator.api.Options`.

    Returns:
        The run and its last metrics; `status` says whether it finished.

    Raises:
        ConfigError: before anything is started, where the command exits with status 2.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved.
    """
    config = _build_job(TrainModel, recipe, _join_flags(options))
    _prepare_cluster(config.destination, config.placement)
    from orchestrator.cli import train as command  # torch, ray and mlflow take seconds to import

    return _check_interrupt(command.train_model(config, _make_console(options)))


def train_ensemble(
    recipe: Recipe | str = presets.DEFAULT, *, members: int | None = None, **options: Unpack[Options]
) -> EnsembleScores:
    """Train an ensemble and score it with 1, 10 and 144 crops, as `orchestrator train-ensemble` does.

    Finished models and existing scores are reused. Arguments and errors are those of `train`.

    Args:
        recipe: as for `train`.
        members: number of models; by default that of the command.
        **options: as for `train`.
    """
    config = _build_job(TrainEnsembleConfig, recipe, _join_flags(options, **{"ensemble.members": members}))
    _prepare_cluster(config.destination, config.placement)
    from orchestrator.cli import train_ensemble as command  # torch, ray and mlflow take seconds to import

    return _check_interrupt(command.train_ensemble(config, _make_console(options)))


def evaluate(
    *runs: RunChoice,
    members: Sequence[int] = (),
    weights: Literal["averaged", "raw", "best"] = "averaged",
    **options: Unpack[Options],
) -> EnsembleScores:
    """Score finished models as one ensemble with 1, 10 and 144 crops, as `orchestrator evaluate` does.

    Errors are those of `train`.

    Args:
        *runs: results of training, or names of runs and ensembles in `storage`, or the absolute paths or URLs of their
            folders.
        members: numbers of the models to take, from 1; by default all.
        weights: which weights of each model to score.
        **options: as for `train`; data may be another dataset of the same classes.
    """
    flags = _join_flags(options, weights=weights, members=tuple(members) or None)
    config = apply_settings(EvaluateConfig(runs=tuple(map(_get_folder, runs))), flags)
    _prepare_cluster(config.provisional_destination, config.placement)
    from orchestrator.cli import train_ensemble as command  # torch, ray and mlflow take seconds to import

    return _check_interrupt(command.evaluate_runs(config, _make_console(options)))


def load(run: RunChoice = "", *, members: Sequence[int] = (), storage: Location = "", tracking: str = "") -> Model:
    """Load finished models as one classifier of images, as `orchestrator predict` does. Needs no cluster.

    Args:
        run: result of training, name or folder URL of a run or an ensemble, or models:/NAME@ALIAS of MLflow's registry;
            by default the registered champion.
        members: numbers of the ensemble's models to use, from 1; by default all.
        storage: folder URL of runs, by default as for `train`, like tracking.
        tracking: MLflow tracking URI of the registry.

    Raises:
        ConfigError: when there is no such model, or it is not finished.
    """
    places: Options = {"storage": storage, "tracking": tracking}
    flags = _join_flags(places, model=_get_folder(run), members=tuple(members) or None)
    choice = apply_settings(ModelChoice(), flags)
    ray_env.prepare_process()
    from orchestrator.cli import predict as command  # torch takes seconds to import

    return Model(*command.load_classifier(choice))


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities of images.

    probabilities: float32, shape (images, classes); each row adds up to 1.
    classes: readable names of the columns.
    """

    probabilities: NDArray[np.float32]
    classes: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The number of the most likely class of each image: int64, shape (images,)."""
        labels: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return labels

    @property
    def names(self) -> list[str]:
        """The name of the most likely class of each image."""
        return [self.classes[label] for label in self.labels]

    def rank(self, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the `top` most likely classes of each image with their probabilities, the most likely first."""
        orders = (-self.probabilities).argsort(axis=1, kind="stable")[:, :top]
        rows = zip(self.probabilities, orders, strict=True)
        return [[(self.classes[label], float(row[label])) for label in order] for row, order in rows]


class Model:
    """Trained networks as one classifier: the mean over networks of the mean over crops of their probabilities."""

    def __init__(self, classifier: Classifier, description: str) -> None:
        self._classifier = classifier
        self.description = description  # which models these are
        self.classes: tuple[str, ...] = classifier.names

    def __len__(self) -> int:
        """Return the number of networks."""
        return len(self._classifier)

    def __repr__(self) -> str:
        return f"Model({self.description!r}, {len(self.classes)} classes)"

    def predict(
        self,
        images: Location | bytes | NDArray[np.uint8] | Sequence[Location | bytes | NDArray[np.uint8]],
        crops: Literal[1, 10, 144] = DEFAULT_CROPS,
    ) -> Predictions:
        """Classify images: paths or URLs of JPEG or PNG files, their bytes, or RGB pixels (uint8, height x width x 3).

        crops: of each image; more take proportionally longer and are slightly more accurate.

        Raises:
            ConfigError: for an image that is missing or of an unknown form.
            BadSampleError: for an image that cannot be decoded; the message has its number, from 0.
        """
        several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        encoded = [_encode_image(image) for image in (images if several else [images])]  # type: ignore[union-attr]
        return Predictions(self._classifier.predict_probabilities(encoded, crops), self.classes)


def _build_job(kind: type[JobConfigT], recipe: Recipe | str, flags: dict[str, object]) -> JobConfigT:
    """Return the configuration of a training, as its command line would give it. Raises ConfigError."""
    if isinstance(recipe, Recipe):
        start = build_recipe_preset(kind, RecipeFile(recipe=recipe))
    elif recipe.endswith(JSON_SUFFIX):
        start = build_recipe_preset(kind, recipe_file.load_recipe(recipe))
    else:
        known = build_job_presets(kind)
        if recipe not in known:
            raise ConfigError(f"recipe: {recipe!r}: unknown preset{format_suggestion(recipe, list(known), 'presets')}")
        start = known[recipe]
    return apply_settings(start.value, flags)


def _join_flags(options: Options, **named: object) -> dict[str, object]:
    """Return the flags that were given; empty ones keep the command's default. Raises TypeError for unknown options."""
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    places = {name: value for name, value in options.items() if name not in ("settings", "verbose")}
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in places.items()}
    flags = {name: value for name, value in {**given, **named}.items() if value not in ("", None)}
    return {**flags, **(options.get("settings") or {})}


def _prepare_cluster(destination: Destination, placement: Placement) -> None:
    """Check places and environment, and set Ray's switches. Raises ConfigError."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("training must be called from the main thread, because it handles signals")
    destination.resolve()
    ray_env.check_ray_environment()
    ray_env.set_ray_variables(placement)


def _make_console(options: Options) -> Console:
    from orchestrator.cli import exit_status  # rich and readers of storage, which importing the API does not need

    console = exit_status.make_console()
    console.quiet = not options.get("verbose", True)
    return console


def _check_interrupt(result: _ResultT) -> _ResultT:
    """Return a result; raise KeyboardInterrupt for one that Ctrl-C stopped: the caller's script is to stop as well."""
    if result.exit_status == 128 + signal.SIGINT:
        raise KeyboardInterrupt(f"{result.name} was stopped; run it again to resume")
    return result


def _get_folder(run: RunChoice) -> str:
    return run if isinstance(run, str) else run.folder


def _encode_image(image: object) -> bytes:
    """Return an image as the bytes of a JPEG or PNG file. Raises ConfigError."""
    from orchestrator.cli import predict as command  # torch takes seconds to import; it is by now

    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        content = command.read_image(os.fspath(image))
        if isinstance(content, Exception):
            raise ConfigError(f"images: {image}: {content}")
        return content
    return command.encode_pixels(image)
