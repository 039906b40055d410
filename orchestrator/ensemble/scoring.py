"""Scores of members, computed on the cluster as far as the store lacks them."""

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
from orchestrator.ray_backend import cluster
from orchestrator.ray_backend.run_lookup import SCORING_FILE
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.storage import commit, file_io
from orchestrator.training.run_dir import get_best_weights_dir, get_final_weights_dir

SCORED_SPLIT = "validation"
# The average over the last part of training, the weights of its last step, or those of the epoch that validated best,
# which were chosen on the split that is scored.
WeightsKind = Literal["averaged", "raw", "best"]

# Of the scores of a task's shard in memory. More models are split over several tasks, each of which decodes the images.
MAX_TASK_BYTES = 2**30
VERIFY_THREADS = 8
PROGRESS_SECONDS = 5.0  # between lines of progress
MAX_SHOWN_BAD_IMAGES = 3


class RunWeights(NamedTuple):
    """Weights of a run, and their identity."""

    url: str  # folder of final weights
    which: WeightsVariant  # of the two in the folder
    digest: str  # of the folder's averaged weights

    @property
    def identity(self) -> str:
        """The identity that their scores are stored under."""
        return self.digest if self.which == "averaged" else f"{self.digest}-{self.which}"


def find_weights(spec: RunSpec, kind: WeightsKind = "averaged") -> RunWeights:
    """Return the weights of a run. Raises ConfigError, which names the run, when it has none of that kind."""
    if kind != "best":
        url = get_final_weights_dir(spec.folder)
        return RunWeights(url, kind, _read_digest(spec, url))
    newest = next(checkpoint_dir.iter_committed_checkpoints(get_best_weights_dir(spec.folder)), None)
    if newest is None:
        raise ConfigError(f"{spec.name}: has no weights of a best validation; leave it out")
    # In the form of final weights; before there is an average, the error is that of the raw ones.
    averaged = "validation/averaged_top1_error" in commit.read_metadata(newest.url)
    return RunWeights(newest.url, "averaged" if averaged else "raw", _read_digest(spec, newest.url))


def _read_digest(spec: RunSpec, url: str) -> str:
    try:
        return checkpoint_dir.read_weights_digest(url)
    except FileNotFoundError:
        shown = redaction.redact(url)
        raise ConfigError(f"{spec.name}: has no final weights in {shown}; resume its training") from None


def _make_score_url(spec: RunSpec, split: str, weights: RunWeights, digest: str) -> str:
    score_key = score_store.compute_key(weights.identity, spec.recipe, digest, split)
    return score_store.get_folder(spec.folder, score_key)


