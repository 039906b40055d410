"""The main job as a person runs it: a real Ray, real training, sqlite MLflow; and what it survives."""

import os
import pty
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.ensemble import members
from orchestrator.ensemble.members import EnsembleConfig
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.recipe.presets import googlenet_tiny
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training import train_state as states
from orchestrator.training.run_dir import get_checkpoints_dir, get_journal_dir
from tests.support import tiny_shards
from tests.support.launched import ROOT, job, process_tree, started, title, until

pytestmark = [pytest.mark.cluster]

# A deadlock shows as a time-out; how long it takes is for the benchmarks, and the machine may be busy.
SECONDS = 400.0
ROWS = ["1 1", "1 10", "1 144", "2 1", "2 10", "2 144"]


# ------------------------------------------------------------------ looking at what came of it
def table_rows(text: str) -> list[str]:
    """The lines of the table: below its rule, up to the line that counts the models."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("models crops")) + 2
    last = next(number for number, line in enumerate(lines) if " models, " in line and " images; " in line)
    return lines[first:last]


def cells(text: str) -> list[str]:
    return [" ".join(row.split()[:2]) for row in table_rows(text)]


def models(runs: Path) -> list[Path]:
    return sorted((runs / "models").iterdir())


def events(model: Path) -> list[Event]:
    return journal.read_events(get_journal_dir(str(model)))[0]


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def recorded(runs: Path) -> tuple[list[Run], list[Run]]:
    """Parents and children in the job's MLflow database."""
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("googlenet")
    assert experiment is not None
    found = list(client.search_runs([experiment.experiment_id]))
    children = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    parents = [run for run in found if run not in children]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {run.info.run_id for run in parents}
    return parents, children


def statuses(found: Sequence[Run]) -> list[str]:
    return sorted(str(run.info.status) for run in found)


