"""Learning-rate schedules as pure functions of the samples seen; epochs are a unit of the configuration only.

Nothing about a schedule is saved but the progress, so a resumed run cannot drift; neither the number of workers nor
the batch size moves it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import KindDiscriminator, Plugin, format_failure, load_plugin

_KINDS = "step | exponential | polynomial | cosine | segments | package.module:attribute"


class _WarmupSchedule(Config):
    base_rate: float = Field(0.01, gt=0, le=100, description="learning rate at the start, after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs over which the rate grows linearly from 0")


class _FinalRateSchedule(_WarmupSchedule):
    final_rate: float = Field(0.0, ge=0, description="learning rate at the end of training; the paper's kind ends at 0")

    @model_validator(mode="after")
    def _check_final_rate(self) -> Self:
        if self.final_rate > self.base_rate:
            raise ValueError(f"final_rate {self.final_rate:g} is refused: above base_rate ({self.base_rate:g})")
        return self


class StepDecay(_WarmupSchedule):
    """Falls by a factor every so many epochs: 4% every 8 epochs (arXiv 1409.4842, section 6)."""

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
    """A function of the user's from the share of training that is done, 0 to 1, to a multiple of base_rate.

    It is called as function(share, **args) before every step.
    """

    what: ClassVar[str] = "lr_schedule"


PlainSchedule = StepDecay | ExponentialDecay | PolynomialDecay | CosineDecay | SchedulePlugin


class Segment(Config):
    """From here on another schedule is followed, as if it had been from the start: its clock is the training's."""

    from_epoch: float = Field(0.0, ge=0, description="epochs done when it begins")
    schedule: Annotated[PlainSchedule, KindDiscriminator()]


class Segments(Config):
    """One schedule after another: what population based training found, as a recipe to be trained from scratch."""

    kind: Literal["segments"] = Field("segments", description=_KINDS)
    segments: tuple[Segment, ...] = Field(
        min_length=1,
        description="from_epoch and schedule of each, as JSON; the first from epoch 0; easier said in a file",
    )

    @model_validator(mode="after")
    def _check_segment_order(self) -> Self:
        starts = [one.from_epoch for one in self.segments]
        if starts[0] != 0:
            raise ValueError(f"segments.0.from_epoch {starts[0]:g} is refused: the first segment begins at 0")
        for number, (before, start) in enumerate(pairwise(starts), 1):
            if start <= before:
                raise ValueError(
                    f"segments.{number}.from_epoch {start:g} is refused: the segment before begins at {before:g}; give "
                    "a later one"
                )
        return self


AnySchedule = PlainSchedule | Segments
Schedule = Annotated[AnySchedule, KindDiscriminator()]


def to_segments(schedule: AnySchedule) -> tuple[Segment, ...]:
    """The schedule as segments, ascending; a plain one is a single segment."""
    return schedule.segments if isinstance(schedule, Segments) else (Segment(schedule=schedule),)


def get_schedule_at(schedule: AnySchedule, done: float) -> PlainSchedule:
    """The plain schedule that says the rate after `done` epochs."""
    if not isinstance(schedule, Segments):
        return schedule
    return next(one.schedule for one in reversed(schedule.segments) if one.from_epoch <= done)


def compute_lr(schedule: AnySchedule, samples: float, samples_per_epoch: float, epochs: int) -> float:
    """The learning rate after `samples` of a training of `epochs` epochs."""
    done = samples / samples_per_epoch
    plain = get_schedule_at(schedule, done)
    warm = min(1.0, done / plain.warmup_epochs) if plain.warmup_epochs > 0 else 1.0
    return warm * _compute_decayed_lr(plain, done, min(1.0, done / epochs))


def _compute_decayed_lr(schedule: PlainSchedule, done: float, share: float) -> float:
    """The rate without a warm-up after `done` epochs, which are this share of all."""
    base = schedule.base_rate
    match schedule:
        case StepDecay():
            return base * schedule.decay_factor ** math.floor(done / schedule.decay_epochs)
        case ExponentialDecay():
            return float(base * schedule.decay_factor ** (done / schedule.decay_epochs))
        case PolynomialDecay():
            return float(schedule.final_rate + (base - schedule.final_rate) * (1.0 - share) ** schedule.power)
        case CosineDecay():
            return schedule.final_rate + (base - schedule.final_rate) * 0.5 * (1.0 + math.cos(math.pi * share))
        case SchedulePlugin():
            return base * _compute_plugin_factor(schedule, share)


def _compute_plugin_factor(schedule: SchedulePlugin, share: float) -> float:
    label = f"schedule {schedule.kind!r}"
    try:
        factor = load_plugin(schedule.what, schedule.kind)(share, **schedule.args)
    except ConfigError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{label} failed for share {share:g} and its args{format_failure(error)}") from error
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 0:
        raise ConfigError(f"{label} must return a finite number of at least 0, got {factor!r} for share {share:g}")
    return float(factor)


def find_turning_points(schedule: AnySchedule) -> list[float]:
    """Epochs done where the rate turns: the ends of warm-ups and the beginnings of later segments, ascending."""
    found: set[float] = set()
    parts = to_segments(schedule)
    for one, end in zip(parts, [*(later.from_epoch for later in parts[1:]), math.inf], strict=True):
        found |= {at for at in (one.from_epoch, one.schedule.warmup_epochs) if one.from_epoch <= at < end}
    return sorted(found - {0.0})


def suggest_lower_lr(schedule: AnySchedule, done: float) -> str:
    """What to change of a schedule whose rate was too high after `done` epochs, in words."""
    if not isinstance(schedule, Segments):
        return "lower schedule.base_rate or lengthen schedule.warmup_epochs"
    number = sum(one.from_epoch <= done for one in schedule.segments) - 1
    return f"lower base_rate in schedule.segments.{number}.schedule"


def find_schedule_error(schedule: AnySchedule, epochs: int) -> str | None:
    """Why a training of so many epochs cannot follow the schedule, in words; None when it can."""
    if not isinstance(schedule, Segments):
        return _find_plain_schedule_error(schedule, epochs, "schedule")
    for number, one in enumerate(schedule.segments):
        place = f"schedule.segments.{number}"
        if one.from_epoch >= epochs:
            return (
                f"{place}.from_epoch {one.from_epoch:g} is refused: training ends after epochs ({epochs}); leave the "
                "segment out or train longer"
            )
        if trouble := _find_plain_schedule_error(one.schedule, epochs, f"{place}.schedule"):
            return trouble
    return None


def _find_plain_schedule_error(schedule: PlainSchedule, epochs: int, place: str) -> str | None:
    if schedule.warmup_epochs >= epochs:
        return (
            f"{place}.warmup_epochs {schedule.warmup_epochs:g} is refused: the warm-up never ends within epochs "
            f"({epochs}); shorten it or train longer"
        )
    if isinstance(schedule, StepDecay) and schedule.decay_factor < 1 and schedule.decay_epochs >= epochs:
        return (
            f"{place}.decay_epochs {schedule.decay_epochs:g} is refused: the first step is never reached within "
            f"epochs ({epochs}); shorten it, or say {place}.decay_factor 1 for a constant rate"
        )
    return None
