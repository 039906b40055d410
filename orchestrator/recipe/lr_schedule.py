"""Learning-rate schedules as pure functions of the samples seen; epochs are a unit of the configuration only.

Nothing about a schedule is saved but the progress, so a resumed run cannot drift; neither the number of workers nor
the batch size moves it.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import KindDiscriminator, Plugin, format_failure, load_plugin

_KINDS = "step | exponential | polynomial | cosine | package.module:attribute"


class _WarmupSchedule(Config):
    base_rate: float = Field(0.01, gt=0, le=100, description="learning rate at the start, after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the rate grows linearly from 0")


class _FinalRateSchedule(_WarmupSchedule):
    final_rate: float = Field(0.0, ge=0, description="learning rate at the end of training; the paper's kind ends at 0")

    @model_validator(mode="after")
    def _check_final_rate(self) -> Self:
        if self.final_rate > self.base_rate:
            raise ValueError(f"final_rate must be at most base_rate ({self.base_rate:g}), got {self.final_rate:g}")
        return self


class StepDecay(_WarmupSchedule):
    """A fall by a factor every so many epochs: 4% every 8 epochs (arXiv 1409.4842, section 6)."""

    kind: Literal["step"] = Field("step", description=_KINDS)
    decay_factor: float = Field(0.96, gt=0, le=1, description="factor of each step (section 6: a fall by 4%)")
    decay_epochs: float = Field(8.0, gt=0, description="epochs between steps (section 6)")


class ExponentialDecay(_WarmupSchedule):
    """The same fall, continuously."""

    kind: Literal["exponential"] = Field("exponential", description=_KINDS)
    decay_factor: float = Field(0.96, gt=0, le=1, description="factor over decay_epochs")
    decay_epochs: float = Field(8.0, gt=0, description="epochs in which the rate falls by decay_factor")


class PolynomialDecay(_FinalRateSchedule):
    """base * (1 - done / total) ** power, the Caffe replication's quick variant (power 0.5, 60 epochs)."""

    kind: Literal["polynomial"] = Field("polynomial", description=_KINDS)
    power: float = Field(0.5, gt=0, le=10, description="exponent; 0.5 falls late, 1 is linear")


class CosineDecay(_FinalRateSchedule):
    """Half a cosine from the base rate to the final one (arXiv 1608.03983, without restarts)."""

    kind: Literal["cosine"] = Field("cosine", description=_KINDS)


class SchedulePlugin(Plugin, _WarmupSchedule):
    """A function of the user's, called as function(share, **args): the rate as a multiple of base_rate.

    `share` is the share of training that is done, 0 at the start and 1 at the end.
    """

    what: ClassVar[str] = "lr_schedule"


AnySchedule = StepDecay | ExponentialDecay | PolynomialDecay | CosineDecay | SchedulePlugin
Schedule = Annotated[AnySchedule, KindDiscriminator()]


def compute_lr(schedule: AnySchedule, samples: float, samples_per_epoch: float, epochs: int) -> float:
    """Return the rate after `samples` of a training of `epochs` epochs. Raises ConfigError for a bad plug-in."""
    base, epochs_done = schedule.base_rate, samples / samples_per_epoch
    share = min(1.0, epochs_done / epochs)
    match schedule:
        case StepDecay():
            rate = base * schedule.decay_factor ** math.floor(epochs_done / schedule.decay_epochs)
        case ExponentialDecay():
            rate = float(base * schedule.decay_factor ** (epochs_done / schedule.decay_epochs))
        case PolynomialDecay():
            rate = float(schedule.final_rate + (base - schedule.final_rate) * (1.0 - share) ** schedule.power)
        case CosineDecay():
            rate = schedule.final_rate + (base - schedule.final_rate) * 0.5 * (1.0 + math.cos(math.pi * share))
        case SchedulePlugin():
            rate = base * _compute_plugin_factor(schedule, share)
    return rate * (min(1.0, epochs_done / schedule.warmup_epochs) if schedule.warmup_epochs > 0 else 1.0)


def _compute_plugin_factor(schedule: SchedulePlugin, share: float) -> float:
    label = f"lr_schedule {schedule.kind!r}"
    function = load_plugin(schedule.what, schedule.kind)
    try:
        factor = function(share, **schedule.args)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{label} failed for share {share:g} and its args{format_failure(error)}") from error
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 0:
        raise ConfigError(f"{label} must return a finite number of at least 0, got {factor!r} for share {share:g}")
    return float(factor)
