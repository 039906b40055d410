"""Scoring over a cluster: what is sent, what is said, what is done again; and what it survives on a real one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import weights
from orchestrator.checkpoint.checkpoint_dir import make_checkpoint_url
from orchestrator.config.errors import ConfigError
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.ensemble import scoring
from orchestrator.ensemble.scoring import WeightsKind
from orchestrator.evaluation import score_store, shard_scorer
from orchestrator.evaluation.scoring_task import ScoringTarget, ShardScoringTask
from orchestrator.ray_backend import task_pool
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.config import Recipe
from orchestrator.training.callbacks import best_checkpoint
from orchestrator.training.run_dir import get_best_weights_dir
from tests.support import finals, stores, tiny_shards
from tests.support.launched import ROOT, ended_with, process_tree, title, until
from tests.support.sessions import said, session

SHARDS, PER_SHARD = 3, 2


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A dataset of 5 images in 3 shards, the fourth of which is broken."""
    samples = tiny_shards.samples(5)
    samples[3] = RawSample(samples[3].key, b"nothing", 0)
    write_dataset(str(tmp_path / "data"), "tiny", tiny_shards.CLASSES, {"validation": samples}, PER_SHARD)
    return tmp_path


def finished(at: Session, *recipes: Recipe) -> list[RunSpec]:
    """Finished runs of these recipes: each has final weights of its own."""
    found = []
    for seed, recipe in enumerate(recipes):
        spec = RunSpec(
            recipe=recipe, placement=at.placement, destination=at.destination, dataset_digest=at.manifest.digest()
        )
        finals.save(Path(spec.folder), recipe, at.manifest.classes, seed)
        found.append(spec)
    return found


Sent = list[ShardScoringTask]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """The tasks that were sent, to a pool that is this process."""
    tasks: Sent = []

    def run(
        function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], cpus: float, gpus: float, at_once: int,
        stop: Callable[[], bool],
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        assert at_once == 2
        for number, argument in enumerate(arguments):
            if stop():
                return
            tasks.append(ShardScoringTask.from_dict(argument[0]))
            yield number, function(*argument)

    monkeypatch.setattr(task_pool, "run_tasks", run)
    return tasks


def score_runs(at: Session, specs: Sequence[RunSpec], kind: WeightsKind = "averaged") -> list[str]:
    """Score one kind of weights; return the folders of the scores."""
    return list(scoring.score_runs(at, specs, kind).values())


def get_score_folder(spec: RunSpec, kind: WeightsKind = "averaged", digest: str = "") -> str:
    """Return where the scores of a run's weights are stored."""
    identity = scoring.find_weights(spec, kind).identity
    key = score_store.compute_key(identity, spec.recipe, digest or spec.dataset_digest, scoring.SCORED_SPLIT)
    return f"{spec.folder}/scores/{key}"


def names(task: ShardScoringTask) -> list[str]:
    return [scorer.name.rpartition("-")[0] for scorer in task.scorers]


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ what is sent
def test_a_task_is_a_shard_for_all_models_of_a_size(runs: Path, sent: Sent) -> None:
    at = session(runs)
    specs = finished(at, finals.small(16, name="a"), finals.small(24, name="b"), finals.small(16, name="c"))
    folders = score_runs(at, specs)
    assert folders == [get_score_folder(spec) for spec in specs]
    assert [stores.list_scored_shards(folder) for folder in folders] == [{0, 1, 2}] * 3
    # The last shard has one image, and the longest tasks go first.
    assert [(task.shard, names(task)) for task in sent] == [
        (0, ["a", "c"]), (1, ["a", "c"]), (0, ["b"]), (1, ["b"]), (2, ["a", "c"]), (2, ["b"])
    ]  # fmt: skip
    lines = said(at)
    assert "scoring: 15 images x models to do, of 3 models, each on 144 crops" in lines
    assert "scoring: 15 of 15 images x models, 0:00 left" in lines
    assert lines.count("cannot be decoded, not counted: 'sample-003' of ") == 1


