"""The epochs of a trial, from its run's journal. Importable without torch or ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training.run_dir import get_journal_dir
from orchestrator.tuning.trial import EpochResult


def read_epochs(folder: str) -> tuple[EpochResult, ...]:
    """Return the epochs that the run in `folder` has reported, ascending, each once. Storage errors pass through."""
    events: list[Event] = []
    cursor = None
    while True:
        try:
            new_events, cursor = journal.read_events(get_journal_dir(folder), cursor)
        except journal.DamagedSegmentError as error:
            cursor = error.cursor  # the trial can resume without the epochs of this segment
            continue
        if not new_events:
            return parse_epochs(events)
        events.extend(new_events)


def parse_epochs(events: Iterable[Event]) -> tuple[EpochResult, ...]:
    """Return the epochs of these events. An epoch trained again after a restart counts once, as reported last."""
    reported: dict[int, tuple[dict[str, float], int]] = {}
    for event in events:
        if event.kind == "epoch":
            values = {name: float(value) for name, value in event.values.items() if isinstance(value, int | float)}
            if math.isfinite(number := values.get("train/epoch", 0.0)):
                reported[int(number)] = values, event.samples or 0
    epochs: list[EpochResult] = []
    for number in sorted(reported):
        epochs.append(build_next_epoch(epochs[-1] if epochs else None, number, *reported[number]))
    return tuple(epochs)


def build_next_epoch(last: EpochResult | None, number: int, values: Mapping[str, float], samples: int) -> EpochResult:
    """Return the epoch of that number, after which the trial had seen `samples`.

    Its seconds are those of its steps: starts, validations and waits for a scheduler are no training.
    """
    speed = values.get("train/images_per_second", 0.0)
    steps = samples / max(1, number) / speed if speed > 0 else 0.0
    return EpochResult(number, values, (last.seconds if last is not None else 0.0) + steps, samples)
