"""What a task of scoring is given. Importable without torch, so that who only sends tasks is quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.data.config import ReadingConfig

# Final weights hold both: averaged ones, used at inference (arXiv 1409.4842, section 6), and those of the last step.
WeightsVariant = Literal["averaged", "raw"]


# Networks that a task, and so a process, has in memory at once.
MAX_MODELS_PER_TASK = 16


class ScoringTarget(Config):
    """One model to score: its weights, and where its scores go."""

    name: str = Field(description="what messages call it")
    weights: str = Field(description="URL of the folder of its final weights")
    which: WeightsVariant = "averaged"
    digest: str = Field(description="of the final weights; others at that URL are refused")
    scores: str = Field(description="URL of the folder of its scores")


class ShardScoringTask(Config):
    """One task: score these models, all of one image size, on one shard."""

    data: str
    allow_elsewhere: bool = Field(False, description="read tars outside the dataset's folder")
    split: str
    shard: int = Field(ge=0)
    scorers: tuple[ScoringTarget, ...] = Field(min_length=1, max_length=MAX_MODELS_PER_TASK)
    threads: int = Field(ge=1, description="CPU threads of the networks")
    reading: ReadingConfig = ReadingConfig()


class ShardScoringResult(Config):
    """What came of a task."""

    images: int
    bad: tuple[str, ...] = Field((), description="key and reason of each image that no decoder takes")


def score_shard(raw: dict[str, Any]) -> dict[str, Any]:
    """Score and commit a ScoreShard; the Scored. Runs on any node, again after any death; only there is torch needed.

    Raises what evaluation.predict.score_shard raises.
    """
    from orchestrator.evaluation import shard_scorer  # torch is imported in the process of the task alone

    return shard_scorer.score_shard(raw)


# 10 crops are within a point of 144 at a fourteenth of the cost (arXiv 1409.4842, table 3: 7.62 and 6.67 % error).
DEFAULT_CROPS: Literal[1, 10, 144] = 10
DEFAULT_TOP_K = 5
