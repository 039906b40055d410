"""The job that sweeps, on a real private cluster: killed half-way, submitted again, handed over."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.tracking import journal
from orchestrator.training.run_dir import get_journal_dir
from tests.support.launched import ROOT, Ended, job, process_tree, started, title, until

pytestmark = [pytest.mark.cluster]

# Rates that learn, one that diverges in its first epoch, and one with a run that cannot be written.
SPACE = """
[dimensions."schedule.base_rate"]
values = [0.02, 0.01, 0.005, 0.002, 100.0, 0.001]
"""
ARGUMENTS = (
    *("googlenet-tiny", "--epochs", "4", "--sampler", "grid", "--scheduler", "asha", "--placement.max-restarts", "1"),
)

ACTOR = "ray::ResourceTrainable"  # what Ray Tune makes of a trial's actor with resources


def command(space: Path, *more: str) -> list[str]:
    return [*ARGUMENTS, "--space", str(space), *more]


def sweep_of(runs: Path) -> Path:
    (found,) = (runs / "sweeps").iterdir()
    return found


def epochs_of(run: Path) -> list[int]:
    events, _ = journal.read_events(get_journal_dir(str(run)))
    return [int(str(event.values["train/epoch"]).partition(".")[0]) for event in events if event.kind == "epoch"]


def ends(sweep: Path) -> dict[str, str]:
    return {path.name[:4]: json.loads(path.read_text())["state"] for path in sweep.glob("trials/*.ended.json")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.toml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def before(runs: Path, space: Path) -> dict[str, list[int]]:
    """A driver that was killed when some trials had ended; what each run's journal had by then."""
    # A file where the run of the last trial should be: whatever it does there fails, each time.
    blocked = subprocess.run(
        [sys.executable, "-c", BLOCK, str(runs), *command(space)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "blocked" in blocked.stdout
    with started("tune.py", *command(space), runs=runs) as process:
        until(lambda: process.poll() is not None or len(ends(sweep_of(runs))) >= 2, 180)
        family = process_tree(process.pid)
        assert any(title(pid).startswith(ACTOR) for pid in family)
        process.kill()
        # Its actors notice a moment later.
        until(lambda: not any(title(pid).startswith(ACTOR) for pid in family), 60)
    sweep = sweep_of(runs)
    assert 2 <= len(ends(sweep)) < 6
    return {path.name: epochs_of(path) for path in (sweep / "models").iterdir() if path.is_dir()}


BLOCK = """
import sys
from pathlib import Path
from orchestrator.config.arg_parser import parse_args
from orchestrator.data.build.sources import digits
from orchestrator.data import manifest
from orchestrator.ray_backend.run_spec import RunSpec, build_job_presets
from orchestrator.tuning import run_sweep, named_spaces
from orchestrator.tuning.config import TuneJob
from orchestrator.config.overrides import apply_overrides
from orchestrator.tuning.trial import Trial
runs = Path(sys.argv[1])
config = parse_args("tune.py", "", build_job_presets(TuneJob), "googlenet-digits", sys.argv[2:])
data = runs / "data" / "digits"
digits.pack_digits(str(data))
digest = manifest.load(str(data)).digest()
space = named_spaces.find_space(config.search.space, config.recipe)
plan = run_sweep.SweepPlan(config, config.recipe, space, digest)
sampler = plan.make_sampler()
trials = []
while (found := sampler.suggest(trials)) is not None:
    number = len(trials) + 1
    recipe = apply_overrides(config.recipe, found).model_copy(update={"name": f"{config.recipe.name}-t{number:03d}"})
    trials.append(Trial(number, found, recipe))
destination = config.destination.model_copy(update={"storage": str(runs / "sweeps" / plan.name)})
spec = RunSpec(recipe=trials[-1].recipe, placement=config.placement, destination=destination, dataset_digest=digest)
folder = Path(spec.folder)
folder.mkdir(parents=True)
(folder / "attempts").write_text("in the way")
print("blocked", folder)
"""


@pytest.fixture(scope="module")
def ended(runs: Path, space: Path, before: dict[str, list[int]]) -> Ended:
    """The same command again."""
    return job("tune.py", *command(space), runs=runs)


def test_the_same_command_finishes_what_was_begun(ended: Ended, runs: Path) -> None:
    assert ended.status == 0, ended.err
    assert not [line for line in ended.complaints if "raylet" not in line]
    states = ends(sweep_of(runs))
    assert len(states) == 6
    assert states["0005"] == "diverged"
    assert states["0006"] == "failed"
    assert set(states.values()) <= {"finished", "pruned", "diverged", "failed"}
    assert "finished" in states.values()
    assert "are done already" in ended.out
    # Either driver may have seen these ends; the ledger has them.
    reasons = [
        json.loads((sweep_of(runs) / "trials" / f"{number}.ended.json").read_text())["reason"]
        for number in ("0005", "0006")
    ]
    assert "the loss, or a weight, is not finite" in reasons[0]
    assert "NotADirectoryError" in reasons[1] or "FileExistsError" in reasons[1], "a trial that fails always is named"


def test_no_trial_that_had_ended_is_trained_again(ended: Ended, runs: Path, before: dict[str, list[int]]) -> None:
    sweep = sweep_of(runs)
    for path in (sweep / "models").iterdir():
        epochs = epochs_of(path)
        twice = [epoch for epoch, count in Counter(epochs).items() if count > 1]
        # One under way when the driver died repeats what came after its last checkpoint.
        assert not twice or len(before[path.name]) < len(epochs)
        if path.name in before and (path / "outcome.json").exists() and before[path.name][-1:] == [4]:
            assert epochs == before[path.name]


def test_the_tracker_has_one_parent_and_a_child_for_each_trial(ended: Ended, runs: Path) -> None:
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "googlenet"]
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert [(run.info.run_name, run.info.status) for run in parents] == [(sweep_of(runs).name, "FINISHED")]
    children = {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}
    assert len(found) == 7, "no duplicates after the driver's death"
    states = {name.split("-t")[-1][:3]: run.data.tags["orchestrator.trial"] for name, run in children.items()}
    assert states == {number[1:]: state for number, state in ends(sweep_of(runs)).items()}
    statuses = {run.data.tags["orchestrator.trial"]: run.info.status for run in children.values()}
    expected = {"finished": "FINISHED", "pruned": "FINISHED", "diverged": "FAILED", "failed": "FAILED"}
    assert statuses.items() <= expected.items()
    shown = {one.path for one in client.list_artifacts(parents[0].info.run_id)}
    assert {"report.html", "ranking.md", "winner.json", "sweep.json"} <= shown
    assert "sweep/best_top1_error" in parents[0].data.metrics


def test_rerunning_a_finished_sweep_only_reports(ended: Ended, runs: Path, space: Path) -> None:
    journals = {path: path.stat().st_mtime_ns for path in sweep_of(runs).glob("models/*/journal/*")}
    again = job("tune.py", *command(space), runs=runs)
    assert again.status == 0, again.err
    assert "6 of 6 begun ones are done already" in again.out
    assert {path: path.stat().st_mtime_ns for path in sweep_of(runs).glob("models/*/journal/*")} == journals
    # The command that it prints runs as it stands, in a shell that knows nothing of this storage.
    (line,) = [line for line in again.out.splitlines() if line.startswith("winner:")]
    words = shlex.split(line.partition("; ")[2])
    assert words[:2] == ["python", str(ROOT / "jobs" / "train_ensemble.py")]
    assert words[words.index("--storage") + 1] == str(runs)
    planned = job("train_ensemble.py", *words[2:], "--dry-run", runs=runs / "another")
    assert planned.status == 0, planned.err


def test_the_winner_is_a_recipe_for_the_other_jobs(ended: Ended, runs: Path) -> None:
    winner = sweep_of(runs) / "winner.json"
    winner_file = json.loads(winner.read_text())
    assert winner_file["provenance"]["sweep"] == sweep_of(runs).name
    assert winner_file["recipe"]["name"] == "googlenet-tiny-tuned"
    ranked = json.loads((sweep_of(runs) / "ranking.json").read_text())
    assert ranked["trials"][0]["name"] == ranked["winner"] == winner_file["provenance"]["trial"]
    for script in ("train.py", "train_ensemble.py"):
        planned = job(script, str(winner), "--dry-run", runs=runs)
        assert planned.status == 0, planned.err
        assert "googlenet-tiny-tuned" in planned.out


@pytest.mark.parametrize("way", ["signal", "stop.py"])
def test_a_stop_loses_nothing(tmp_path: Path, space: Path, way: str) -> None:
    with started("tune.py", *command(space), runs=tmp_path) as process:
        until(lambda: process.poll() is not None or list(tmp_path.glob("sweeps/*/models/*/journal/*")), 120)
        if way == "signal":
            process.send_signal(signal.SIGINT)
        else:
            asked = job("stop.py", sweep_of(tmp_path).name, runs=tmp_path)
            assert asked.status == 0, asked.err
        out, _ = process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGINT if way == "signal" else 128 + signal.SIGTERM), out
    assert "stopped; rerun the same command to resume" in out
    sweep = sweep_of(tmp_path)
    runs = {path.name: path for path in (sweep / "models").iterdir()}
    under_way = [path for path in runs.values() if (path / "outcome.json").exists()]
    assert [json.loads((path / "outcome.json").read_text())["status"] for path in under_way].count("stopped") >= 1
    assert not set(ends(sweep).values()) - {"finished", "pruned", "diverged"}, "stopped trials can resume"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {run.info.run_name: run.info.status for run in found}[sweep.name] == "KILLED"
    assert not [run for run in found if run.info.status == "RUNNING"]


