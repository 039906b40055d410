"""Task of scoring one shard. Importable without torch, so that a process that only sends tasks starts quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.data.config import ReadingConfig

# Final weights hold both: averaged ones, used for inference (arXiv 1409.4842, section 6), and those of the last step.
WeightsVariant = Literal["averaged", "raw"]

MAX_MODELS_PER_TASK = 16  # models that a task, and so a process, has in memory
# 10 crops are within a point of 144 at a fourteenth of the cost (arXiv 1409.4842, table 3: 7.62 and 6.67 % error).
DEFAULT_CROPS: Literal[1, 10, 144] = 10
DEFAULT_TOP_K = 5


class ScoringTarget(Config):
    """A model to score: its weights, and the destination of its scores."""

    name: str = Field(description="name of the model in messages")
    weights: str = Field(description="URL of the folder of its final weights")
    which: WeightsVariant = "averaged"
    digest: str = Field(description="expected digest of the final weights")
    scores: str = Field(description="URL of the folder of its scores")


class ShardScoringTask(Config):
    """Models of one image size to score on one shard."""

    data: str
    allow_elsewhere: bool = Field(False, description="read tars outside the dataset's folder")
    split: str
    shard: int = Field(ge=0)
    scorers: tuple[ScoringTarget, ...] = Field(min_length=1, max_length=MAX_MODELS_PER_TASK)
    threads: int = Field(ge=1, description="CPU threads of the networks")
    reading: ReadingConfig = ReadingConfig()
