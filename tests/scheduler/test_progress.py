import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.data.manifest import Manifest, Shard
from orchestrator.monitor.formatting import format_bytes, format_duration, format_eta
from orchestrator.monitor.journal_summary import parse_epoch_metrics
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import progress as progress_module
from orchestrator.scheduler.config import PlanConfig
from orchestrator.scheduler.progress import ProgressMonitor, ProgressTable, RunProgress
from orchestrator.scheduler.run_plan import RunHistory
from orchestrator.storage import file_io
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import make_segment_name
from orchestrator.training.run_dir import get_journal_dir
from tests.support.launched import recipe, spec, until, write_journal


def epoch(number: int, error: float = 50.0, **values: float) -> tuple[str, int, dict[str, Any]]:
    figures = {
        "train/epoch": float(number), "train/loss": 2.0 / number, "train/images_per_second": 1234.5,
        "validation/raw_top1_error": error, "validation/raw_top5_error": error / 5,
    }  # fmt: skip
    return "epoch", number * 1000, figures | values


STARTED = ("started", 0, {"attempt": 1, "resumed": False})
DATA = Manifest(
    name="some",
    classes=tuple("ab"),
    splits={"train": (Shard(name="train.tar", samples=1024, bytes=1, sha256="0", index_sha256="0"),)},
)
SPEED = {"train/images_per_second": 51.2}  # an epoch in 20 s
INCIDENT = ("incident", 1000, {"cause": "worker lost", "samples_replayed": 640})
RESUMED = ("started", 1000, {"attempt": 2, "resumed": True})


@pytest.fixture
def run(tmp_path: Path) -> RunSpec:
    return spec(recipe("net", epochs=4), str(tmp_path))


def row_of(board: ProgressMonitor, run: RunSpec) -> RunProgress:
    return board.rows[run.name]


# ------------------------------------------------------------------ board
def test_progress_follows_a_journal(run: RunSpec) -> None:
    board = ProgressMonitor([run])
    board.update_phase(run, "running")
    assert board.poll() == []
    write_journal(run.folder, 1, [STARTED, ("metrics", 500, {"train/step_loss": 9.0}), epoch(1, 40.0)])
    assert [event.kind for _, event in board.poll()] == ["started", "metrics", "epoch"]
    figures = row_of(board, run).metrics
    assert (figures.epoch, figures.loss, figures.images_per_second) == (1, 2.0, 1234.5)
    assert (figures.top1_error, figures.top5_error) == (40.0, 8.0)
    assert board.poll() == []
    write_journal(run.folder, 2, [INCIDENT, RESUMED, epoch(2, 30.0)])
    assert [row.metrics.epoch for row, _ in board.poll()] == [2, 2, 2]  # rows are up to date already
    assert row_of(board, run).restarts == 1
    assert row_of(board, run).error_curve == [(1.0, 40.0), (2.0, 30.0)]


def test_the_averaged_weights_count_as_soon_as_there_are_any(run: RunSpec) -> None:
    board = ProgressMonitor([run])
    board.update_phase(run, "running")
    averaged = {"validation/averaged_top1_error": 10.0, "validation/averaged_top5_error": 1.0}
    write_journal(run.folder, 1, [STARTED, epoch(1, 40.0), epoch(2, 40.0, **averaged)])
    board.poll()
    assert row_of(board, run).error_curve == [(1.0, 40.0), (2.0, 10.0)]
    assert row_of(board, run).metrics.top5_error == 1.0


def test_epochs_seen_again_after_a_restart_are_drawn_once(run: RunSpec) -> None:
    board = ProgressMonitor([run])
    board.update_phase(run, "running")
    write_journal(run.folder, 1, [STARTED, epoch(1, 40.0), epoch(2, 30.0), epoch(3, 20.0)])
    write_journal(run.folder, 2, [INCIDENT, RESUMED, epoch(2, 30.0), epoch(3, 20.0), epoch(4, 10.0)])
    board.poll()
    assert row_of(board, run).error_curve == [(1.0, 40.0), (2.0, 30.0), (3.0, 20.0), (4.0, 10.0)]


def test_an_epoch_without_validation_has_no_error(run: RunSpec) -> None:
    board = ProgressMonitor([run])
    board.update_phase(run, "running")
    write_journal(run.folder, 1, [STARTED, ("epoch", 1000, {"train/epoch": 1.0, "train/loss": float("nan")})])
    board.poll()
    assert row_of(board, run).metrics.top1_error is None
    assert row_of(board, run).error_curve == []


def test_a_damaged_segment_hides_nothing_that_comes_after_it(run: RunSpec) -> None:
    board = ProgressMonitor([run])
    board.update_phase(run, "running")
    file_io.write_bytes(file_io.join(get_journal_dir(run.folder), make_segment_name(1, 1)), b"cut off")
    write_journal(run.folder, 2, [RESUMED, epoch(2)])
    board.poll()
    board.poll()
    assert row_of(board, run).metrics.epoch == 2


