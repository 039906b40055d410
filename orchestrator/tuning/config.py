"""The command line of the tune command; importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.ray_backend.run_spec import JobConfig
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.trial import Metric

# GoogLeNet without batch norm stays at the level of chance for about 4 epochs of the digits: pruning there would judge
# noise (docs/benchmarks.md). On larger datasets fewer epochs are as many updates.
CHANCE_LEVEL_EPOCHS = 6

_BUILT_IN_METRICS = ("top1_error", "top5_error", "loss")

SamplerKind = Literal["tpe", "random", "grid"]
SchedulerKind = Literal["asha", "median", "none"]


class SearchConfig(Config):
    """The search of a sweep. Other values are another sweep."""

    space: str = Field("schedules", description="search space: its name, or the path or URL of a .json or .toml file")
    sampler: SamplerKind = Field(
        "tpe", description="how trials are chosen: tpe (Optuna's; learns from earlier trials) | random | grid"
    )
    scheduler: SchedulerKind = Field(
        "asha",
        description="which trials are pruned: asha (successive halving) | median (worse than the median) | none",
    )
    metric: str = Field(
        "top1_error",
        min_length=1,
        description="validation metric that trials are compared by: top1_error, top5_error, or any other that "
        "validation reports, such as loss or a plug-in's (then set mode, too)",
    )
    mode: Literal["min", "max"] | None = Field(
        None, description="whether the metric is better when lower (min) or higher (max); min for the errors"
    )
    seed: int = Field(0, ge=0, description="seed of the choice of trials; those of training are the recipe's")
    grace_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs that every trial trains before it may be pruned; by default a ninth of the recipe's, of "
        "GoogLeNet without batch norm at least 6, or a quarter",
    )
    reduction: float = Field(3.0, gt=1, le=100, description="asha: one in so many trials continues from each rung")

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        is_error = Metric(name=self.metric).is_error
        if not is_error and self.mode is None:
            raise ValueError(
                f"mode must be min or max for metric {self.metric!r}, got none; set --mode min if lower is better"
            )
        if is_error and self.mode == "max":
            raise ValueError(f"mode must be min for metric {self.metric!r}, got max; leave it out")
        return self

    def get_grace_epochs(self, recipe: Recipe) -> int:
        """Return the epochs that every trial of the recipe trains before it may be pruned."""
        grace = max(1, round(recipe.epochs / 9))
        if isinstance(recipe.model, GoogLeNetConfig) and not recipe.model.batch_norm:
            grace = max(grace, min(round(recipe.epochs / 4), CHANCE_LEVEL_EPOCHS))
        return self.grace_epochs or grace


class BudgetConfig(Config):
    """The limits of a sweep; a larger budget resumes the same sweep."""

    trials: int = Field(16, ge=1, le=100_000, description="most trials, also of a larger grid")
    epochs: float | None = Field(None, gt=0, description="most epochs of all trials together; by default no limit")
    hours: float | None = Field(None, gt=0, description="longest time that this command may train; by default no limit")


class TuneJob(JobConfig):
    """The command line of the tune command."""

    search: Annotated[SearchConfig, Flag(name="")] = SearchConfig()
    budget: BudgetConfig = BudgetConfig()
    repeats: int = Field(
        0,
        ge=0,
        le=100,
        description="train winner and preset so many times with other seeds, to compare the gain with seed noise",
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        epochs, grace, validate_epochs = self.recipe.epochs, self.search.grace_epochs, self.cadence.validate_epochs
        if grace is not None and grace > epochs:
            raise ValueError(f"grace_epochs must be at most epochs ({epochs}), got {grace}; set a lower one")
        first_rung = self.search.get_grace_epochs(self.recipe)
        if validate_epochs > first_rung and self.search.scheduler != "none":
            raise ValueError(
                f"cadence.validate_epochs must be at most {first_rung}, the epochs after which a trial may be pruned, "
                f"got {validate_epochs}; set a lower one, or a higher grace_epochs"
            )
        metric = self.search.metric.removeprefix("averaged_").removeprefix("raw_")
        if "/" not in metric and metric not in _BUILT_IN_METRICS and not self.placement.execution.metrics:
            raise ValueError(
                f"metric must be one of {', '.join(_BUILT_IN_METRICS)} without further metrics, got "
                f"{self.search.metric!r}; set another one, or placement.execution.metrics"
            )
        if self.placement.min_workers is not None:
            raise ValueError(
                f"placement.min_workers must not be set in a sweep, got {self.placement.min_workers}: trials share the "
                "cluster and have a fixed number of workers; leave it out"
            )
        return self