# ------------------------------------------------------------------ a small dataset and a job under way
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noisy waves: 512 for training, 12 held out."""
    folder = tmp_path_factory.mktemp("tiny") / "data"

    def some(count: int, first: int) -> list[RawSample]:
        return [RawSample(f"sample-{n:04d}", tiny_shards.jpeg(n, 48, 48), n % 3) for n in range(first, first + count)]

    write_dataset(str(folder), "tiny", tiny_shards.CLASSES, {"train": some(512, 0), "validation": some(12, 600)}, 64)
    return folder


def checkpoints(runs: Path) -> list[Path]:
    return [path.parent for path in runs.glob("models/*/checkpoints/*/DONE")]


# ------------------------------------------------------------------ the tests
@pytest.mark.essential
def test_the_main_job_then_the_same_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    arguments = ("googlenet-tiny", "--ensemble.members", "2")
    first = job("train_ensemble.py", *arguments, runs=runs, seconds=SECONDS)
    assert first.status == 0, first.out + first.err
    assert cells(first.out) == ROWS
    assert "2 of 2 models, 360 images" in first.out
    assert [path.name.rsplit("-", 1)[0] for path in models(runs)] == ["googlenet-tiny-m1", "googlenet-tiny-m2-wide"]
    kinds = [[event.kind for event in events(model)] for model in models(runs)]
    assert [(run[0], run[-1], run.count("epoch")) for run in kinds] == [("started", "finished", 2)] * 2
    (ensemble,) = (runs / "ensembles").iterdir()
    assert "\n".join(table_rows(first.out)) in (ensemble / "table.txt").read_text()
    assert f"results: {ensemble}" in first.out

    parents, children = recorded(runs)
    assert (statuses(parents), statuses(children)) == (["FINISHED"], ["FINISHED"] * 2)
    assert parents[0].data.params["members"] == "2"
    assert parents[0].info.run_id in first.out
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    artifacts = {found.path for found in client.list_artifacts(parents[0].info.run_id)}
    assert artifacts >= {"table3.json", "table.md", "table.png", "curves.png", "ensemble.json"}
    for child in children:
        for name in ("train/loss", "validation/raw_top1_error", "validation/averaged_top5_error", "train/rate"):
            assert len(client.get_metric_history(child.info.run_id, name)) >= 1
        steps = [point.step for point in client.get_metric_history(child.info.run_id, "train/loss")]
        assert steps == [1408, 2816]  # 22 whole batches of 64 in 1,437 digits
    shown = {float(np.round(parents[0].data.metrics[f"ensemble/top1_error_{cell}"], 2)) for cell in ("1x1", "2x144")}
    assert shown == {float(table_rows(first.out)[row].split()[3]) for row in (0, 5)}

    before = {model: tree(model) for model in models(runs)}
    second = job("train_ensemble.py", *arguments, runs=runs, seconds=SECONDS)
    assert second.status == 0, second.out + second.err
    assert table_rows(second.out) == table_rows(first.out)
    assert "2 of 2 models are trained already" in second.out
    assert "every score is stored already" in second.out
    assert {model: tree(model) for model in models(runs)} == before
    parents_again, children_again = recorded(runs)
    assert {run.info.run_id for run in parents_again} == {run.info.run_id for run in parents}
    assert {run.info.run_id for run in children_again} == {run.info.run_id for run in children}
    assert (statuses(parents_again), statuses(children_again)) == (["FINISHED"], ["FINISHED"] * 2)
    for child in children_again:
        assert len(client.get_metric_history(child.info.run_id, "train/loss")) == 2

    # Part of it by its path, without --data: a result of its own, and no second run of the member.
    part = job("evaluate.py", str(ensemble), "--members", "2", runs=runs, seconds=SECONDS)
    assert part.status == 0, part.out + part.err
    assert cells(part.out) == ROWS[:3]
    parents_now, children_now = recorded(runs)
    assert {run.info.run_id for run in children_now} == {run.info.run_id for run in children}
    (evaluated,) = [run for run in parents_now if run.info.run_id not in {one.info.run_id for one in parents}]
    assert evaluated.data.tags["orchestrator.members"] == models(runs)[1].name


def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path, tiny: Path) -> None:
    runs = tmp_path / "runs"
    with started(
        "train_ensemble.py", "googlenet-tiny", "--ensemble.members", "2", "--ensemble.wider", "1", "--data", str(tiny),
        "--epochs", "150", "--cadence.checkpoint-seconds", "0.5", runs=runs,
    ) as process:  # fmt: skip
        # Both have one, so whichever is killed has something to resume from.
        until(lambda: len({path.parent for path in checkpoints(runs)}) == 2 or process.poll() is not None, SECONDS)
        workers = [pid for pid in process_tree(process.pid) if "RayTrainWorker" in title(pid)]
        assert workers, [title(pid) for pid in process_tree(process.pid)]
        os.kill(workers[0], signal.SIGKILL)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out
    assert cells(out) == ROWS
    assert "RESTARTED" in out
    kinds = {model.name: [event.kind for event in events(model)] for model in models(runs)}
    hit = [run for run in kinds.values() if "incident" in run]
    assert len(hit) == 1, kinds
    assert hit[0].count("started") == 2
    assert hit[0].index("incident") < len(hit[0]) - 1 - hit[0][::-1].index("started")
    (other,) = (run for run in kinds.values() if "incident" not in run)
    assert other.count("started") == 1  # the other member never noticed
    restarted = next(model for model in models(runs) if "incident" in kinds[model.name])
    resumed = [event.values["resumed"] for event in events(restarted) if event.kind == "started"]
    assert resumed == [False, True]
    assert len(list((restarted / "attempts").glob("0*.json"))) == 2
    parents, children = recorded(runs)
    assert (statuses(parents), statuses(children)) == (["FINISHED"], ["FINISHED"] * 2)
    assert sorted(child.data.tags.get("orchestrator.incidents", "0") for child in children) == ["0", "1"]


def test_a_member_that_diverges_leaves_a_partial_ensemble(tmp_path: Path, tiny: Path) -> None:
    runs = tmp_path / "runs"
    arguments = ("googlenet-tiny", "--ensemble.members", "3", "--ensemble.wider", "1", "--data", str(tiny))
    _, second, _ = members.build_recipes(googlenet_tiny(), EnsembleConfig(members=3, wider=1.0))
    destination = Destination(data=str(tiny), storage=str(runs)).resolve()
    digest = manifest.load(str(tiny)).digest()
    spec = RunSpec(recipe=second, placement=Placement(), destination=destination, dataset_digest=digest)
    # It resumes from huge weights, which give a loss that is not finite.
    begun = states.create_initial_state(second, 3, 512 // second.batch_size, torch.device("cpu"))
    heads = tuple(f"{name}." for name in begun.model.get_classifiers())
    state = begun.snapshot()
    for name, tensor in state["model"].items():
        if name.startswith(heads):
            tensor.fill_(3e38)
    first = second.batch_size
    checkpoints_in = get_checkpoints_dir(spec.folder)
    checkpoint_format.save(checkpoints_in, {**state, "samples": first, "recipe": second.to_dict()}, first, 0)

    done = job("train_ensemble.py", *arguments, runs=runs, seconds=SECONDS)
    assert done.status == 1
    assert "PARTIAL: 2 of 3 models finished" in done.out
    assert "2 of 3 models, 12 images" in done.out
    assert "diverged: the loss, or a weight, is not finite" in done.out
    parents, children = recorded(runs)
    assert (statuses(parents), statuses(children)) == (["FAILED"], ["FAILED", "FINISHED", "FINISHED"])
    allowed = job("train_ensemble.py", *arguments, "--allow-partial", runs=runs, seconds=SECONDS)
    assert allowed.status == 0, allowed.out + allowed.err
    assert "PARTIAL: 2 of 3 models finished" in allowed.out


def test_ctrl_c_stops_and_the_same_command_resumes(tmp_path: Path, tiny: Path) -> None:
    runs = tmp_path / "runs"
    arguments = (
        "googlenet-tiny", "--ensemble.members", "1", "--data", str(tiny), "--epochs", "30",
        "--cadence.checkpoint-seconds", "1", "--cadence.pulse-steps", "2", "--cadence.validate-epochs", "30",
    )  # fmt: skip
    with started("train_ensemble.py", *arguments, runs=runs) as process:
        until(lambda: checkpoints(runs) or process.poll() is not None, SECONDS)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, out
    assert "rerun the same command to resume" in out
    assert "Traceback" not in out
    parents, children = recorded(runs)
    assert (statuses(parents), statuses(children)) == (["KILLED"], ["KILLED"])
    (model,) = models(runs)
    stopped = events(model)[-1]
    assert stopped.kind == "stopped"

    again = job("train_ensemble.py", *arguments, runs=runs, seconds=SECONDS)
    assert again.status == 0, again.out + again.err
    assert cells(again.out) == ROWS[:3]
    begins = [event for event in events(model) if event.kind == "started"]
    assert [event.values["resumed"] for event in begins] == [False, True]
    assert begins[1].samples == stopped.samples  # nothing was lost
    assert "incident" not in [event.kind for event in events(model)]
    parents, children = recorded(runs)
    assert (statuses(parents), statuses(children)) == (["FINISHED"], ["FINISHED"])


def test_a_closed_terminal_costs_no_work(tmp_path: Path, tiny: Path) -> None:
    runs = tmp_path / "runs"
    command = [
        sys.executable, str(ROOT / "jobs" / "train.py"), "googlenet-tiny", "--data", str(tiny), "--epochs", "1000",
        "--cadence.checkpoint-seconds", "600", "--cadence.validate-epochs", "1000",
    ]  # fmt: skip
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, {**os.environ, "ORCHESTRATOR_RUNS": str(runs)})
    os.set_blocking(terminal, False)

    def trains() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 65536)  # a full terminal would hold up the job
        return any(event.kind == "epoch" for path in runs.glob("models/*") for event in events(path))

    until(trains, SECONDS)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    (model,) = models(runs)
    assert events(model)[-1].kind == "stopped"
    assert len(checkpoints(runs)) == 1
    assert [run.info.status for run in [*recorded(runs)[0], *recorded(runs)[1]]] == ["KILLED"]
