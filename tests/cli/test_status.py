import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import status
from orchestrator.cli.config import StatusConfig
from orchestrator.cli.status import RunGroup
from orchestrator.config.errors import ConfigError
from orchestrator.monitor import journal_summary
from orchestrator.monitor.run_status import RunSnapshot
from orchestrator.ray_backend import run_lookup
from orchestrator.storage import file_io
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir, get_outcome_path
from tests.support import drivers
from tests.support.damage import DAMAGED
from tests.support.launched import recipe, spec, write_journal

WIDEST: dict[str, Any] = {
    "state": "restarting", "message": "", "epochs": 250, "epoch": 249.9, "samples": 320_000_000, "loss": 16.906,
    "top1_error": 100.0, "top5_error": 100.0, "images_per_second": 123456.0, "seconds_left": 359_999.0,
    "incidents": 12, "goodput": 1.0, "checkpoint_samples": 320_291_751, "checkpoint_seconds_ago": 359_999.0,
    "workers": 1024,
}  # fmt: skip


def show_status(storage: Path, *names: str, as_json: bool = False, watch: float | None = None) -> tuple[int, str]:
    out = io.StringIO()
    code = status.run_status(
        StatusConfig(runs=names, storage=str(storage), json_lines=as_json, watch=watch), Console(width=100, file=out)
    )
    return code, out.getvalue()


def finished(storage: Path, name: str) -> str:
    folder = drivers.begun(spec(recipe(name, epochs=1), str(storage)))
    file_io.write_bytes(get_outcome_path(folder), json.dumps({"status": "finished", "attempt": 1}).encode())
    file_io.write_bytes(file_io.join(get_final_weights_dir(folder), "DONE"), b"{}")
    return folder


def test_everything_in_a_storage_is_shown_members_with_their_ensemble(tmp_path: Path) -> None:
    members = [spec(recipe(f"net-m{number}", epochs=2), str(tmp_path)) for number in (1, 2, 3)]
    folder = drivers.ensemble(str(tmp_path), "net-x3", members)
    drivers.lease(folder, beat=0)
    finished(tmp_path, "alone")
    drivers.begun(members[0])
    drivers.lease(members[0].folder, beat=0)
    drivers.attempt(members[0].folder, samples=500)
    write_journal(
        members[0].folder, 1, [("started", 0, {"samples_per_epoch": 1000}), ("metrics", 500, {"train/step_loss": 2})]
    )
    code, text = show_status(tmp_path)
    assert code == 0
    rows = [line.split() for line in text.splitlines()]
    assert rows[1:6] == [
        ["net-x3:", "0", "of", "3", "finished"],
        ["net-m1", "running", "0.5/2", "2.000", "-", "-", "-", rows[2][-1]],
        ["net-m2", "waiting", "-/-", "-", "-", "-", "-", "-"],
        ["net-m3", "waiting", "-/-", "-", "-", "-", "-", "-"],
        ["alone", "finished", "-/1", "-", "-", "-", "-", "-"],
    ]
    assert "run by job raysubmit_abc, process 1 on another-host" in text
    assert show_status(tmp_path, "net-x3")[1].count("net-m") == 2 * 3
    assert "net-m1" not in show_status(tmp_path, finished(tmp_path, "alone"))[1]


def test_a_failed_run_is_shown_with_its_cause_and_exit_status_1(tmp_path: Path) -> None:
    folder = drivers.begun(spec(recipe("net"), str(tmp_path)))
    file_io.write_bytes(get_outcome_path(folder), json.dumps({"status": "diverged", "message": "[rate] 9"}).encode())
    code, text = show_status(tmp_path)
    assert code == 1
    assert "failed: diverged: [rate] 9" in text


def test_json_is_a_line_for_machines(tmp_path: Path) -> None:
    finished(tmp_path, "net")
    folder = drivers.begun(spec(recipe("nan"), str(tmp_path)))
    write_journal(folder, 1, [("started", 0, {}), ("metrics", 8, {"train/step_loss": float("nan")})])
    code, text = show_status(tmp_path, as_json=True)
    assert code == 0
    nan, net = json.loads(text)
    assert (net["model"], net["state"], net["folder"]) == ("net", "finished", str(tmp_path / "models" / net["name"]))
    assert nan["loss"] is None
    assert text.count("\n") == 1
    assert show_status(tmp_path / "nowhere", as_json=True) == (0, "[]\n")


def test_no_runs_are_no_failure_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    assert show_status(tmp_path) == (0, f"no runs in {tmp_path}\n")
    finished(tmp_path, "net")
    with pytest.raises(ConfigError, match="no such run"):
        show_status(tmp_path, "other")


