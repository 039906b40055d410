"""The command lines of the ensemble's jobs; importable without torch or ray."""

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

MAX_IMAGES_FOR_RAW = 5000


class ReportingConfig(Config):
    """What is scored and told of an ensemble."""

    raw: bool | None = Field(
        None,
        description="score each member's raw weights, too, to compare them with their average; by default where the "
        f"split has at most {MAX_IMAGES_FOR_RAW:,} images, since it doubles the cost",
    )
    registered: bool = Field(True, description="register a whole ensemble as a model in MLflow, to be served")
    allow_partial: bool = Field(
        False, description="exit with 0 although members failed; the result is called partial all the same"
    )


class TrainEnsembleConfig(JobConfig):
    """What the command line of train_ensemble.py sets."""

    ensemble: EnsembleConfig = Field(EnsembleConfig(), description="how the members come from the recipe")
    plan: PlanConfig = Field(PlanConfig(), description="what the plan goes by")
    include: tuple[str, ...] = Field(
        (),
        description="finished runs, or ensembles for all their members, to take in as further members: names, or "
        "absolute paths or URLs of folders",
    )
    reporting: Annotated[ReportingConfig, Flag(name="")] = ReportingConfig()

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        members.build_recipes(self.recipe, self.ensemble)
        if self.placement.min_workers is not None:
            raise ValueError(
                f"placement.min_workers {self.placement.min_workers} is refused: only a run alone on its cluster can "
                "have a number of workers that changes; leave it out, or train the models one by one with train.py"
            )
        return self


class EvaluateConfig(Config):
    """What the command line of evaluate.py sets."""

    runs: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="finished runs, or ensembles for all their members: names, or absolute paths or URLs of folders"
    )
    members: tuple[int, ...] = Field(
        (), description="numbers of the models to take, from 1, in the order given by `runs`; all by default"
    )
    kind: Annotated[Literal["averaged", "raw", "best"], Flag(name="weights")] = Field(
        "averaged",
        description="weights to score: those of the last step averaged over training, raw, or those of the epoch that "
        "validated best (chosen on the split that is scored)",
    )
    reporting: Annotated[ReportingConfig, Flag(name="")] = ReportingConfig(registered=False)
    destination: Annotated[Destination, Flag(name="")] = Destination()
    placement: Placement = Placement()
    dry_run: bool = Field(False, description="print the runs that would be scored and stop")

    @property
    def provisional_destination(self) -> Destination:
        """The destination as far as it is known before the runs are looked at, which name their own dataset."""
        return self.destination.model_copy(update={"data": self.destination.data or EMBEDDED_DATASET})


class ModelChoice(Config):
    """Which models, and where they are."""

    model: str = Field(
        "",
        description="name of an ensemble or run, URL of its folder, or models:/NAME@ALIAS of MLflow's registry; by "
        "default the registered champion, or where none is registered the newest ensemble that was trained whole",
    )
    members: tuple[int, ...] = Field(
        (), description="numbers of the ensemble's models to use, from 1, such as 1,3; all by default"
    )
    storage: str = Field("", description=f"folder URL of runs; by default ${RUNS_VARIABLE}, else ~/orchestrator-runs")
    tracking: str = Field(
        "", description="MLflow tracking URI of the registry; by default a sqlite database in the storage folder"
    )


class PredictConfig(Config):
    """What the command line of predict.py sets."""

    images: Annotated[tuple[str, ...], Flag(positional=True)] = Field(
        (), description="JPEG or PNG files, folders of them, or their URLs (s3://, https://, ...)"
    )
    chosen: Annotated[ModelChoice, Flag(name="")] = ModelChoice()
    crops: Literal[1, 10, 144] = Field(
        DEFAULT_CROPS, description="crops of each image: dearer ones are a little better"
    )
    top: int = Field(DEFAULT_TOP_K, ge=1, description="classes told of each image")
    json_lines: Annotated[bool, Flag(name="json")] = Field(
        False, description="print a line of JSON for each image instead of a table"
    )


class ServeConfig(Config):
    """What the command line of serve.py sets."""

    chosen: Annotated[ModelChoice, Flag(name="")] = ModelChoice()
    crops: Literal[1, 10, 144] = Field(DEFAULT_CROPS, description="crops of each image, where a request does not say")
    top: int = Field(DEFAULT_TOP_K, ge=1, description="classes told of each image, where a request does not say")
    host: str = Field("127.0.0.1", description="address to listen on; there is no login: keep it on this machine")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one, and says which")
