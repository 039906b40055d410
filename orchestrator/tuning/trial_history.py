"""What a run's journal tells of its epochs. Importable without torch or ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training.run_dir import get_journal_dir
from orchestrator.tuning.trial import EpochResult


def read_epochs(folder: str) -> tuple[EpochResult, ...]:
    """The epochs that the run in `folder` has reported, ascending, each once. Storage errors pass through."""
    events: list[Event] = []
    cursor = None
    while True:
        try:
            found, cursor = journal.read_events(get_journal_dir(folder), cursor)
        except journal.DamagedSegmentError as error:
            cursor = error.cursor  # an epoch less is known; it must not keep the trial from going on
            continue
        if not found:
            return parse_epochs(events)
        events.extend(found)


def parse_epochs(events: Iterable[Event]) -> tuple[EpochResult, ...]:
    """The epochs of these events. What was trained again after a restart counts once, as it was last told."""
    found: dict[int, tuple[dict[str, float], int]] = {}
    for event in events:
        if event.kind == "epoch":
            values = {name: float(value) for name, value in event.values.items() if isinstance(value, int | float)}
            if math.isfinite(number := values.get("train/epoch", 0.0)):
                found[int(number)] = values, event.samples or 0
    epochs: list[EpochResult] = []
    for number in sorted(found):
        epochs.append(build_next_epoch(epochs[-1] if epochs else None, number, *found[number]))
    return tuple(epochs)


def build_next_epoch(last: EpochResult | None, number: int, values: Mapping[str, float], samples: int) -> EpochResult:
    """The epoch of that number, after which `samples` had been seen.

    Its seconds are those of its steps: neither a start nor a validation nor a wait for a scheduler is training.
    """
    speed = values.get("train/images_per_second", 0.0)
    steps = samples / max(1, number) / speed if speed > 0 else 0.0
    return EpochResult(number, values, (last.seconds if last is not None else 0.0) + steps, samples)
