"""Population based training (arXiv 1711.09846) of schedules: the worst go on with the weights of the best.

The population meets every so many epochs, all trials at the same one. Those that are worst there end, and others begin
in their places: each takes over the weights that a good one has, under a schedule that differs from there on. Since a
schedule of segments says both, the recipe of each is whole: trained from scratch it gives the same weights.

All draws are keyed by the sweep's seed and the trial, and nothing depends on who came first: a sweep that goes on, or
is run again, decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.config.errors import ConfigError
from orchestrator.data import rng
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import PlainSchedule, Segment, Segments, get_schedule_at, to_segments
from orchestrator.tuning.sweep import Replacement
from orchestrator.tuning.trial import MetricName, Trial
from orchestrator.tuning.trial_store import ForkPoint

QUANTILE = 0.25  # of the population that is replaced, and that is copied (arXiv 1711.09846, section 4: 20%)
MAX_RATE = 100.0  # that a schedule takes
PERTURBATION_FACTORS = (0.8, 1.25)  # of a perturbed learning rate (Ray Tune's; the paper has 0.8 and 1.2)


@dataclass(frozen=True)
class PopulationBasedTraining:
    """Decides by the scores at the same epoch."""

    metric: MetricName
    interval: int  # epochs between meetings
    seed: int
    find_checkpoint: Callable[[Trial, int], int | None]  # samples of a checkpoint that a trial has of that epoch's end

    def is_exploit_epoch(self, epoch: int, epochs: int) -> bool:
        """Whether the population meets after that epoch, of so many."""
        return 0 < epoch < epochs and epoch % self.interval == 0

    def choose_replacements(self, trials: Sequence[Trial], epoch: int) -> dict[int, Replacement]:
        """By number, what goes on instead of the worst, and of those that diverged on the way to this meeting."""
        # Those that came from this meeting, of an earlier driver, were no part of it.
        here = [one for one in trials if one.inherited_epochs < epoch]
        scored = [(score, one) for one in here if (score := _get_score_at(one, epoch, self.metric)) is not None]
        ranked = sorted(scored, key=lambda each: (each[0], each[1].number))
        few = int(QUANTILE * len(ranked))
        worst = [one for score, one in ranked[len(ranked) - few :] if score > ranked[0][0]]
        lost = [one for one in trials if one.state == "diverged" and one.trained_epochs < epoch]
        best = [one for _, one in ranked[: max(1, few)]]
        donors = [(one, samples) for one in best if (samples := self.find_checkpoint(one, epoch)) is not None]
        if not donors:
            return {}
        found = {}
        for one in (*worst, *lost):
            donor, samples = donors[_draw_index(self.seed, "donor", one.number, epoch, len(donors))]
            recipe = self._perturb_recipe(donor.recipe, one.number, epoch)
            assignment = {**donor.assignment, "from": f"{donor.name} at epoch {epoch}"}
            found[one.number] = Replacement(
                assignment, recipe, ForkPoint(trial=donor.number, samples=samples, epoch=epoch)
            )
        return found

    def _perturb_recipe(self, donor: Recipe, number: int, epoch: int) -> Recipe:
        """The donor's recipe with another schedule from that epoch on."""
        parts = to_segments(donor.schedule)
        before = [part for part in parts if part.from_epoch < epoch]
        after = [part for part in parts if part.from_epoch > epoch]  # of a preset that has segments itself
        factor = PERTURBATION_FACTORS[_draw_index(self.seed, "factor", number, epoch, len(PERTURBATION_FACTORS))]
        changed = Segment(
            from_epoch=float(epoch), schedule=_scale_rates(get_schedule_at(donor.schedule, epoch), factor)
        )
        segments = Segments(segments=(*before, changed, *after))
        try:
            return Recipe.from_dict(donor.model_copy(update={"schedule": segments}).to_dict())
        except ConfigError as error:
            raise AssertionError(f"a perturbed recipe is refused: {error}") from error


def _scale_rates(schedule: PlainSchedule, factor: float) -> PlainSchedule:
    names = [name for name in ("base_rate", "final_rate") if hasattr(schedule, name)]
    rates = {name: min(MAX_RATE, getattr(schedule, name) * factor) for name in names}
    return schedule.model_copy(update=rates)


def _get_score_at(trial: Trial, epoch: int, metric: MetricName) -> float | None:
    return next((one.get_score(metric) for one in trial.epochs if one.epoch == epoch), None)


def _draw_index(seed: int, purpose: str, number: int, epoch: int, choices: int) -> int:
    return rng.derive_key(seed, f"population-{purpose}", number, epoch) % choices
