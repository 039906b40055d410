"""Population based training (arXiv 1711.09846) of schedules: the worst go on with the weights of the best.

A trial that is among the worst at one of the population's looks ends, and another one begins in its place: it takes
over the weights that a good one had at that epoch, under a schedule that differs from there on. Since a schedule of
segments says both, the recipe of each is whole: trained from scratch it gives the same weights.

All draws are keyed by the sweep's seed and the trial, so a sweep that goes on decides as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.config.errors import ConfigError
from orchestrator.data import keyed
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.schedule import PlainSchedule, Segment, Segments
from orchestrator.tuning.ledger import Origin
from orchestrator.tuning.sweep import Following
from orchestrator.tuning.trials import Metric, Trial

QUANTILE = 0.25  # of the population that is replaced, and that is copied (arXiv 1711.09846, section 4: 20%)
FACTORS = (0.8, 1.25)  # of a perturbed learning rate (Ray Tune's; the paper has 0.8 and 1.2)
LEAST = 4  # trials that must have reached an epoch before any is replaced there


@dataclass(frozen=True)
class Exploiting:
    """Decides by the scores at the same epoch."""

    metric: Metric
    interval: int  # epochs between looks
    seed: int
    saved: Callable[[Trial, int], int | None]  # samples of a checkpoint that a trial has of that epoch's end

    def replacement(self, trial: Trial, trials: Sequence[Trial]) -> Following | None:
        """What goes on instead of a trial that has just reported an epoch; None when it goes on itself."""
        epoch = trial.trained_epochs
        if epoch % self.interval or epoch >= trial.recipe.epochs:
            return None
        ranked = sorted((score, one.number) for one in trials if (score := _at(one, epoch, self.metric)) is not None)
        few = max(1, int(QUANTILE * len(ranked)))
        if len(ranked) < LEAST or trial.number not in [number for _, number in ranked[-few:]]:
            return None
        if ranked[-1][0] <= ranked[0][0]:  # all alike
            return None
        by_number = {one.number: one for one in trials}
        best = [by_number[number] for _, number in ranked[:few]]
        donors = [(one, samples) for one in best if (samples := self.saved(one, epoch)) is not None]
        if not donors:
            return None
        donor, samples = donors[_draw(self.seed, "donor", trial.number, epoch, len(donors))]
        recipe = self._explored(donor.recipe, trial.number, epoch)
        assignment = {**donor.assignment, "from": f"{donor.name} at epoch {epoch}"}
        return Following(assignment, recipe, Origin(trial=donor.number, samples=samples, epoch=epoch))

    def _explored(self, donor: Recipe, number: int, epoch: int) -> Recipe:
        """The donor's recipe with another schedule from that epoch on."""
        schedule = donor.schedule
        parts = schedule.segments if isinstance(schedule, Segments) else (Segment(from_epoch=0.0, schedule=schedule),)
        factor = FACTORS[_draw(self.seed, "factor", number, epoch, len(FACTORS))]
        changed = _scaled(parts[-1].schedule, factor)
        segments = Segments(segments=(*parts, Segment(from_epoch=float(epoch), schedule=changed)))
        try:
            return Recipe.from_dict(donor.model_copy(update={"schedule": segments}).to_dict())
        except ConfigError as error:
            raise AssertionError(f"a perturbed recipe is refused: {error}") from error


def _scaled(schedule: PlainSchedule, factor: float) -> PlainSchedule:
    rates = {name: getattr(schedule, name) * factor for name in ("base_rate", "final_rate") if hasattr(schedule, name)}
    return schedule.model_copy(update=rates)


def _at(trial: Trial, epoch: int, metric: Metric) -> float | None:
    return next((one.score(metric) for one in trial.epochs if one.epoch == epoch), None)


def _draw(seed: int, purpose: str, number: int, epoch: int, choices: int) -> int:
    return keyed.key(seed, f"population-{purpose}", number, epoch) % choices
