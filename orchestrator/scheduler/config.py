"""What the user says about the plan of many runs; importable without torch or ray. None of it changes a result."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.ray_backend.run_spec import JobConfig


class PlanConfig(Config):
    """What a plan goes by: what is known of speed, prices and the cluster, and whether models may get more workers."""

    images_per_second: float | None = Field(
        None,
        gt=0,
        description="what the first model trains with its --placement.workers; others follow by their arithmetic; by "
        "default what epochs in the storage have shown",
    )
    start_seconds: float = Field(
        15.0, ge=0, description="from a model's launch to its first step, as the plan counts it; also of a restart"
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="money for an hour of a GPU, or of a CPU where a model uses no GPU"
    )
    most_workers: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="let the plan give a model up to so many workers where all models are then done sooner; a model "
        "under way is stopped and goes on with more when slots stay empty; off by default",
    )
    serial_share: float = Field(
        0.05, ge=0, lt=1, description="share of a step that more workers make no shorter (Amdahl's law)"
    )
    nodes: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="nodes of the cluster that --dry-run plans for; by default the one at hand",
    )
    cpus_per_node: float | None = Field(None, gt=0, description="CPUs of each of them; only with nodes")
    gpus_per_node: float = Field(0.0, ge=0, description="GPUs of each of them; only with nodes")

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        if self.nodes is not None and self.cpus_per_node is None:
            raise ValueError(f"nodes {self.nodes} is refused without cpus_per_node: say how many CPUs each has")
        if self.nodes is None and (self.cpus_per_node is not None or self.gpus_per_node):
            raise ValueError("cpus_per_node and gpus_per_node are refused without nodes: say how many there are")
        return self


class TrainModel(JobConfig):
    """What the command line of train.py sets."""

    plan: PlanConfig = PlanConfig()
