"""Epochs as a run's journal tells them."""

import pytest

from orchestrator.tracking.events import Event
from orchestrator.tuning import trial_history
from orchestrator.tuning.trial import EpochResult, Metric
from tests.support.launched import write_journal


def epoch(number: int, speed: float, error: float, samples: int | None = None) -> Event:
    values = {"train/epoch": float(number), "train/images_per_second": speed, "validation/raw_top1_error": error}
    return Event("epoch", 100.0 * number, 50 * number if samples is None else samples, values)


def test_seconds_are_those_of_the_steps() -> None:
    found = trial_history.parse_epochs(
        [Event("started", 0.0, 0), epoch(1, 25.0, 60.0), epoch(2, 50.0, 50.0), Event("finished", 9.0, 100)]
    )
    assert [one.epoch for one in found] == [1, 2]
    assert [one.seconds for one in found] == [2.0, 3.0]
    assert [one.samples for one in found] == [50, 100]
    assert [one.get_score(Metric(name="top1_error")) for one in found] == [60.0, 50.0]


def test_an_epoch_trained_again_counts_once_as_it_was_last_told() -> None:
    found = trial_history.parse_epochs(
        [epoch(1, 25.0, 60.0), epoch(2, 25.0, 55.0), epoch(2, 50.0, 50.0), epoch(3, 50.0, 40.0)]
    )
    assert [(one.epoch, one.seconds) for one in found] == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert found[1].get_score(Metric(name="top1_error")) == 50.0


def test_an_epoch_without_a_speed_takes_no_time() -> None:
    (found,) = trial_history.parse_epochs([Event("epoch", 1.0, 50, {"train/epoch": 1.0})])
    assert found == EpochResult(1, {"train/epoch": 1.0}, 0.0, 50)
    assert found.get_score(Metric(name="top1_error")) is None


def test_the_averaged_weights_are_scored_as_soon_as_there_are_any() -> None:
    both = EpochResult(1, {"validation/raw_top5_error": 3.0, "validation/averaged_top5_error": 2.0}, 0.0)
    assert both.get_score(Metric(name="top5_error")) == 2.0


def test_read_goes_over_attempts_and_passes_damage_over(tmp_path: object) -> None:
    folder = str(tmp_path)
    assert trial_history.read_epochs(folder) == ()
    write_journal(folder, 1, [("epoch", 50, {"train/epoch": 1.0, "train/images_per_second": 25.0})])
    write_journal(folder, 2, [("epoch", 100, {"train/epoch": 2.0, "train/images_per_second": 25.0})])
    assert [one.epoch for one in trial_history.read_epochs(folder)] == [1, 2]
    from pathlib import Path

    (first, _) = sorted(Path(folder).rglob("*.jsonl"))
    first.write_text("no journal")
    assert [one.epoch for one in trial_history.read_epochs(folder)] == [2]


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_following_adds_up(epochs: int) -> None:
    last = None
    for number in range(1, epochs + 1):
        last = trial_history.build_next_epoch(last, number, {"train/images_per_second": 10.0}, 20 * number)
    assert (0.0 if last is None else last.seconds) == pytest.approx(2.0 * epochs)