@pytest.mark.parametrize(
    ("more", "states"),
    [
        # Each on both CPUs of the cluster: the trials' own processes must need none, or no worker would ever begin.
        (("--placement.workers", "2", "--scheduler", "none", "--budget.trials", "2"), ["finished", "finished"]),
        # The first trials have no others to be compared with; none waits, and the last is worse than the median.
        (("--scheduler", "median", "--budget.trials", "5"), ["finished"] * 4 + ["diverged"]),
    ],
    ids=["two-workers", "median"],
)
def test_other_ways(tmp_path: Path, space: Path, more: tuple[str, ...], states: list[str]) -> None:
    done = job("tune.py", *command(space), *more, runs=tmp_path)
    assert done.status == 0, done.err
    assert done.complaints == []
    found = [state for _, state in sorted(ends(sweep_of(tmp_path)).items())]
    assert [state if state != "pruned" else "finished" for state in found] == states


def test_a_trial_of_several_workers_goes_on_when_its_actor_is_killed(tmp_path: Path, space: Path) -> None:
    more = ("--placement.workers", "2", "--scheduler", "none", "--budget.trials", "1", "--epochs", "12")
    with started("tune.py", *command(space), *more, runs=tmp_path) as process:

        def trained() -> bool:
            return any(epochs_of(path) for path in tmp_path.glob("sweeps/*/models/*"))

        until(lambda: process.poll() is not None or trained(), 120)
        # What its workers had reserved is all that the cluster has.
        (actor,) = [pid for pid in process_tree(process.pid) if title(pid).startswith(ACTOR)]
        os.kill(actor, signal.SIGKILL)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    sweep = sweep_of(tmp_path)
    assert ends(sweep) == {"0001": "finished"}
    (run,) = (sweep / "models").iterdir()
    assert epochs_of(run)[-1] == 12
    assert job("audit.py", str(run), runs=tmp_path).status == 0


def test_a_metric_plug_in_ranks_the_trials(tmp_path: Path, space: Path) -> None:
    metrics = json.dumps([{"kind": "tests.support.plugin_metrics:Accuracy"}])
    more = ("--metric", "accuracy", "--mode", "max", "--placement.execution.metrics", metrics, "--scheduler", "none")
    done = job("tune.py", *command(space), *more, "--budget.trials", "3", runs=tmp_path, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.err + done.out
    ranked = json.loads((sweep_of(tmp_path) / "ranking.json").read_text())
    scores = [trial["accuracy"] for trial in ranked["trials"]]
    assert ranked["metric"] == "accuracy"
    assert scores == sorted(scores, reverse=True)
    assert 0.0 < scores[0] <= 1.0
    provenance = json.loads((sweep_of(tmp_path) / "winner.json").read_text())["provenance"]
    assert (provenance["metric"], provenance["score"]) == ("accuracy", scores[0])


def test_more_at_once_than_the_cluster_holds(tmp_path: Path, space: Path) -> None:
    done = job("tune.py", *command(space), "--placement.at-once", "99", runs=tmp_path)
    assert done.status == 1
    assert "placement.at_once must be at most" in done.err
    assert not (tmp_path / "sweeps").exists(), "refused before anything is written"