def test_failed_storage_is_polled_again(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    board = ProgressMonitor([run])
    board.update_phase(run, "running")
    write_journal(run.folder, 1, [STARTED, epoch(1)])
    with monkeypatch.context() as patched:
        patched.setattr(file_io, "list_names", lambda _: (_ for _ in ()).throw(file_io.StorageError("away")))
        assert board.poll() == []
    assert len(board.poll()) == 2


def test_waiting_runs_are_polled_on_demand(run: RunSpec) -> None:
    write_journal(run.folder, 1, [STARTED, epoch(1), epoch(2)])
    board = ProgressMonitor([run])
    assert board.poll() == []
    assert len(board.poll(waiting=True)) == 3
    board.update_phase(run, "running")
    assert board.poll() == []
    assert row_of(board, run).metrics.epoch == 2


def test_the_time_left_comes_from_the_measured_speed(tmp_path: Path) -> None:
    runs = [spec(recipe(f"net-{number}", epochs=10), str(tmp_path)) for number in range(3)]
    board = ProgressMonitor(runs, 0, DATA, PlanConfig(start_seconds=5.0))
    assert board.estimate_training_seconds(2) is None
    board.update_phase(runs[0], "running")
    write_journal(runs[0].folder, 1, [STARTED, epoch(1, **SPEED), epoch(2, **SPEED)])
    board.poll()
    # 8 epochs of 20 s of the first; 10 of the second beside it, and 10 of the third after the first.
    assert board.estimate_training_seconds(2) == pytest.approx((8 + 10) * 20 + 5)
    assert board.estimate_training_seconds(100) == pytest.approx(10 * 20 + 5)
    assert board.estimate_training_seconds(1) == pytest.approx((8 + 10 + 10) * 20 + 2 * 5)
    for run in runs:
        board.update_phase(run, "finished")
    assert board.estimate_training_seconds(2) == 0.0


def test_a_part_of_an_epoch_counts_and_a_new_launch_takes_its_start(run: RunSpec) -> None:
    board = ProgressMonitor([run], 0, DATA, PlanConfig(start_seconds=5.0))
    board.update_phase(run, "running")
    started = ("started", 0, {"samples_per_epoch": 1024})
    write_journal(run.folder, 1, [started, ("epoch", 1024, epoch(1)[2] | SPEED), ("metrics", 1536, {})])
    board.poll()
    assert board.estimate_training_seconds(1) == pytest.approx(2.5 * 20)
    board.update_phase(run, "running")
    assert board.estimate_training_seconds(1) == pytest.approx(5 + 2.5 * 20)


def test_before_the_first_epoch_the_time_left_is_that_of_the_stated_speed(tmp_path: Path) -> None:
    runs = [spec(recipe(f"net-{number}", epochs=3), str(tmp_path)) for number in range(3)]
    board = ProgressMonitor(runs, 0, DATA, PlanConfig(images_per_second=51.2, start_seconds=5.0))
    assert board.estimate_training_seconds(2) == pytest.approx(2 * (5 + 60))
    board.update_phase(runs[0], "running")
    write_journal(runs[0].folder, 1, [STARTED, epoch(1, **{"train/images_per_second": 102.4})])
    board.poll()
    # What is measured is believed before what was stated.
    assert board.estimate_training_seconds(2) == pytest.approx(20 + 5 + 30)


def test_estimates_use_what_the_journals_record(run: RunSpec) -> None:
    write_journal(run.folder, 1, [("started", 0, {"workers": 3}), epoch(2)])
    board = ProgressMonitor([run])
    board.poll(waiting=True)
    assert board.get_histories() == {run.name: RunHistory(2, 1234.5, 3, False)}


# ------------------------------------------------------------------ progress
def test_durations() -> None:
    assert [format_duration(seconds) for seconds in (None, 0, 59.6, 61, 3723)] == [
        "-",
        "0:00",
        "1:00",
        "1:01",
        "1:02:03",
    ]


def test_sizes() -> None:
    assert [format_bytes(number) for number in (0, 999, 1234, 5.55e9, 2e15)] == [
        "0 B", "999 B", "1.23 kB", "5.55 GB", "2 PB",
    ]  # fmt: skip


def test_moments_name_the_day_when_it_is_another_one() -> None:
    assert format_eta(None) == "-"
    assert len(format_eta(0.0)) == 5
    assert len(format_eta(3 * 86400.0)) == 12


def test_the_headline_shows_the_wave(tmp_path: Path) -> None:
    runs = [spec(recipe(f"net-{number}", epochs=10), str(tmp_path)) for number in range(7)]
    board = ProgressMonitor(runs)
    for run in runs[:4]:
        board.update_phase(run, "finished")
    title = str(ProgressTable(board, lambda: 2, Console(file=io.StringIO())).build_table().title)
    assert title.startswith("wave 3 of 4, 2 at a time, ")
    assert "done at about" in title


def test_what_is_left_includes_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.02)
    runs = [spec(recipe(f"net-{number}", epochs=1), str(tmp_path)) for number in range(2)]
    board, text = ProgressMonitor(runs, 1000, DATA), io.StringIO()
    assert board.estimate_scoring_seconds(2) is None
    board.update_phase(runs[0], "running")
    with ProgressTable(board, lambda: 2, Console(file=text, width=200)) as progress:
        write_journal(runs[0].folder, 1, [STARTED, epoch(1, **{"train/images_per_second": 4800.0})])
        until(lambda: "epoch 1/1" in text.getvalue())
        # 144 crops of 1,000 images of 2 models, forward alone a third of training's 4,800 a second, on 2 slots.
        assert board.estimate_scoring_seconds(2) == pytest.approx(10.0)
        board.update_phase(runs[0], "finished")
        board.update_phase(runs[1], "finished")
        title = str(progress.build_table().title)
    assert "left, scoring up to 0:10 of it, done at about" in text.getvalue()
    assert "0:10 left, scoring up to 0:10 of it, done at about" in title
    assert ProgressMonitor(runs).estimate_scoring_seconds(2) == 0.0


