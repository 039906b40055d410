"""Scores of members over the cluster: only what the store lacks is computed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.evaluation import score_store
from orchestrator.evaluation.scoring_task import (
    MAX_MODELS_PER_TASK,
    ScoringTarget,
    ShardScoringResult,
    ShardScoringTask,
    WeightsVariant,
)
from orchestrator.monitor.formatting import format_duration
from orchestrator.ray_backend import task_pool
from orchestrator.ray_backend.run_lookup import SCORING_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.storage import commit, file_io
from orchestrator.training.run_dir import get_best_weights_dir, get_final_weights_dir

SCORED_SPLIT = "validation"
# Which weights of a run: the average over the last part of training, those of its last step, or those of the epoch that
# validated best (which are never part of a table: they were chosen on the split that is scored).
WeightsKind = Literal["averaged", "raw", "best"]

# Most that the scores of a task's shard may take in its memory; with more models it is sent several times, for some of
# them each time, and its images are decoded as often.
MAX_TASK_BYTES = 2**30
VERIFY_THREADS = 8  # stored parts that are read at once
PROGRESS_SECONDS = 5.0  # between lines of progress
MAX_SHOWN_BAD_IMAGES = 3


class RunWeights(NamedTuple):
    """Weights of a run, and what identifies them."""

    url: str  # folder of final weights
    which: WeightsVariant  # of the two that lie there
    digest: str  # of the folder's averaged weights

    @property
    def identity(self) -> str:
        """What their scores are stored under."""
        return self.digest if self.which == "averaged" else f"{self.digest}-{self.which}"


def find_weights(spec: RunSpec, kind: WeightsKind = "averaged") -> RunWeights:
    """The weights of a run. Raises ConfigError, naming the run, when it has none of that kind."""
    if kind != "best":
        url = get_final_weights_dir(spec.folder)
        return RunWeights(url, kind, _read_digest(spec, url))
    newest = next(checkpoint_dir.iter_committed_checkpoints(get_best_weights_dir(spec.folder)), None)
    if newest is None:
        raise ConfigError(f"{spec.name}: has no weights of a best validation; leave it out")
    # Written as final weights are; early on, before there is an average, the error is that of the raw ones.
    averaged = "validation/averaged_top1_error" in commit.read_metadata(newest.url)
    return RunWeights(newest.url, "averaged" if averaged else "raw", _read_digest(spec, newest.url))


def _read_digest(spec: RunSpec, url: str) -> str:
    try:
        return checkpoint_dir.read_weights_digest(url)
    except FileNotFoundError:
        shown = redaction.redact(url)
        raise ConfigError(f"{spec.name}: has no final weights: nothing is committed in {shown}; train it on") from None


def get_score_folder(spec: RunSpec, split: str = SCORED_SPLIT, kind: WeightsKind = "averaged", digest: str = "") -> str:
    """Where the scores of a run's weights lie. Raises ConfigError when the run has no such weights.

    digest: of the dataset that is scored; by default the run's own.
    """
    return _make_score_url(spec, split, find_weights(spec, kind), digest or spec.dataset_digest)


def _make_score_url(spec: RunSpec, split: str, weights: RunWeights, digest: str) -> str:
    score_key = score_store.compute_key(weights.identity, spec.recipe, digest, split)
    return score_store.get_folder(spec.folder, score_key)


def score_runs(
    session: Session, specs: Sequence[RunSpec], split: str = SCORED_SPLIT, kind: WeightsKind = "averaged"
) -> list[str]:
    """Score finished runs on 144 crops of every image; the folders of their scores, in the order of `specs`.

    As `score_kinds` does.
    """
    return score_weights_kinds(session, specs, (kind,), split)[0]


def score_weights_kinds(
    session: Session,
    specs: Sequence[RunSpec],
    kinds: Sequence[WeightsKind],
    split: str = SCORED_SPLIT,
    ensemble: str = "",
) -> list[list[str]]:
    """Score several kinds of weights of finished runs, each image decoded and cropped once for all of them.

    The folders of the scores, in the order of `specs`, for each of `kinds`. What is stored is verified; parts that are
    damaged or belong elsewhere are named and scored again. Each task scores one shard for all weights of one size that
    lack it. Returns early, with less scored, when interrupted.
    ensemble: URL of the folder in which to say how far it is, for `status`.
    The dataset is the session's, which need not be the one that a run was trained on; its classes must be.
    Raises ConfigError for a run without such weights, launch.pool.TaskError when a task fails.
    """
    digest = session.manifest.digest()
    scorers = {kind: [_make_scorer(spec, split, kind, digest) for spec in specs] for kind in kinds}
    tasks = _plan_tasks(session, [*specs] * len(kinds), [one for kind in kinds for one in scorers[kind]], split)
    if not session.interruption.event.is_set():
        if tasks:
            _run_tasks(session, tasks, ensemble)
        else:
            session.print_line("scoring: every score is stored already")
    return [[scorer.scores for scorer in scorers[kind]] for kind in kinds]


def _make_scorer(spec: RunSpec, split: str, kind: WeightsKind, digest: str) -> ScoringTarget:
    weights = find_weights(spec, kind)
    folder = _make_score_url(spec, split, weights, digest)
    return ScoringTarget(name=spec.name, weights=weights.url, which=weights.which, digest=weights.digest, scores=folder)


def _write_progress(ensemble: str, tasks: Sequence[ShardScoringTask], ended: Set[int], left: float | None) -> None:
    """Write how far scoring is for `status` to read; a look at a work that goes on must not cost it."""
    shards = {task.shard for task in tasks}
    pending = {task.shard for number, task in enumerate(tasks) if number not in ended}
    told = {"shards": len(shards), "done": len(shards - pending), "seconds_left": left}
    with suppress(OSError):
        if ensemble:
            file_io.write_bytes(file_io.join(ensemble, SCORING_FILE), json.dumps(told).encode())


def _run_tasks(session: Session, tasks: Sequence[ShardScoringTask], ensemble: str) -> None:
    """Have the tasks done, and say how far they are."""
    shards = session.manifest.shards(tasks[0].split)
    work = [shards[task.shard].samples * len(task.scorers) for task in tasks]
    scorers = [scorer for task in tasks for scorer in task.scorers]
    models, kinds = len({scorer.name for scorer in scorers}), sorted({scorer.which for scorer in scorers})
    both = f" with {' and '.join(kinds)} weights" if len(kinds) > 1 else ""
    session.print_line(f"scoring: {sum(work):,} images x models{both} are to do, of {models} models, each on 144 crops")
    done, began, said = 0, time.monotonic(), -PROGRESS_SECONDS
    told: set[int] = set()
    ended: set[int] = set()
    _write_progress(ensemble, tasks, ended, None)
    arguments = [(task.to_dict(),) for task in tasks]
    stop = session.interruption.event.is_set
    cpus = session.placement.cpus_per_worker
    task_function = _make_task_function()
    for number, result in task_pool.run_tasks(
        task_function, arguments, cpus, session.gpus, _count_slots(session), stop
    ):
        done += work[number]
        ended.add(number)
        shard, came = tasks[number].shard, ShardScoringResult.from_dict(result)
        if came.bad and shard not in told:
            told.add(shard)
            rest = f" and {len(came.bad) - MAX_SHOWN_BAD_IMAGES} more" if len(came.bad) > MAX_SHOWN_BAD_IMAGES else ""
            session.print_line(
                f"scoring: cannot be decoded, not counted: {'; '.join(came.bad[:MAX_SHOWN_BAD_IMAGES])}{rest}"
            )
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS or done == sum(work):
            said, left = now, (now - began) / max(1, done) * (sum(work) - done)
            _write_progress(ensemble, tasks, ended, left)
            session.print_line(f"scoring: {done:,} of {sum(work):,} images x models, {format_duration(left)} left")


def _make_task_function() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that scores a shard in another process.

    A nested function is pickled by value, so that a worker does not import this module, which takes a second.
    """

    def score_shard(task: dict[str, Any]) -> dict[str, Any]:
        from orchestrator.evaluation import shard_scorer  # torch is imported in the process of the task alone

        return shard_scorer.score_shard(task)

    return score_shard


