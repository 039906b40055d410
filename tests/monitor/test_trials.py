"""The trials of a sweep, from what its driver and its trials leave in storage."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli import status
from orchestrator.cli.config import StatusConfig
from orchestrator.monitor.run_status import inspect_sweep
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import file_io
from orchestrator.training.run_dir import get_final_weights_dir, get_outcome_path
from tests.support import drivers
from tests.support.launched import recipe, spec, write_journal

STATES = ("finished", "pruned", "diverged", "failed", "running", "waiting", "waiting")
JOURNAL: list[tuple[str, int, Mapping[str, object]]] = [
    ("started", 0, {"samples_per_epoch": 1000}),
    ("stopped", 500, {}),
]


def outcome(folder: str, status: str) -> None:
    file_io.write_bytes(get_outcome_path(folder), json.dumps({"status": status, "attempt": 1}).encode())


def trial(sweep: str, number: int, ended: str = "", reason: str = "", begun: bool = True) -> RunSpec:
    one = spec(recipe(f"net-t{number:03d}", epochs=4), sweep)
    drivers.trial(sweep, number, one, ended, reason)
    if begun:
        drivers.begun(one)
        drivers.attempt(one.folder, samples=500, began=1)
    return one


@pytest.fixture
def sweep(tmp_path: Path) -> str:
    """One of each, and one whose process trains another trial now: it can be resumed."""
    folder = drivers.sweep(str(tmp_path), "net-sweep-0123456789")
    drivers.lease(folder, beat=0)
    finished = trial(folder, 1, "finished")
    outcome(finished.folder, "finished")
    file_io.write_bytes(file_io.join(get_final_weights_dir(finished.folder), "DONE"), b"{}")
    outcome(trial(folder, 2, "pruned", "ended after epoch 1 by the scheduler").folder, "stopped")
    trial(folder, 3, "diverged", "the loss is nan")
    trial(folder, 4, "failed", "crashed 3 times")
    write_journal(trial(folder, 5).folder, 1, JOURNAL[:1])
    paused = trial(folder, 6)
    outcome(paused.folder, "stopped")
    write_journal(paused.folder, 1, JOURNAL)
    trial(folder, 7, begun=False)
    return folder


def show(names: tuple[str, ...], storage: str, as_json: bool) -> tuple[int, str]:
    out = io.StringIO()
    code = status.run_status(
        StatusConfig(runs=names, storage=storage, json_lines=as_json), Console(width=100, file=out)
    )
    return code, out.getvalue()


def test_each_trial_stands_as_its_ledger_and_its_run_say(sweep: str) -> None:
    owner, inspections = inspect_sweep(sweep)
    rows = [call() for call in inspections]
    assert tuple(row.state for row in rows) == STATES
    assert "another-host" in owner
    assert [row.message for row in rows] == ["", "", "the loss is nan", "crashed 3 times", "", "", ""]
    assert {row.sweep for row in rows} == {"net-sweep-0123456789"}
    assert [row.model for row in rows] == [f"net-t{number:03d}" for number in range(1, 8)]


def test_a_sweep_is_a_family_in_full_when_it_is_named(sweep: str, tmp_path: Path) -> None:
    code, text = show(("net-sweep-0123456789",), str(tmp_path), False)
    rows = [line.split() for line in text.splitlines()]
    assert code == 1, "a trial failed permanently"
    assert rows[1] == ["net-sweep-0123456789:", "4", "of", "7", "ended"]
    assert [row[:2] for row in rows[2:9]] == [[f"net-t{n:03d}", state] for n, state in enumerate(STATES, 1)]
    counts = "net-sweep-0123456789: 2 waiting, 1 finished, 1 pruned, 1 diverged, 1 failed, 1 running"
    assert counts in text
    assert "run by job raysubmit_abc" in text
    assert show((sweep,), "", False)[1] == text, "by its URL, too"


def test_of_one_that_is_not_named_only_what_runs_or_went_wrong_is_shown(sweep: str, tmp_path: Path) -> None:
    _, text = show((), str(tmp_path), False)
    shown = [line.split()[:2] for line in text.splitlines() if line.startswith("  net-t")]
    assert shown == [[f"net-t{n:03d}", state] for n, state in enumerate(STATES, 1) if n > 3]
    assert "1 pruned" in text
    _, lines = show((), str(tmp_path), True)
    rows = json.loads(lines)
    assert [row["state"] for row in rows] == list(STATES), "JSON has all"
    assert {row["owner"] for row in rows} == {str(drivers.ELSEWHERE)}


def test_the_repeats_of_a_winner_are_shown_too(sweep: str) -> None:
    for kind in ("preset", "winner"):
        drivers.begun(spec(recipe(f"net-{kind}-r1", epochs=4), sweep))
    again = drivers.begun(spec(recipe("net-winner-r2", epochs=4), sweep))
    drivers.lease(again, beat=0)
    drivers.attempt(again, samples=500, began=1)
    write_journal(again, 1, JOURNAL[:1])
    rows = [call() for call in inspect_sweep(sweep)[1]]
    assert [(row.model, row.state) for row in rows[len(STATES) :]] == [
        ("net-preset-r1", "stopped"), ("net-winner-r1", "stopped"), ("net-winner-r2", "running")
    ]  # fmt: skip


@pytest.mark.parametrize(("gone", "state"), [(False, "stopped"), (True, "lost")])
def test_trials_of_a_sweep_without_a_driver(tmp_path: Path, gone: bool, state: str) -> None:
    folder = drivers.sweep(str(tmp_path), "s")
    lease = drivers.lease(folder, beat=3600)
    if not gone:
        file_io.write_bytes(lease + ".released", b"")
    trial(folder, 1, "pruned")
    ended = trial(folder, 2)
    outcome(ended.folder, "stopped")
    write_journal(ended.folder, 1, JOURNAL)
    owner, inspections = inspect_sweep(folder)
    assert owner == ""
    assert [call().state for call in inspections] == ["pruned", state]


def test_a_sweep_without_trials_and_one_whose_records_cannot_be_read(tmp_path: Path) -> None:
    folder = drivers.sweep(str(tmp_path), "s")
    assert "s: no trial yet" in show(("s",), str(tmp_path), False)[1]
    file_io.write_bytes(file_io.join(folder, "trials", "0001.json"), b"not json")
    file_io.write_bytes(file_io.join(folder, "trials", "0001.ended.json"), b"[]")
    assert "0001" in show(("s",), str(tmp_path), False)[1]


def test_a_watch_lasts_while_the_sweep_runs(sweep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        file_io.write_bytes(file_io.join(sweep, "lease", "000001.released"), b"")

    monkeypatch.setattr(time, "sleep", sleep)
    out = io.StringIO()
    status.run_status(StatusConfig(runs=(sweep,), json_lines=True, watch=5.0), Console(width=100, file=out))
    assert looks == [5.0]
    assert len(out.getvalue().splitlines()) == 2