def test_a_watch_ends_when_no_run_is_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = drivers.begun(spec(recipe("net"), str(tmp_path)))
    stem = drivers.lease(folder, beat=0)
    looks: list[float] = []
    real = run_lookup.find_runs

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            file_io.write_bytes(stem + ".released", b"")

    def find(*arguments: Any) -> Any:
        if len(looks) == 2:
            raise file_io.StorageError("away")  # the next look succeeds
        return real(*arguments)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(run_lookup, "find_runs", find)
    code, text = show_status(tmp_path, folder, as_json=True, watch=5.0)
    assert (code, looks) == (0, [5.0, 5.0, 5.0])
    assert [json.loads(line)[0]["state"] for line in text.splitlines()] == ["waiting", "waiting", "stopped"]


def test_ctrl_c_ends_a_watch_with_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers.lease(drivers.begun(spec(recipe("net"), str(tmp_path))), beat=0)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert show_status(tmp_path, watch=1.0)[0] == 0


def test_the_tables_fit_100_columns_without_cutting_a_number() -> None:
    name, ensemble = "googlenet-imagenet-wide-m7-wide-0123456789abcdef", "googlenet-imagenet-wide-x7-0123456789abcdef"
    row = RunSnapshot(name=name, folder="/x", model="googlenet-imagenet-wide-m7-wide", ensemble=ensemble, **WIDEST)
    out = io.StringIO()
    Console(width=100, file=out).print(status.render_groups([RunGroup(ensemble, (row,))]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "\u2026" not in out.getvalue()
    words = out.getvalue().split()
    for figure in ("restarting", "249.9/250", "16.906", "100.00", "123456", "99:59:59", "320291751", "1024", "100.0"):
        assert figure in words


# ------------------------------------------------------------------ damaged records
RECORDS = ("spec.json", "outcome.json", "lease/000001.json", "lease/000001.beat", "attempts/000001.json",
           "attempts/000001.beat", "attempts/failed-1.json", "attempts/000001.stalled-1.json",
           "journal/000001-000001.jsonl", "final/DONE", "checkpoints/000000000500-000001/DONE")  # fmt: skip


def whole_run(storage: Path, name: str) -> str:
    folder = finished(storage, name)
    drivers.lease(folder, beat=0, released=b"")
    drivers.attempt(folder, samples=500)
    write_journal(folder, 1, [("started", 0, {"samples_per_epoch": 1000}), ("metrics", 500, {"train/step_loss": 2})])
    file_io.write_bytes(file_io.join(get_checkpoints_dir(folder), "000000000500-000001", "DONE"), b"{}")
    return folder


@pytest.mark.parametrize("record", RECORDS)
def test_no_damaged_record_of_a_run_hides_the_others(record: str, tmp_path: Path) -> None:
    whole_run(tmp_path, "whole")
    folder = whole_run(tmp_path, "damaged")
    for data in DAMAGED:
        file_io.write_bytes(file_io.join(folder, record), data)
        _, text = show_status(tmp_path, as_json=True)
        states = {row["model"]: row["state"] for row in json.loads(text)}
        assert states["whole"] == "finished"
        assert len(states) == 2


@pytest.mark.parametrize(
    "values", ['{"train/epoch":"nan"}', '{"train/epoch":[1]}', '{"samples_per_epoch":"inf"}', "[]"]
)
@pytest.mark.parametrize("kind", ["started", "epoch", "metrics", "crashed", "incident", "finished"])
def test_no_strange_event_hides_the_others(kind: str, values: str, tmp_path: Path) -> None:
    whole_run(tmp_path, "whole")
    folder = whole_run(tmp_path, "strange")
    file_io.remove(file_io.join(folder, "outcome.json"))
    for samples in ("500", '"x"', "null", "1e300"):
        line = f'{{"events":1}}\n{{"kind":"{kind}","time":1,"samples":{samples},"values":{values}}}\n'
        file_io.write_bytes(file_io.join(folder, "journal", "000001-000001.jsonl"), line.encode())
        journal_summary._read_segment.cache_clear()
        _, text = show_status(tmp_path, as_json=True)
        assert {row["model"] for row in json.loads(text)} == {"whole", "strange"}


@pytest.mark.parametrize(
    "record", [*DAMAGED, b'{"members": ["a"], "recipes": null}', b'{"members": ["a"], "recipes": {"a": 1}}']
)
def test_a_damaged_ensemble_is_shown_with_its_file_beside_the_others(record: bytes, tmp_path: Path) -> None:
    whole_run(tmp_path, "whole")
    folder = drivers.ensemble(str(tmp_path), "net-x2", [])
    file_io.write_bytes(file_io.join(folder, "ensemble.json"), record)
    code, text = show_status(tmp_path, as_json=True)
    rows = json.loads(text)
    assert "whole" in {row["model"] for row in rows}
    if b"recipes" not in record:
        assert code == 1
        (row,) = [row for row in rows if row["state"] == "unreadable"]
        assert f"{folder}/ensemble.json: cannot be read" in row["message"]


def test_a_damaged_ledger_of_a_sweep_hides_no_run(tmp_path: Path) -> None:
    whole_run(tmp_path, "whole")
    folder = drivers.sweep(str(tmp_path), "net-sweep")
    one = spec(recipe("net-t1"), folder)
    drivers.trial(folder, 1, one, "finished")
    drivers.lease(folder, beat=0, released=b"")
    for name in ("sweep.json", "trials/0001.json", "trials/0001.ended.json", "lease/000001.json"):
        for data in DAMAGED:
            file_io.write_bytes(file_io.join(folder, name), data)
            _, text = show_status(tmp_path, as_json=True)
            assert "whole" in {row["model"] for row in json.loads(text)}


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_run_that_may_not_be_read_hides_no_other(tmp_path: Path) -> None:
    whole_run(tmp_path, "whole")
    folder = whole_run(tmp_path, "secret")
    os.chmod(file_io.join(folder, "spec.json"), 0)
    _, text = show_status(tmp_path, as_json=True)
    assert {row["state"] for row in json.loads(text)} == {"finished", "unreadable"}


def test_a_folder_in_place_of_a_record_hides_no_other_run(tmp_path: Path) -> None:
    whole_run(tmp_path, "whole")
    folder = whole_run(tmp_path, "strange")
    file_io.remove(file_io.join(folder, "spec.json"))
    os.mkdir(file_io.join(folder, "spec.json"))
    code, text = show_status(tmp_path)
    assert code == 1
    assert f"{folder}/spec.json" in text.replace("\n", "")
    assert "finished" in text


@pytest.mark.parametrize("record", ["lease/000001.json", "ensemble.json"])
def test_a_folder_in_place_of_an_ensembles_record_hides_no_other_run(tmp_path: Path, record: str) -> None:
    whole_run(tmp_path, "whole")
    folder = drivers.ensemble(str(tmp_path), "net-x2", [spec(recipe(f"net-m{one}"), str(tmp_path)) for one in (1, 2)])
    drivers.lease(folder, beat=0, released=b"")
    file_io.remove(file_io.join(folder, record))
    os.mkdir(file_io.join(folder, record))
    code, text = show_status(tmp_path, as_json=True)
    rows = {row["state"]: row for row in json.loads(text)}
    assert (code, set(rows)) == (1, {"finished", "unreadable"})
    assert f"{folder}/{record}" in rows["unreadable"]["message"]


def test_an_ensemble_that_is_scored_is_not_over(tmp_path: Path) -> None:
    members = [spec(recipe(f"net-m{number}", epochs=1), str(tmp_path)) for number in (1, 2)]
    folder = drivers.ensemble(str(tmp_path), "net-x2", members)
    for number in (1, 2):
        finished(tmp_path, f"net-m{number}")
    assert [family.is_live for family in status.inspect_groups(run_lookup.find_runs(["net-x2"], str(tmp_path)))] == [
        False
    ]
    drivers.lease(folder, beat=0)
    for record, stage in (
        (None, "preparing scores or the report"),
        ({"shards": 9, "done": 3, "seconds_left": 75.0}, "scoring 3 of 9 shards, about 1:15 left"),
        ({"shards": 9, "done": 0, "seconds_left": None}, "scoring 0 of 9 shards"),
        ({"shards": "many"}, "preparing scores or the report"),
        ({"shards": 9, "done": 9, "seconds_left": 0.0}, "scored, preparing the report"),
    ):
        if record is not None:
            file_io.write_bytes(file_io.join(folder, run_lookup.SCORING_FILE), json.dumps(record).encode())
        (family,) = status.inspect_groups(run_lookup.find_runs(["net-x2"], str(tmp_path)))
        assert family.is_live, "a watch continues"
        assert family.title == f"net-x2: 2 of 2 finished, {stage}"
        rows = json.loads(show_status(tmp_path, "net-x2", as_json=True)[1])
        assert [(row["state"], row["stage"]) for row in rows] == [("finished", stage)] * 2
