"""The command line of tune.py; importable without torch or ray."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.ray_backend.run_spec import JobConfig
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.trial import MetricName

# GoogLeNet without batch norm stands at the level of chance for about 4 epochs of the digits: whoever judges it there
# judges noise (docs/benchmarks.md). Of larger datasets fewer epochs are as many updates.
CHANCE_LEVEL_EPOCHS = 6

SamplerKind = Literal["tpe", "random", "grid"]
SchedulerKind = Literal["asha", "median", "none"]


class SearchConfig(Config):
    """What is searched and how. Another one is another sweep."""

    space: str = Field(
        "schedules", description="what is searched: the name of a space, or path or URL of a .json or .toml file"
    )
    sampler: SamplerKind = Field(
        "tpe", description="how trials are chosen: tpe (Optuna; learns from those before) | random | grid"
    )
    scheduler: SchedulerKind = Field(
        "asha",
        description="which trials are ended early: asha (successive halving) | median (worse than the median) | none",
    )
    metric: MetricName = Field("top1_error", description="validation error that trials are compared by")
    seed: int = Field(0, ge=0, description="of the choice of trials; those of training are the recipe's")
    grace_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs that no trial is ended before; by default a ninth of the recipe's, of GoogLeNet without "
        "batch norm at least 6, or a quarter",
    )
    reduction: float = Field(3.0, gt=1, le=100, description="asha: one in so many trials goes on from each rung")

    def get_grace_epochs(self, recipe: Recipe) -> int:
        """Epochs that no trial of the recipe is ended before."""
        ninth, quarter = max(1, round(recipe.epochs / 9)), max(1, round(recipe.epochs / 4))
        at_chance = isinstance(recipe.model, GoogLeNetConfig) and not recipe.model.batch_norm
        return self.grace_epochs or (max(ninth, min(quarter, CHANCE_LEVEL_EPOCHS)) if at_chance else ninth)


class BudgetConfig(Config):
    """How much may be tried; more of it goes on with the same sweep."""

    trials: int = Field(16, ge=1, le=100_000, description="most trials, also of a larger grid")
    epochs: float | None = Field(None, gt=0, description="most epochs of all trials together; by default no limit")
    hours: float | None = Field(None, gt=0, description="longest time that this command may train; by default no limit")


class TuneJob(JobConfig):
    """What the command line of tune.py sets."""

    search: Annotated[SearchConfig, Flag(name="")] = SearchConfig()
    budget: BudgetConfig = BudgetConfig()
    repeats: int = Field(
        0,
        ge=0,
        le=100,
        description="train winner and preset so many times with other seeds, to tell a gain from the noise of seeds",
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        epochs = self.recipe.epochs
        grace = self.search.grace_epochs
        if grace is not None and grace > epochs:
            raise ValueError(f"grace_epochs must be at most epochs ({epochs}), got {grace}; lower it")
        if self.cadence.validate_epochs > self.search.get_grace_epochs(self.recipe) and self.search.scheduler != "none":
            raise ValueError(
                f"cadence.validate_epochs {self.cadence.validate_epochs} is refused: a trial may be ended after "
                f"{self.search.get_grace_epochs(self.recipe)} epochs, when it would not have been "
                "validated yet; lower it, or "
                "raise grace_epochs"
            )
        if self.placement.min_workers is not None:
            raise ValueError(
                f"placement.min_workers {self.placement.min_workers} is refused: trials share the cluster, and have a "
                "fixed number of workers; leave it out"
            )
        return self

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs at which asha ends trials."""
        epochs, rung = self.recipe.epochs, float(self.search.get_grace_epochs(self.recipe))
        found = []
        while rung < epochs:
            found.append(math.ceil(rung))
            rung *= self.search.reduction
        return tuple(found)
