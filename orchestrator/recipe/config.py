"""Recipe: everything that changes the result of a training run, and nothing else. Importable without torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.data.config import AugmentationConfig, OrderConfig, PreprocessingConfig
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.recipe.schedule import Schedule, StepDecay

# Bumped when the meaning of a recipe changes, so that old runs are not taken for new ones.
RECIPE_VERSION = 1


class OptimizerConfig(Config):
    """SGD with momentum (arXiv 1409.4842, section 6: 0.9)."""

    momentum: float = Field(0.9, ge=0, lt=1, description="section 6: 0.9")
    weight_decay: float = Field(2e-4, ge=0, lt=1, description="the Caffe replication's 0.0002; not on biases")


class LossConfig(Config):
    """Softmax cross-entropy of the classifier and of the auxiliary heads."""

    auxiliary_weight: float = Field(0.3, ge=0, le=10, description="weight of each auxiliary loss (section 5: 0.3)")


class AveragingConfig(Config):
    """Polyak averaging: the weights used at inference (section 6) are a mean over the last part of training."""

    start: float = Field(
        0.6, ge=0, lt=1, description="share of training after which weights are averaged, each step equally"
    )


class Seeds(Config):
    """Separate seeds; members of an ensemble share `weights` and differ in the others (section 7)."""

    weights: int = Field(0, ge=0, description="initial weights")
    order: int = Field(0, ge=0, description="order in which the images are seen")
    augmentation: int = Field(0, ge=0, description="crops, interpolation and mirroring")
    dropout: int = Field(0, ge=0, description="dropout masks")


class Recipe(Config):
    """One training run as the paper describes it: sections 5 (network), 6 (training)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="begins the names of its runs")
    version: int = Field(RECIPE_VERSION, ge=RECIPE_VERSION, le=RECIPE_VERSION, description="of the recipe's meaning")
    epochs: int = Field(250, ge=1, le=100_000, description="passes over the training split (Caffe replication: 250)")
    batch_size: int = Field(32, ge=1, le=1_000_000, description="images of a global batch, over all workers together")
    model: GoogLeNetConfig = GoogLeNetConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    order: OrderConfig = OrderConfig()
    schedule: Schedule = StepDecay()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    averaging: AveragingConfig = AveragingConfig()
    seeds: Seeds = Seeds()
    max_bad_share: float = Field(
        0.001, ge=0, le=1, description="share of an epoch's images that may be unreadable; 10 are always allowed"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the network's arithmetic; weights, loss and average stay float32"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schedule.warmup_epochs > self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs} is refused: longer than epochs ({self.epochs})"
            )
        return self
