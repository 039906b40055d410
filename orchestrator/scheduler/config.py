"""Options of the plan of many runs. They change no result. Importable without torch or Ray."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.ray_backend.run_spec import JobConfig


class PlanConfig(Config):
    """Speeds, prices and the cluster that a plan assumes."""

    images_per_second: float | None = Field(
        None,
        gt=0,
        description="training speed of the first model with its --placement.workers; the others are scaled by their "
        "multiply-adds; by default measured from epochs in the storage",
    )
    start_seconds: float = Field(
        15.0, ge=0, description="seconds from a model's launch to its first step, also after a restart"
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="price of an hour of a GPU, or of a CPU when a model uses no GPU"
    )
    nodes: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="nodes of the cluster that --dry-run plans for; by default the cluster that is connected",
    )
    cpus_per_node: float | None = Field(None, gt=0, description="CPUs of each of these nodes; only with nodes")
    gpus_per_node: float = Field(0.0, ge=0, description="GPUs of each of these nodes; only with nodes")

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        if self.nodes is not None and self.cpus_per_node is None:
            raise ValueError(f"nodes must come with cpus_per_node, got nodes {self.nodes}; set the CPUs of each node")
        if self.nodes is None and (self.cpus_per_node is not None or self.gpus_per_node):
            raise ValueError("cpus_per_node and gpus_per_node must come with nodes; set the number of nodes")
        return self


class TrainModel(JobConfig):
    """Command line of the job that trains one model."""

    plan: PlanConfig = PlanConfig()