def _count_slots(session: Session) -> int:
    """How many tasks run at once."""
    return max(1, session.capacity.count_bundles(session.placement.cpus_per_worker, session.gpus))


def _plan_tasks(
    session: Session, specs: Sequence[RunSpec], scorers: Sequence[ScoringTarget], split: str
) -> list[ShardScoringTask]:
    """What is to be done, largest shards first."""
    lacking = _find_missing_scores(session, list({scorer.scores: scorer for scorer in scorers}.values()), split)
    sizes = {scorer.scores: spec.recipe.model.image_size for scorer, spec in zip(scorers, specs, strict=True)}
    shards, classes = session.manifest.shards(split), len(session.manifest.classes)
    # Fewer shards than slots: the models of a shard are shared out, though its images are then decoded for each.
    shares = -(-_count_slots(session) // max(1, len(lacking)))
    tasks = []
    for shard, wanted in lacking.items():
        each = 2 * score_store.NUM_ROWS * classes * max(1, shards[shard].samples)
        for size in sorted({sizes[scorer.scores] for scorer in wanted}):
            alike = [scorer for scorer in wanted if sizes[scorer.scores] == size]
            most = min(MAX_MODELS_PER_TASK, MAX_TASK_BYTES // each, -(-len(alike) // shares))
            for some in _split_batches(alike, max(1, most)):
                task = ShardScoringTask(
                    data=session.destination.data, split=split, shard=shard, scorers=some,
                    threads=session.placement.cpus_per_worker, reading=session.placement.reading,
                    allow_elsewhere=session.destination.allow_elsewhere,
                )  # fmt: skip
                tasks.append(task)
    # The last ones to end should be short, so that all workers end at about the same time.
    return sorted(tasks, key=lambda task: -shards[task.shard].samples * len(task.scorers))


def _split_batches(scorers: Sequence[ScoringTarget], most: int) -> Iterator[tuple[ScoringTarget, ...]]:
    for start in range(0, len(scorers), most):
        yield tuple(scorers[start : start + most])


def _find_missing_scores(
    session: Session, scorers: Sequence[ScoringTarget], split: str
) -> dict[int, list[ScoringTarget]]:
    """By shard, the models whose scores are not there, or not good, which is said."""
    shards, classes = session.manifest.shards(split), len(session.manifest.classes)
    starts = [sum(shard.samples for shard in shards[:number]) for number in range(len(shards))]

    def look(which: tuple[int, ScoringTarget]) -> str | None:
        number, scorer = which
        if session.interruption.event.is_set():
            return None
        try:
            return score_store.find_problem(scorer.scores, number, starts[number], shards[number].samples, classes)
        except FileNotFoundError:
            return ""

    every = [(number, scorer) for number in range(len(shards)) for scorer in scorers]
    lacking: dict[int, list[ScoringTarget]] = {}
    with ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="scores") as threads:
        for (number, scorer), problem in zip(every, threads.map(look, every), strict=True):
            if problem:
                session.print_line(f"scoring: {scorer.name}: shard {number} is scored again: {problem}")
            if problem is not None:
                lacking.setdefault(number, []).append(scorer)
    return lacking