def test_a_log_gets_a_line_per_event_and_none_twice(run: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.02)
    text, board = io.StringIO(), ProgressMonitor([run])
    board.update_phase(run, "running")
    with ProgressTable(board, lambda: 2, Console(file=text, width=200)):
        write_journal(run.folder, 1, [STARTED, ("metrics", 500, {"train/step_loss": 9.0}), epoch(1, 40.0)])
        until(lambda: "epoch 1/4" in text.getvalue())
        write_journal(run.folder, 2, [INCIDENT, RESUMED, epoch(2, 30.0)])
        until(lambda: "epoch 2/4" in text.getvalue())
        write_journal(run.folder, 3, [epoch(3, 20.0)])  # printed at the end, if not before
    lines = text.getvalue().splitlines()
    assert all(line.startswith(f"{run.name}: ") for line in lines)
    texts = [line.removeprefix(f"{run.name}: ") for line in lines]
    for wanted, line in zip(
        (
            "epoch 1/4, loss 2.000, top-1 error 40.00%, 1234 images/s; - left, done at about -",
            "RESTARTED: worker lost; 640 samples to replay",
            "resumed after 1000 samples",
            "epoch 2/4, loss 1.000, top-1 error 30.00%",
            "epoch 3/4",
        ),
        texts,
        strict=True,
    ):
        assert line.startswith(wanted)


def test_the_table_fits_100_columns_with_nothing_cut() -> None:
    runs = [spec(recipe("googlenet-imagenet-wide-m7-wide", epochs=250))]
    runs += [spec(recipe(f"googlenet-imagenet-wide-m{number}", epochs=250)) for number in range(1, 7)]
    board = ProgressMonitor(runs)
    for run in runs:
        board.update_phase(run, "finished")
        row_of(board, run).metrics = parse_epoch_metrics(
            _event(epoch(250, 100.0, **{"train/loss": 16.906, "train/images_per_second": 123456.0}))
        )
        row_of(board, run).restarts = 12
    text = io.StringIO()
    Console(file=text, width=100).print(ProgressTable(board, lambda: 7, Console(file=io.StringIO())).build_table())
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    shown = lines[-7].split()
    assert shown == [
        "googlenet-imagenet-wide-m7-wide", "finished", "250/250", "16.906", "100.00", "20.00", "123456", "12",
    ]  # fmt: skip
    assert "\u2026" not in text.getvalue()


def test_a_terminal_gets_a_live_table_and_keeps_the_last(run: RunSpec) -> None:
    text, board = io.StringIO(), ProgressMonitor([run])
    board.update_phase(run, "running")
    write_journal(run.folder, 1, [STARTED, epoch(1, 40.0)])
    with ProgressTable(board, lambda: 1, Console(file=text, width=100, force_terminal=True, color_system=None)):
        board.update_phase(run, "finished")
    last = text.getvalue().removesuffix("\x1b[?25h").rstrip().splitlines()[-1].split()  # that shows the cursor again
    assert last[:5] == ["net", "finished", "1/4", "2.000", "40.00"]


def _event(made: tuple[str, int, dict[str, Any]]) -> Event:
    return Event(made[0], 0.0, made[1], made[2])


def test_a_run_without_workers_is_starting_and_then_waits(run: RunSpec) -> None:
    row = row_of(ProgressMonitor([run]), run)
    assert row.state == "waiting"
    row.status, row.running_since = "running", time.time()
    assert row.state == "starting"
    row.running_since = time.time() - 61
    assert row.state == "WAITING"
    row.has_started = True
    assert row.state == "running"


def test_causes_are_shown_as_they_are_whatever_brackets_they_have(tmp_path: Path) -> None:
    """Tracebacks of native code hold paths in brackets, which a console may read as closing tags."""
    cause = "rank 1: RuntimeError: [/__w/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:2024"
    run = spec(storage=str(tmp_path))
    board, screen = ProgressMonitor([run]), io.StringIO()
    board.update_phase(run, "running")
    with ProgressTable(board, lambda: 1, Console(file=screen, width=300)):
        write_journal(run.folder, 1, [("incident", 8, {"cause": cause, "samples_replayed": 8})])
    assert cause in screen.getvalue()
