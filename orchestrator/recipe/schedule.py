"""Learning-rate schedules as pure functions of the training done so far, in epochs (samples / samples per epoch).

Nothing about a schedule is saved but the progress, so a resumed run cannot drift.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.base import Config


class _Warmed(Config):
    base_rate: float = Field(0.01, gt=0, le=100, description="learning rate at the start, after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the rate grows linearly from 0")


class StepDecay(_Warmed):
    """Falls by a factor every so many epochs: 4% every 8 epochs (arXiv 1409.4842, section 6)."""

    kind: Literal["step"] = Field("step", description="step | exponential | polynomial | cosine")
    decay_factor: float = Field(0.96, gt=0, le=1, description="factor of each step (section 6: a fall by 4%)")
    decay_epochs: float = Field(8.0, gt=0, description="epochs between steps (section 6)")


class ExponentialDecay(_Warmed):
    """The same fall, continuously."""

    kind: Literal["exponential"] = Field("exponential", description="step | exponential | polynomial | cosine")
    decay_factor: float = Field(0.96, gt=0, le=1, description="factor over decay_epochs")
    decay_epochs: float = Field(8.0, gt=0, description="epochs in which the rate falls by decay_factor")


class PolynomialDecay(_Warmed):
    """base * (1 - done / total) ** power, the Caffe replication's quick variant (power 0.5, 60 epochs)."""

    kind: Literal["polynomial"] = Field("polynomial", description="step | exponential | polynomial | cosine")
    power: float = Field(0.5, gt=0, le=10, description="exponent; 0.5 falls late, 1 is linear")


class CosineDecay(_Warmed):
    """Half a cosine from the base rate to 0 (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = Field("cosine", description="step | exponential | polynomial | cosine")


Schedule = Annotated[StepDecay | ExponentialDecay | PolynomialDecay | CosineDecay, Field(discriminator="kind")]


def rate_at(
    schedule: StepDecay | ExponentialDecay | PolynomialDecay | CosineDecay, epochs_done: float, epochs: int
) -> float:
    """The learning rate after `epochs_done` (whole and part) of `epochs` epochs."""
    share = min(1.0, epochs_done / epochs)
    match schedule:
        case StepDecay():
            factor = schedule.decay_factor ** math.floor(epochs_done / schedule.decay_epochs)
        case ExponentialDecay():
            factor = schedule.decay_factor ** (epochs_done / schedule.decay_epochs)
        case PolynomialDecay():
            factor = (1.0 - share) ** schedule.power
        case CosineDecay():
            factor = 0.5 * (1.0 + math.cos(math.pi * share))
    warm = min(1.0, epochs_done / schedule.warmup_epochs) if schedule.warmup_epochs > 0 else 1.0
    return schedule.base_rate * warm * factor
