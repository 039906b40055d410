"""The command lines of the ensemble's commands; importable without torch or ray."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.flags import Flag
from orchestrator.ensemble import members
from orchestrator.ensemble.members import EnsembleConfig
from orchestrator.evaluation.scoring_task import DEFAULT_CROPS, DEFAULT_TOP_K
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, RUNS_VARIABLE, Destination, JobConfig, Placement
from orchestrator.scheduler.config import PlanConfig


class ReportingConfig(Config):
    """The choice of what is reported of an ensemble."""

    registered: bool = Field(True, description="register a complete ensemble as a model in MLflow, for serving")
    allow_partial: bool = Field(
        False, description="exit with 0 although members failed; the result is still called partial"
    )


class TrainEnsembleConfig(JobConfig):
    """The command line of the train-ensemble command."""

    ensemble: EnsembleConfig = Field(EnsembleConfig(), description="how the members come from the recipe")
    plan: PlanConfig = Field(PlanConfig(), description="assumptions of the plan")
    include: tuple[str, ...] = Field(
        (),
        description="finished runs, or ensembles for all their members, to add as further members: names, or absolute "
        "paths or URLs of folders",
    )
    reporting: Annotated[ReportingConfig, Flag(name="")] = ReportingConfig()

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        members.build_recipes(self.recipe, self.ensemble)
        if self.placement.min_workers is not None:
            raise ValueError(
                f"placement.min_workers must not be set for an ensemble, got {self.placement.min_workers}: only a run "
                "alone on its cluster can change its number of workers; leave it out, or train each model alone"
            )
        return self


class EvaluateConfig(Config):
    """The command line of the evaluate command."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="finished runs, or ensembles for all their members: names, or absolute paths or URLs of folders"
    )
    members: tuple[int, ...] = Field(
        (), description="numbers of the models to score, from 1, in the order of `runs`; by default all"
    )
    kind: Annotated[Literal["averaged", "raw", "best"], Flag(name="weights")] = Field(
        "averaged",
        description="weights to score: the average over training, the raw ones of the last step, or those of the epoch "
        "that validated best (chosen on the split that is scored)",
    )
    reporting: Annotated[ReportingConfig, Flag(name="")] = ReportingConfig(registered=False)
    destination: Annotated[Destination, Flag(name="")] = Destination()
    placement: Placement = Placement()
    dry_run: bool = Field(False, description="print the runs that would be scored and stop")

    @property
    def provisional_destination(self) -> Destination:
        """The destination before the runs, which name their dataset, are read."""
        return self.destination.model_copy(update={"data": self.destination.data or EMBEDDED_DATASET})


class ModelChoice(Config):
    """The models to use, and where they are."""

    model: str = Field(
        "",
        description="name of an ensemble or run, URL of its folder, or models:/NAME@ALIAS of MLflow's registry; by "
        "default the registered champion",
    )
    members: tuple[int, ...] = Field(
        (), description="numbers of the ensemble's models to use, from 1, such as 1,3; by default all"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    tracking: str = Field(
        "", description="MLflow tracking URI of the registry; by default a sqlite database in the storage folder"
    )


class PredictConfig(Config):
    """The command line of the predict command."""

    images: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="JPEG or PNG files, folders of them, or their URLs (s3://, https://, ...)"
    )
    chosen: Annotated[ModelChoice, Flag(name="")] = ModelChoice()
    crops: Literal[1, 10, 144] = Field(
        DEFAULT_CROPS, description="crops of each image; more crops cost more and are slightly more accurate"
    )
    top: int = Field(DEFAULT_TOP_K, ge=1, description="classes reported of each image")
    json_lines: Annotated[bool, Flag(name="json")] = Field(
        False, description="print a line of JSON for each image instead of a table"
    )


class ServeConfig(Config):
    """The command line of the serve command."""

    chosen: Annotated[ModelChoice, Flag(name="")] = ModelChoice()
    crops: Literal[1, 10, 144] = Field(DEFAULT_CROPS, description="crops of each image, unless a request sets them")
    top: int = Field(DEFAULT_TOP_K, ge=1, description="classes reported of each image, unless a request sets it")
    host: str = Field("127.0.0.1", description="address to listen on; there is no login, so keep it on this machine")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 picks a free one and prints it")
