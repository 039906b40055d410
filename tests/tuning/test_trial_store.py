"""The store of trials: records that are written once, read when a sweep resumes, and rejected when they are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking.events import Event
from orchestrator.tuning import trial_store
from orchestrator.tuning.trial import EpochResult, Metric, Trial
from orchestrator.tuning.trial_store import TrialStoreError
from tests.support.launched import recipe, write_journal

TOP1 = Metric(name="top1_error")


def make_trial(number: int, **fields: Any) -> Trial:
    return Trial(number, {"epochs": number}, recipe(f"tiny-t{number}"), **fields)


def read(sweep: Path) -> list[tuple[int, str, str, int]]:
    entries = trial_store.load_trials(str(sweep), lambda of: str(sweep / of.name))
    return [(one.number, one.state, one.reason, one.trained_epochs) for one in entries]


def test_trials_come_back_with_what_their_runs_have_reported(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    for number in (1, 2, 3):
        trial_store.add_trial(str(tmp_path), make_trial(number))
    trial_store.write_end(str(tmp_path), make_trial(1, state="pruned", reason="by the scheduler"))
    write_journal(str(tmp_path / "tiny-t2"), 1, [("epoch", 10, {"train/epoch": 4.0})])
    assert read(tmp_path) == [
        (1, "pruned", "by the scheduler", 0),
        (2, "waiting", "", 4),
        (3, "waiting", "", 0),
    ]


def test_what_a_trial_is_survives(tmp_path: Path) -> None:
    first = make_trial(1)
    trial_store.add_trial(str(tmp_path), first)
    (entry,) = trial_store.load_trials(str(tmp_path), lambda of: str(tmp_path / "run"))
    assert entry == first


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    place = tmp_path / "trials" / "0001.json"
    trial_store.add_trial(str(tmp_path), make_trial(1))
    place.write_text(json.dumps({**json.loads(place.read_text()), "origin": None, "replaces": None}))
    assert read(tmp_path) == [(1, "waiting", "", 0)]


def test_a_second_driver_gets_an_error(tmp_path: Path) -> None:
    trial_store.add_trial(str(tmp_path), make_trial(1))
    with pytest.raises(TrialStoreError, match=r"0001\.json: exists already: another driver"):
        trial_store.add_trial(str(tmp_path), make_trial(1))


@pytest.mark.parametrize("text", ["", "{", '{"number": 1}', "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    trial_store.add_trial(str(tmp_path), make_trial(1))
    (tmp_path / "trials" / "0001.json").write_text(text)
    with pytest.raises(TrialStoreError, match=r"0001\.json: cannot be read"):
        read(tmp_path)


def test_a_gap_is_named(tmp_path: Path) -> None:
    trial_store.add_trial(str(tmp_path), make_trial(1))
    trial_store.add_trial(str(tmp_path), make_trial(3))
    with pytest.raises(TrialStoreError, match=r"0002\.json: is missing, though later"):
        read(tmp_path)


def test_an_end_is_a_file_of_its_own(tmp_path: Path) -> None:
    trial_store.add_trial(str(tmp_path), make_trial(1))
    trial_store.write_end(str(tmp_path), make_trial(1, state="failed", reason="no \N{BULLET} ascii"))
    assert json.loads((tmp_path / "trials" / "0001.ended.json").read_text())["state"] == "failed"
    assert read(tmp_path) == [(1, "failed", "no \N{BULLET} ascii", 0)]


# ------------------------------------------------------------------ epochs from a journal
def epoch(number: int, speed: float, error: float, samples: int | None = None) -> Event:
    values = {"train/epoch": float(number), "train/images_per_second": speed, "validation/raw_top1_error": error}
    return Event("epoch", 100.0 * number, 50 * number if samples is None else samples, values)


def test_seconds_are_those_of_the_steps() -> None:
    found = trial_store.parse_epochs(
        [Event("started", 0.0, 0), epoch(1, 25.0, 60.0), epoch(2, 50.0, 50.0), Event("finished", 9.0, 100)]
    )
    assert [one.epoch for one in found] == [1, 2]
    assert [one.seconds for one in found] == [2.0, 3.0]
    assert [one.samples for one in found] == [50, 100]
    assert [TOP1.find_score(one.values) for one in found] == [60.0, 50.0]


def test_an_epoch_trained_again_counts_once_as_last_reported() -> None:
    found = trial_store.parse_epochs(
        [epoch(1, 25.0, 60.0), epoch(2, 25.0, 55.0), epoch(2, 50.0, 50.0), epoch(3, 50.0, 40.0)]
    )
    assert [(one.epoch, one.seconds) for one in found] == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert TOP1.find_score(found[1].values) == 50.0


def test_an_epoch_without_a_speed_takes_no_time() -> None:
    (found,) = trial_store.parse_epochs([Event("epoch", 1.0, 50, {"train/epoch": 1.0})])
    assert found == EpochResult(1, {"train/epoch": 1.0}, 0.0, 50)
    assert TOP1.find_score(found.values) is None


def test_the_averaged_weights_are_scored_as_soon_as_there_are_any() -> None:
    both = EpochResult(1, {"validation/raw_top5_error": 3.0, "validation/averaged_top5_error": 2.0}, 0.0)
    assert Metric(name="top5_error").find_score(both.values) == 2.0


def test_read_goes_over_attempts_and_passes_damage_over(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert trial_store.read_epochs(folder) == ()
    write_journal(folder, 1, [("epoch", 50, {"train/epoch": 1.0, "train/images_per_second": 25.0})])
    write_journal(folder, 2, [("epoch", 100, {"train/epoch": 2.0, "train/images_per_second": 25.0})])
    assert [one.epoch for one in trial_store.read_epochs(folder)] == [1, 2]
    (first, _) = sorted(Path(folder).rglob("*.jsonl"))
    first.write_text("no journal")
    assert [one.epoch for one in trial_store.read_epochs(folder)] == [2]


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_seconds_add_up(epochs: int) -> None:
    last = None
    for number in range(1, epochs + 1):
        last = trial_store.build_next_epoch(last, number, {"train/images_per_second": 10.0}, 20 * number)
    assert (0.0 if last is None else last.seconds) == pytest.approx(2.0 * epochs)
