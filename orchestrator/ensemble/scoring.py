"""Scores of members over the cluster: only what the store lacks is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from orchestrator.checkpoint import places
from orchestrator.evaluation import score_store
from orchestrator.evaluation.predict import Scorer, ScoreShard, models_by_size, score_shard
from orchestrator.fleet.figures import duration
from orchestrator.launch import pool
from orchestrator.launch.config import RunSpec
from orchestrator.launch.session import Session
from orchestrator.training.job import final_of

SPLIT = "validation"


def score_folder(spec: RunSpec, split: str = SPLIT) -> str:
    """Where a finished run's scores lie. Raises FileNotFoundError when the run has no final weights."""
    digest = places.stored_digest(final_of(spec.folder))
    return score_store.folder(spec.folder, score_store.key(digest, spec.recipe, spec.dataset_digest, split))


def score(session: Session, specs: Sequence[RunSpec], split: str = SPLIT) -> list[str]:
    """Score finished runs on 144 crops of every image; the folders of their scores.

    Each task scores one shard for all models that lack it. Returns early, with less scored, when interrupted.
    Raises launch.pool.TaskError when a task fails.
    """
    folders = [score_folder(spec, split) for spec in specs]
    tasks = _tasks(session, specs, folders, split)
    if not tasks:
        session.say("scoring: every score is stored already")
        return folders
    at_once = session.capacity.bundles(session.placement.cpus_per_worker, session.gpus)
    arguments = [(task.to_dict(),) for task in tasks]
    cpus = session.placement.cpus_per_worker
    began = time.monotonic()
    for done, _ in enumerate(
        pool.run(score_shard, arguments, cpus, session.gpus, at_once, session.interruption.event.is_set), start=1
    ):
        left = (time.monotonic() - began) / done * (len(tasks) - done)
        session.say(f"scoring: {done} of {len(tasks)} shards on 144 crops, {duration(left)} left")
    return folders


def _tasks(session: Session, specs: Sequence[RunSpec], folders: Sequence[str], split: str) -> list[ScoreShard]:
    stored = [score_store.done(folder) for folder in folders]
    tasks = []
    for group in models_by_size([spec.recipe for spec in specs]).values():
        for shard in range(len(session.manifest.shards(split))):
            lacking = [number for number in group if shard not in stored[number]]
            if lacking:
                scorers = tuple(
                    Scorer(final=final_of(specs[number].folder), scores=folders[number]) for number in lacking
                )
                tasks.append(
                    ScoreShard(
                        data=session.destination.data,
                        split=split,
                        shard=shard,
                        scorers=scorers,
                        threads=session.placement.cpus_per_worker,
                        reading=session.placement.reading,
                    )
                )
    return tasks
