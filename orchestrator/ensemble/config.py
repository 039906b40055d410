"""The command lines of the ensemble's jobs; importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Self

import tyro
from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.ensemble import members
from orchestrator.ensemble.members import EnsembleConfig
from orchestrator.launch.config import EMBEDDED, Destination, JobConfig, Placement


class TrainEnsemble(JobConfig):
    """What the command line of train_ensemble.py sets."""

    ensemble: EnsembleConfig = Field(EnsembleConfig(), description="how the members come from the recipe")

    @model_validator(mode="after")
    def _members_possible(self) -> Self:
        members.recipes(self.recipe, self.ensemble)
        if self.placement.min_workers is not None:
            raise ValueError(
                f"placement.min_workers {self.placement.min_workers} is refused: only a run alone on its cluster can "
                "have a number of workers that changes; leave it out, or train the models one by one with train.py"
            )
        return self


class Evaluate(Config):
    """What the command line of evaluate.py sets."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = Field(
        (), description="names of finished runs, or of ensembles for all their members"
    )
    destination: Annotated[Destination, tyro.conf.arg(name="")] = Destination(data=EMBEDDED)
    placement: Placement = Placement()
    dry_run: bool = Field(False, description="print the runs that would be scored and stop")
