"""How far two recipes share their training: as long as only their schedules differ, and these say the same rates.

Progress is the only clock and nothing random is kept, so up to there the state of one is the state of the other, to the
last bit. What is said here is proven from the schedules' form, never by trying rates out; in doubt they share nothing.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

from orchestrator.config.overrides import flatten_config
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import (
    AnySchedule,
    CosineDecay,
    PlainSchedule,
    PolynomialDecay,
    StepDecay,
    get_schedule_at,
    to_segments,
)

# What may differ: names begin the names of runs and nothing else; epochs count where a schedule or the average asks.
_IGNORED_FIELDS = ("name", "epochs")


def shares_prefix(a: AnySchedule, b: AnySchedule, epochs: float, total_epochs: int) -> bool:
    """Whether two schedules of a training of `total_epochs` epochs provably say the same rates before `epochs` epochs.

    True: bit for bit at every progress from 0 up to, not including, that point; what lies beyond the training's end is
    not looked at. False: they differ, or it takes more than their form to tell.
    """
    end = min(epochs, float(total_epochs))
    return _count_shared_epochs(a, b, end, same_total=True) >= end


def count_shared_epochs(a: Recipe, b: Recipe) -> float:
    """Epochs after which a training by either recipe is provably in the same state; 0 when there are none.

    The recipes may differ in their name, their schedule and their number of epochs alone. Where the numbers differ, the
    prefix ends with the first schedule that asks for it (polynomial, cosine) or where either begins to average weights.
    """
    if find_differences(a, b):
        return 0.0
    if a.epochs == b.epochs:
        return _count_shared_epochs(a.schedule, b.schedule, float(a.epochs), same_total=True)
    averaged = _round_down(Fraction(a.averaging.start) * min(a.epochs, b.epochs))
    return _count_shared_epochs(a.schedule, b.schedule, averaged, same_total=False)


def find_differences(a: Recipe, b: Recipe) -> tuple[str, ...]:
    """Dotted paths, in declared order, in which recipes differ that can share nothing; empty when none do."""
    ours, theirs = flatten_config(a), flatten_config(b)
    differing = [path for path in {**ours, **theirs} if path not in ours or ours[path] != theirs.get(path)]
    return tuple(path for path in differing if path not in _IGNORED_FIELDS and not path.startswith("schedule."))


def _count_shared_epochs(a: AnySchedule, b: AnySchedule, end: float, same_total: bool) -> float:
    """Epochs, `end` at most, before which both say the same rates."""
    cuts = sorted({0.0, *(at for at in (*_find_cuts(a), *_find_cuts(b)) if at < end), max(0.0, end)})
    for start, stop in pairwise(cuts):
        one, other = (_simplify_schedule(get_schedule_at(schedule, start), start, stop) for schedule in (a, b))
        if one != other or (not same_total and isinstance(one, PolynomialDecay | CosineDecay)):
            return start
    return cuts[-1]


def _find_cuts(schedule: AnySchedule) -> list[float]:
    """Where what a schedule does may change: beginnings of segments, and first steps."""
    parts = to_segments(schedule)
    steps = [one.schedule.decay_epochs for one in parts if isinstance(one.schedule, StepDecay)]
    return [*(one.from_epoch for one in parts), *steps]


def _simplify_schedule(schedule: PlainSchedule, start: float, stop: float) -> PlainSchedule:
    """A schedule that says the same rates from `start` to before `stop`; the same one for all that are alike there."""
    changes: dict[str, float] = {}
    if schedule.warmup_epochs <= start:
        changes["warmup_epochs"] = 0.0  # done / warmup is 1 or more
    if isinstance(schedule, StepDecay) and (stop <= schedule.decay_epochs or schedule.decay_factor == 1.0):
        # No step yet, or none that changes anything: factor ** 0 is 1, and base * 1 is base, exactly.
        changes |= {"decay_factor": 1.0, "decay_epochs": 1.0}
    return schedule.model_copy(update=changes)


def _round_down(exact: Fraction) -> float:
    """The largest float that is not above."""
    near = float(exact)
    return near if Fraction(near) <= exact else math.nextafter(near, -math.inf)