def test_only_missing_scores_of_members_are_computed(runs: Path, sent: Sent) -> None:
    at = session(runs)
    specs = finished(at, *(finals.small(name=name) for name in "abc"))
    score_runs(at, specs[:2])
    before = tree(runs)
    sent.clear()
    assert len(score_runs(at, specs[:2])) == 2
    assert "every score is stored already" in said(at)
    assert sent == []
    assert tree(runs) == before
    score_runs(at, [specs[2], *specs[:2]])
    assert [names(task) for task in sent] == [["c"]] * SHARDS
    assert tree(runs).items() >= before.items()
    # And when one member's scores are taken away, that one's.
    sent.clear()
    shutil.rmtree(get_score_folder(specs[1]))
    score_runs(at, specs)
    assert [names(task) for task in sent] == [["b"]] * SHARDS


def test_no_members_are_no_tasks(runs: Path, sent: Sent) -> None:
    assert score_runs(session(runs), []) == []
    assert sent == []


def test_tasks_are_split_to_fit_their_memory(runs: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_TASK_BYTES", 2 * 2 * 8 * 3 * PER_SHARD)  # two models' of a whole shard
    at = session(runs)
    score_runs(at, finished(at, *(finals.small(name=name) for name in "abc")))
    assert sorted((task.shard, names(task)) for task in sent) == [
        (0, ["a", "b"]), (0, ["c"]), (1, ["a", "b"]), (1, ["c"]), (2, ["a", "b", "c"])
    ]  # fmt: skip


def test_models_are_split_over_idle_slots(runs: Path, sent: Sent) -> None:
    at = session(runs)
    specs = finished(at, *(finals.small(name=name) for name in "abc"))
    score_runs(at, specs)
    for spec in specs:
        shutil.rmtree(one_part(spec, 1))
    sent.clear()
    score_runs(at, specs)
    assert [(task.shard, names(task)) for task in sent] == [(1, ["a", "b"]), (1, ["c"])]


def test_an_interruption_ends_scoring_early(runs: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    at = session(runs)
    (spec,) = finished(at, finals.small())

    def stopped_after_one(raw: dict[str, Any]) -> list[str]:
        at.interruption.event.set()
        return shard_scorer.score_shard(raw)

    monkeypatch.setattr(scoring, "_make_task_function", lambda: stopped_after_one)
    score_runs(at, [spec])
    assert len(sent) == 1
    assert len(stores.list_scored_shards(get_score_folder(spec))) == 1


class CountedTasks(list[ShardScoringTask]):
    """Tasks that count how often all of them are gone through."""

    passes = 0

    def __iter__(self) -> Iterator[ShardScoringTask]:
        self.passes += 1
        return super().__iter__()


def test_progress_is_of_whole_shards_and_costs_no_pass_over_the_tasks(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = session(runs)
    tasks = CountedTasks(
        ShardScoringTask(
            data="d",
            split="validation",
            shard=shard,
            threads=1,
            scorers=(ScoringTarget(name=name, weights="w", digest="d", scores="s"),),
        )
        for name in map(str, range(200))
        for shard in (0, 1, 2)
    )
    found = []

    def run(_: object, arguments: Sequence[object], *rest: object) -> Iterator[tuple[int, list[str]]]:
        for number in range(len(arguments)):
            yield number, []
            found.append(json.loads((runs / "scoring.json").read_text()))

    monkeypatch.setattr(task_pool, "run_tasks", run)
    monkeypatch.setattr(scoring, "PROGRESS_SECONDS", 0.0)
    scoring._run_tasks(at, tasks, str(runs))
    assert {one["shards"] for one in found} == {3}
    assert [one["done"] for one in found] == [0] * 597 + [1, 2, 3]
    assert found[-1]["seconds_left"] == 0
    assert tasks.passes < 10


# ------------------------------------------------------------------ what is not believed
def one_part(spec: RunSpec, shard: int) -> Path:
    return Path(get_score_folder(spec)) / f"shard-{shard:06d}"


def flip(spec: RunSpec) -> None:
    tiny_shards.flip_byte(one_part(spec, 1) / "scores.npz", 300)


def truncate(spec: RunSpec) -> None:
    data = (one_part(spec, 1) / "scores.npz").read_bytes()
    (one_part(spec, 1) / "scores.npz").write_bytes(data[:-20])


def lose(spec: RunSpec) -> None:
    (one_part(spec, 1) / "scores.npz").unlink()


def spoil_its_word(spec: RunSpec) -> None:
    (one_part(spec, 1) / "DONE").write_bytes(b"{")


def another_shard(spec: RunSpec) -> None:
    shutil.rmtree(one_part(spec, 1))
    shutil.copytree(one_part(spec, 0), one_part(spec, 1))


def other_images(spec: RunSpec) -> None:
    stores.save_shard(get_score_folder(spec), 1, score_store.load_shard(get_score_folder(spec), 0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip, "damaged"),
        (truncate, "damaged"),
        (lose, "missing although DONE lists it"),
        (spoil_its_word, "unreadable"),
        (another_shard, "its shard is 0, not 1: it belongs elsewhere"),
        (other_images, "2 images, which are not those 2 .. 3 of the split"),
    ],
)
def test_a_damaged_part_is_scored_again(runs: Path, sent: Sent, spoil: Callable[[RunSpec], None], message: str) -> None:
    at = session(runs)
    first, second = finished(at, finals.small(name="a"), finals.small(name="b"))
    score_runs(at, [first, second])
    before = score_store.load_shard(get_score_folder(first), 1)
    sent.clear()
    spoil(first)
    score_runs(at, [first, second])
    assert [(task.shard, names(task)) for task in sent] == [(1, ["a"])]
    (line,) = [line for line in said(at).splitlines() if "is scored again" in line]
    assert line.startswith(f"scoring: {first.name}: shard 1 is scored again: ")
    assert message in line
    assert (score_store.load_shard(get_score_folder(first), 1).rows == before.rows).all()
    sent.clear()
    score_runs(at, [first, second])
    assert sent == []


def test_scores_of_other_weights_are_computed_again(runs: Path, sent: Sent) -> None:
    at = session(runs)
    first, second = finished(at, finals.small(name="a"), finals.small(name="b"))
    score_runs(at, [first, second])
    shutil.rmtree(one_part(first, 0))
    shutil.copytree(one_part(second, 0), one_part(first, 0))
    with pytest.raises(ValueError, match="its key is"):
        score_store.load_shard(get_score_folder(first), 0)
    sent.clear()
    score_runs(at, [first, second])
    assert [(task.shard, names(task)) for task in sent] == [(0, ["a"])]


# ------------------------------------------------------------------ what is rejected
def test_scores_of_another_dataset_are_stored_separately(runs: Path, sent: Sent) -> None:
    at = session(runs)
    (own,) = finished(at, finals.small(name="a"))
    other = own.model_copy(update={"dataset_digest": "fedcba9876543210"})
    finals.save(Path(other.folder), other.recipe, at.manifest.classes, 0)
    (folder,) = score_runs(at, [other])
    assert folder == get_score_folder(other, digest=at.manifest.digest())
    assert folder != get_score_folder(other)
    assert stores.list_scored_shards(folder) == {0, 1, 2}
    count = len(sent)
    assert score_runs(at, [other]) == [folder]
    assert len(sent) == count  # what is stored is found again


@pytest.mark.parametrize("kind", ["averaged", "raw", "best"])
def test_a_run_without_such_weights_is_named(runs: Path, sent: Sent, kind: scoring.WeightsKind) -> None:
    at = session(runs)
    (spec,) = finished(at, finals.small())
    shutil.rmtree(Path(spec.folder) / "final")
    with pytest.raises(ConfigError, match=f"{spec.name}: has no "):
        score_runs(at, [spec], kind=kind)


# ------------------------------------------------------------------ averaged, raw, best
def keep_best(spec: RunSpec, metric: str, classes: tuple[str, ...], seed: int) -> str:
    """Weights of the best validation, as training keeps them."""
    final, _ = finals.save(Path(spec.folder) / "spare", spec.recipe, classes, seed)
    loaded = weights.load(final)
    url = make_checkpoint_url(get_best_weights_dir(spec.folder), 64, 1)
    about = {"samples": 64, metric: 0.5}
    weights.save(url, loaded.averaged, loaded.raw, spec.recipe.to_dict(), classes, metadata=about)
    return url


def test_kinds_of_weights_are_stored_separately(runs: Path, sent: Sent) -> None:
    at = session(runs)
    (spec,) = finished(at, finals.small())
    url = keep_best(spec, best_checkpoint.MONITORED_METRICS[0], at.manifest.classes, seed=5)
    folders = [score_runs(at, [spec], kind=kind)[0] for kind in ("averaged", "raw", "best")]
    assert len(set(folders)) == 3
    assert all(folder.startswith(spec.folder + "/scores/") for folder in folders)
    found = [(task.scorers[0].weights, task.scorers[0].which) for task in sent[::SHARDS]]
    assert found == [(f"{spec.folder}/final", "averaged"), (f"{spec.folder}/final", "raw"), (url, "averaged")]
    scores = [score_store.load_shard(folder, 0).rows for folder in folders]
    assert not any((one == other).all() for one, other in ((scores[0], scores[1]), (scores[0], scores[2])))


def test_the_best_before_there_is_an_average_are_the_raw_weights(runs: Path) -> None:
    at = session(runs)
    (spec,) = finished(at, finals.small())
    url = keep_best(spec, best_checkpoint.MONITORED_METRICS[1], at.manifest.classes, seed=5)
    found = scoring.find_weights(spec, "best")
    assert (found.url, found.which) == (url, "raw")
    assert found.identity == f"{found.digest}-raw"


def test_the_driver_needs_no_torch_to_send_tasks() -> None:
    code = "import sys, orchestrator.ensemble.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0


# ------------------------------------------------------------------ on a cluster
@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Shards that take a second or two each."""
    samples = [RawSample(f"sample-{n:03d}", tiny_shards.jpeg(n, 60, 40), n % 3) for n in range(120)]
    write_dataset(str(tmp_path / "data"), "tiny", tiny_shards.CLASSES, {"validation": samples}, 20)
    at = session(tmp_path)
    specs = finished(at, finals.small(48, 0.25, "a"), finals.small(48, 0.25, "b"))
    (tmp_path / "specs.json").write_text(json.dumps([spec.to_dict() for spec in specs]))
    return tmp_path


DRIVER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from orchestrator.ray_backend import cluster, signals
from orchestrator.ray_backend.run_spec import RunSpec
from tests.ensemble.test_scoring import score_runs, session
runs = Path(sys.argv[1])
specs = [RunSpec.from_dict(one) for one in json.loads((runs / "specs.json").read_text())]
with cluster.connect_cluster(), signals.catch_stop_signals() as interruption:
    at = replace(session(runs), interruption=interruption, console=Console(file=sys.stdout, width=10_000))
    score_runs(at, specs)
    print("ENDED", flush=True)
"""


@contextmanager
def driver(runs: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(runs)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    with ended_with(process):
        yield process


def committed(runs: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in runs.glob("models/*/scores/*/*/DONE")}


def a_task_of(driving: "subprocess.Popen[str]") -> int:
    """A process that scores something at this moment: in between they are called otherwise."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and driving.poll() is None:
        for pid in process_tree(driving.pid):
            if "ray::score_shard" in title(pid):
                return pid
        time.sleep(0.02)
    raise AssertionError(f"no task was seen: {driving.communicate(timeout=60)[0]}")


@pytest.mark.cluster
def test_scoring_resumes_after_a_killed_driver_and_a_killed_task(slow: Path) -> None:
    with driver(slow) as process:
        until(lambda: committed(slow) or process.poll() is not None, 120)
        family = process_tree(process.pid)
        process.kill()
        # Its tasks notice a moment later, and may commit what they had in hand.
        until(lambda: not any(title(pid).startswith(("ray::score_shard", "ray::IDLE")) for pid in family), 60)
    first = committed(slow)
    assert 0 < len(first) < 12
    with driver(slow) as process:
        until(lambda: len(committed(slow)) > len(first) or process.poll() is not None, 120)
        os.kill(a_task_of(process), signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "ENDED" in out
    assert f"scoring: {240 - 20 * len(first)} images x models to do" in out
    last = committed(slow)
    assert len(last) == 12
    assert last.items() >= first.items()


@pytest.mark.cluster
def test_a_signal_stops_scoring_soon(slow: Path) -> None:
    with driver(slow) as process:
        until(lambda: committed(slow) or process.poll() is not None, 120)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert "ENDED" in out
    assert len(committed(slow)) < 12
