"""The store of trials: records that are written once, read when a sweep resumes, and rejected when they are damaged."""

import json
from pathlib import Path

import pytest

from orchestrator.recipe.config import Recipe
from orchestrator.tuning.trial_store import (
    TrialEnd,
    TrialRecord,
    TrialStore,
    TrialStoreError,
    sort_for_resume,
)
from tests.support.launched import recipe, write_journal


def record(number: int, **fields: object) -> TrialRecord:
    return TrialRecord.from_dict(
        {"number": number, "assignment": {"epochs": number}, "recipe": recipe(f"tiny-t{number}").to_dict(), **fields}
    )


def read(ledger: TrialStore, runs: Path) -> list[tuple[int, str, str, int]]:
    entries = ledger.load_trials(lambda of: str(runs / of.name))
    return [(one.trial.number, one.trial.state, one.trial.reason, one.trial.trained_epochs) for one in entries]


def test_trials_come_back_with_what_their_runs_have_reported(tmp_path: Path) -> None:
    ledger = TrialStore(str(tmp_path))
    assert read(ledger, tmp_path) == []
    for number in (1, 2, 3):
        ledger.add_trial(record(number))
    ledger.write_end(1, TrialEnd(state="pruned", reason="by the scheduler"))
    write_journal(str(tmp_path / "tiny-t2"), 1, [("epoch", 10, {"train/epoch": 4.0})])
    assert read(TrialStore(str(tmp_path)), tmp_path) == [
        (1, "pruned", "by the scheduler", 0),
        (2, "waiting", "", 4),
        (3, "waiting", "", 0),
    ]


def test_what_a_trial_is_survives(tmp_path: Path) -> None:
    ledger = TrialStore(str(tmp_path))
    first = record(1)
    ledger.add_trial(first)
    (entry,) = ledger.load_trials(lambda of: str(tmp_path / "run"))
    assert entry.record == first
    assert isinstance(entry.trial.recipe, Recipe)
    assert entry.trial.recipe == first.recipe


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    place = tmp_path / "trials" / "0001.json"
    place.parent.mkdir()
    place.write_text(json.dumps({**record(1).to_dict(), "origin": None, "replaces": None}))
    assert read(TrialStore(str(tmp_path)), tmp_path) == [(1, "waiting", "", 0)]


def test_a_second_driver_is_told(tmp_path: Path) -> None:
    TrialStore(str(tmp_path)).add_trial(record(1))
    with pytest.raises(TrialStoreError, match=r"0001\.json: exists already: another driver"):
        TrialStore(str(tmp_path)).add_trial(record(1))


@pytest.mark.parametrize("text", ["", "{", '{"number": 1}', "[]"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    ledger = TrialStore(str(tmp_path))
    ledger.add_trial(record(1))
    (tmp_path / "trials" / "0001.json").write_text(text)
    with pytest.raises(TrialStoreError, match=r"0001\.json: cannot be read"):
        read(ledger, tmp_path)


def test_a_gap_is_named(tmp_path: Path) -> None:
    ledger = TrialStore(str(tmp_path))
    ledger.add_trial(record(1))
    ledger.add_trial(record(3))
    with pytest.raises(TrialStoreError, match=r"0002\.json: is missing, though later"):
        read(ledger, tmp_path)


def test_ends_are_written_over_nothing_else(tmp_path: Path) -> None:
    ledger = TrialStore(str(tmp_path))
    ledger.add_trial(record(1))
    ledger.write_end(1, TrialEnd(state="failed", reason="no \N{BULLET} ascii"))
    assert json.loads((tmp_path / "trials" / "0001.ended.json").read_text())["state"] == "failed"
    assert read(ledger, tmp_path) == [(1, "failed", "no \N{BULLET} ascii", 0)]


def test_those_that_ended_come_first(tmp_path: Path) -> None:
    ledger = TrialStore(str(tmp_path))
    for number in (1, 2, 3):
        ledger.add_trial(record(number))
    ledger.write_end(3, TrialEnd(state="finished"))
    entries = ledger.load_trials(lambda of: str(tmp_path / of.name))
    assert [entry.record.number for entry in sort_for_resume(entries)] == [3, 1, 2]