def score_weights_kinds(
    session: Session,
    specs: Sequence[RunSpec],
    kinds: Sequence[WeightsKind],
    split: str = SCORED_SPLIT,
    ensemble: str = "",
) -> list[list[str]]:
    """Score several kinds of weights of finished runs on 144 crops, decoding and cropping each image once for all.

    Return the folders of the scores, in the order of `specs`, for each of `kinds`. Stored scores are verified; damaged
    or foreign parts are reported and scored again. Each task scores one shard for all weights of one input size that
    lack it. Returns early, with less scored, when interrupted.
    ensemble: URL of the folder for progress, which `status` reads. The dataset is the session's; it may differ from a
    run's, but not in its classes. Raises ConfigError for a run without such weights, JobError when a task fails.
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
    """Write the progress of scoring for `status`; a failed write must not stop the scoring."""
    shards = {task.shard for task in tasks}
    pending = {task.shard for number, task in enumerate(tasks) if number not in ended}
    progress = {"shards": len(shards), "done": len(shards - pending), "seconds_left": left}
    with suppress(OSError):
        if ensemble:
            file_io.write_bytes(file_io.join(ensemble, SCORING_FILE), json.dumps(progress).encode())


def _run_tasks(session: Session, tasks: Sequence[ShardScoringTask], ensemble: str) -> None:
    """Run the tasks, and print their progress."""
    shards = session.manifest.shards(tasks[0].split)
    work = [shards[task.shard].samples * len(task.scorers) for task in tasks]
    scorers = [scorer for task in tasks for scorer in task.scorers]
    models, kinds = len({scorer.name for scorer in scorers}), sorted({scorer.which for scorer in scorers})
    both = f" with {' and '.join(kinds)} weights" if len(kinds) > 1 else ""
    session.print_line(f"scoring: {sum(work):,} images x models{both} to do, of {models} models, each on 144 crops")
    done, start, last_print = 0, time.monotonic(), -PROGRESS_SECONDS
    reported: set[int] = set()
    ended: set[int] = set()
    _write_progress(ensemble, tasks, ended, None)
    arguments = [(task.to_dict(),) for task in tasks]
    stop = session.interruption.event.is_set
    cpus = session.placement.cpus_per_worker
    task_function = _make_task_function()
    for number, result in cluster.run_tasks(task_function, arguments, cpus, session.gpus, _count_slots(session), stop):
        done += work[number]
        ended.add(number)
        shard, bad = tasks[number].shard, ShardScoringResult.from_dict(result).bad
        if bad and shard not in reported:
            reported.add(shard)
            rest = f" and {len(bad) - MAX_SHOWN_BAD_IMAGES} more" if len(bad) > MAX_SHOWN_BAD_IMAGES else ""
            session.print_line(
                f"scoring: cannot be decoded, not counted: {'; '.join(bad[:MAX_SHOWN_BAD_IMAGES])}{rest}"
            )
        now = time.monotonic()
        if now - last_print >= PROGRESS_SECONDS or done == sum(work):
            last_print, left = now, (now - start) / max(1, done) * (sum(work) - done)
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
    """Return how many tasks run at the same time."""
    return max(1, session.capacity.count_bundles(session.placement.cpus_per_worker, session.gpus))


def _plan_tasks(
    session: Session, specs: Sequence[RunSpec], scorers: Sequence[ScoringTarget], split: str
) -> list[ShardScoringTask]:
    """Return the tasks for missing scores, largest shards first."""
    missing = _find_missing_scores(session, list({scorer.scores: scorer for scorer in scorers}.values()), split)
    sizes = {scorer.scores: spec.recipe.model.image_size for scorer, spec in zip(scorers, specs, strict=True)}
    shards, classes = session.manifest.shards(split), len(session.manifest.classes)
    # With fewer shards than slots the models of a shard are split, although each part decodes its images.
    shares = -(-_count_slots(session) // max(1, len(missing)))
    tasks = []
    for shard, targets in missing.items():
        each = 2 * score_store.NUM_ROWS * classes * max(1, shards[shard].samples)
        for size in sorted({sizes[scorer.scores] for scorer in targets}):
            alike = [scorer for scorer in targets if sizes[scorer.scores] == size]
            most = min(MAX_MODELS_PER_TASK, MAX_TASK_BYTES // each, -(-len(alike) // shares))
            for batch in _split_batches(alike, max(1, most)):
                task = ShardScoringTask(
                    data=session.destination.data, split=split, shard=shard, scorers=batch,
                    threads=session.placement.cpus_per_worker, reading=session.placement.reading,
                    allow_elsewhere=session.destination.allow_elsewhere,
                )  # fmt: skip
                tasks.append(task)
    # Short tasks last, so that all workers end at about the same time.
    return sorted(tasks, key=lambda task: -shards[task.shard].samples * len(task.scorers))


def _split_batches(scorers: Sequence[ScoringTarget], most: int) -> Iterator[tuple[ScoringTarget, ...]]:
    for start in range(0, len(scorers), most):
        yield tuple(scorers[start : start + most])


def _find_missing_scores(
    session: Session, scorers: Sequence[ScoringTarget], split: str
) -> dict[int, list[ScoringTarget]]:
    """Return by shard the models whose scores are missing, or damaged, which is reported."""
    shards, classes = session.manifest.shards(split), len(session.manifest.classes)
    starts = [sum(shard.samples for shard in shards[:number]) for number in range(len(shards))]

    def find_problem(pair: tuple[int, ScoringTarget]) -> str | None:
        number, scorer = pair
        if session.interruption.event.is_set():
            return None
        try:
            return score_store.find_problem(scorer.scores, number, starts[number], shards[number].samples, classes)
        except FileNotFoundError:
            return ""

    pairs = [(number, scorer) for number in range(len(shards)) for scorer in scorers]
    missing: dict[int, list[ScoringTarget]] = {}
    with ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="scores") as threads:
        for (number, scorer), problem in zip(pairs, threads.map(find_problem, pairs), strict=True):
            if problem:
                session.print_line(f"scoring: {scorer.name}: shard {number} is scored again: {problem}")
            if problem is not None:
                missing.setdefault(number, []).append(scorer)
    return missing
