"""The command lines of the ensemble's jobs; importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.ensemble import members
from orchestrator.ensemble.members import EnsembleConfig
from orchestrator.fleet.config import PlanConfig
from orchestrator.launch.config import EMBEDDED, Destination, JobConfig, Placement

RAW_IMAGES = 5000


class Reporting(Config):
    """What is scored and told of an ensemble."""

    raw: bool | None = Field(
        None,
        description="score each member's raw weights, too, to compare them with their average; by default where the "
        f"split has at most {RAW_IMAGES:,} images, since it doubles the cost",
    )
    registered: bool = Field(True, description="register a whole ensemble as a model in MLflow, to be served")
    allow_partial: bool = Field(
        False, description="exit with 0 although members failed; the result is called partial all the same"
    )


class TrainEnsemble(JobConfig):
    """What the command line of train_ensemble.py sets."""

    ensemble: EnsembleConfig = Field(EnsembleConfig(), description="how the members come from the recipe")
    plan: PlanConfig = Field(PlanConfig(), description="what the plan goes by")
    include: tuple[str, ...] = Field(
        (),
        description="finished runs, or ensembles for all their members, to take in as further members: names, or "
        "absolute paths or URLs of folders",
    )
    reporting: Annotated[Reporting, tyro.conf.arg(name="")] = Reporting()

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
        (), description="finished runs, or ensembles for all their members: names, or absolute paths or URLs of folders"
    )
    members: tuple[int, ...] = Field(
        (), description="numbers of the models to take, from 1, in the order given by `runs`; all by default"
    )
    kind: Annotated[Literal["averaged", "raw", "best"], tyro.conf.arg(name="weights")] = Field(
        "averaged",
        description="weights to score: those of the last step averaged over training, raw, or those of the epoch that "
        "validated best (chosen on the split that is scored)",
    )
    reporting: Annotated[Reporting, tyro.conf.arg(name="")] = Reporting(registered=False)
    destination: Annotated[Destination, tyro.conf.arg(name="")] = Destination()
    placement: Placement = Placement()
    dry_run: bool = Field(False, description="print the runs that would be scored and stop")

    @property
    def places(self) -> Destination:
        """The destination as far as it is known before the runs are looked at, which name their own dataset."""
        return self.destination.model_copy(update={"data": self.destination.data or EMBEDDED})
