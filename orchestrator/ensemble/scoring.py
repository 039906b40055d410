"""Scores of members, computed on the cluster as far as the store lacks them."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.evaluation import score_store
from orchestrator.evaluation.scoring_task import MAX_MODELS_PER_TASK, ScoringTarget, ShardScoringTask, WeightsVariant
from orchestrator.monitor.formatting import format_duration
from orchestrator.ray_backend import task_pool
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


def score_runs(
    session: Session, specs: Sequence[RunSpec], kind: WeightsKind = "averaged", ensemble: str = ""
) -> dict[str, str]:
    """Score the weights of finished runs on 144 crops, and return the folders of the scores by run.

    Stored scores are verified; damaged or foreign parts are reported and scored again. Each task scores one shard for
    all weights of one input size that lack it. Returns early, with less scored, when interrupted.
    ensemble: URL of the folder for progress, which `status` reads. The dataset is the session's; it may differ from a
    run's, but not in its classes. Raises ConfigError for a run without such weights, TaskError when a task fails.
    """
    scorers = [_make_scorer(spec, kind, session.manifest.digest()) for spec in specs]
    tasks = _plan_tasks(session, specs, scorers)
    if not session.interruption.event.is_set():
        if tasks:
            _run_tasks(session, tasks, ensemble)
        else:
            session.print_line("scoring: every score is stored already")
    return {scorer.name: scorer.scores for scorer in scorers}


def _make_scorer(spec: RunSpec, kind: WeightsKind, digest: str) -> ScoringTarget:
    weights = find_weights(spec, kind)
    score_key = score_store.compute_key(weights.identity, spec.recipe, digest, SCORED_SPLIT)
    folder = file_io.join(spec.folder, "scores", score_key)
    return ScoringTarget(name=spec.name, weights=weights.url, which=weights.which, digest=weights.digest, scores=folder)


def _run_tasks(session: Session, tasks: Sequence[ShardScoringTask], ensemble: str) -> None:
    """Run the tasks, and print their progress."""
    shards = session.manifest.shards(SCORED_SPLIT)
    work = [shards[task.shard].samples * len(task.scorers) for task in tasks]
    models, total = len({scorer.name for task in tasks for scorer in task.scorers}), sum(work)
    pending = Counter(task.shard for task in tasks)
    num_shards = len(pending)
    session.print_line(f"scoring: {total:,} images x models to do, of {models} models, each on 144 crops")
    done, start, last_print = 0, time.monotonic(), -PROGRESS_SECONDS
    reported: set[int] = set()
    _write_progress(ensemble, num_shards, 0, None)
    for number, bad in task_pool.run_tasks(
        _make_task_function(),
        [(task.to_dict(),) for task in tasks],
        session.placement.cpus_per_worker,
        session.gpus,
        _count_slots(session),
        session.interruption.event.is_set,
    ):
        done, shard = done + work[number], tasks[number].shard
        pending[shard] -= 1
        if not pending[shard]:
            del pending[shard]
        if bad and shard not in reported:
            reported.add(shard)
            rest = f" and {len(bad) - MAX_SHOWN_BAD_IMAGES} more" if len(bad) > MAX_SHOWN_BAD_IMAGES else ""
            session.print_line(
                f"scoring: cannot be decoded, not counted: {'; '.join(bad[:MAX_SHOWN_BAD_IMAGES])}{rest}"
            )
        now = time.monotonic()
        if now - last_print >= PROGRESS_SECONDS or done == total:
            last_print, left = now, (now - start) / max(1, done) * (total - done)
            _write_progress(ensemble, num_shards, num_shards - len(pending), left)
            session.print_line(f"scoring: {done:,} of {total:,} images x models, {format_duration(left)} left")


def _write_progress(ensemble: str, shards: int, done: int, left: float | None) -> None:
    """Write the progress of scoring for `status`; a failed write must not stop the scoring."""
    with suppress(OSError):
        if ensemble:
            progress = {"shards": shards, "done": done, "seconds_left": left}
            file_io.write_bytes(file_io.join(ensemble, SCORING_FILE), json.dumps(progress).encode())


def _make_task_function() -> Callable[[dict[str, Any]], list[str]]:
    """Return a function that scores a shard in another process.

    A nested function is pickled by value, so that a worker does not import this module, which takes a second.
    """

    def score_shard(task: dict[str, Any]) -> list[str]:
        from orchestrator.evaluation import shard_scorer  # torch is imported in the process of the task alone

        return shard_scorer.score_shard(task)

    return score_shard


def _count_slots(session: Session) -> int:
    """Return how many tasks run at the same time."""
    return max(1, session.capacity.count_bundles(session.placement.cpus_per_worker, session.gpus))


def _plan_tasks(session: Session, specs: Sequence[RunSpec], scorers: Sequence[ScoringTarget]) -> list[ShardScoringTask]:
    """Return the tasks for missing scores, largest shards first."""
    missing = _find_missing_scores(session, scorers)
    sizes = {scorer.name: spec.recipe.model.image_size for scorer, spec in zip(scorers, specs, strict=True)}
    shards, classes = session.manifest.shards(SCORED_SPLIT), len(session.manifest.classes)
    # With fewer shards than slots the models of a shard are split, although each part decodes its images.
    shares = -(-_count_slots(session) // max(1, len(missing)))
    tasks = []
    for shard, targets in missing.items():
        each = 2 * score_store.NUM_ROWS * classes * max(1, shards[shard].samples)
        for size in sorted({sizes[scorer.name] for scorer in targets}):
            alike = [scorer for scorer in targets if sizes[scorer.name] == size]
            most = max(1, min(MAX_MODELS_PER_TASK, MAX_TASK_BYTES // each, -(-len(alike) // shares)))
            tasks += [
                ShardScoringTask(
                    data=session.destination.data, split=SCORED_SPLIT, shard=shard,
                    scorers=tuple(alike[start : start + most]), threads=session.placement.cpus_per_worker,
                    reading=session.placement.reading, allow_elsewhere=session.destination.allow_elsewhere,
                )
                for start in range(0, len(alike), most)
            ]  # fmt: skip
    # Short tasks last, so that all workers end at about the same time.
    return sorted(tasks, key=lambda task: -shards[task.shard].samples * len(task.scorers))


def _find_missing_scores(session: Session, scorers: Sequence[ScoringTarget]) -> dict[int, list[ScoringTarget]]:
    """Return by shard the models whose scores are missing, or damaged, which is reported."""
    samples = [shard.samples for shard in session.manifest.shards(SCORED_SPLIT)]
    starts, classes = [0, *accumulate(samples)], len(session.manifest.classes)

    def find_problem(pair: tuple[int, ScoringTarget]) -> str | None:
        number, scorer = pair
        if session.interruption.event.is_set():
            return None
        try:
            return score_store.find_problem(scorer.scores, number, starts[number], samples[number], classes)
        except FileNotFoundError:
            return ""

    pairs = [(number, scorer) for number in range(len(samples)) for scorer in scorers]
    missing: dict[int, list[ScoringTarget]] = {}
    with ThreadPoolExecutor(VERIFY_THREADS, thread_name_prefix="scores") as threads:
        for (number, scorer), problem in zip(pairs, threads.map(find_problem, pairs), strict=True):
            if problem:
                session.print_line(f"scoring: {scorer.name}: shard {number} is scored again: {problem}")
            if problem is not None:
                missing.setdefault(number, []).append(scorer)
    return missing
