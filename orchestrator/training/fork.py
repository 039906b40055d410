"""A checkpoint of one run as the first of another, whose recipe says the same up to there and goes on differently.

Nothing is trained twice, and nothing shows in the result: after as many samples the other run would be in this very
state. Its own record of what it was trained on travels with the weights, so that an audit finds every epoch as planned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.prefix import count_shared_epochs, find_differences
from orchestrator.training import attempts
from orchestrator.training.callbacks.checkpointer import PRODUCTIVE_SECONDS_KEY
from orchestrator.training.run_dir import get_checkpoints_dir, get_marks_dir

_log = logging.getLogger(__name__)

# Before all attempts, which are numbered from 1: the first one goes on from there, and none makes it void that does.
FORK_ATTEMPT_NUMBER = 0


def fork_run(source: str, target: str, recipe: Recipe, samples: int | None = None) -> int | None:
    """Begin the run in folder `target`, of this recipe, with a checkpoint of the run in folder `source`; its samples.

    samples: which checkpoint; by default the newest that lies before the recipes part. Both runs must be of the same
    dataset, which a checkpoint does not name; an audit tells if they are not.

    None, and nothing is written, when there is no such checkpoint that is whole and counts (a finished run keeps those
    alone that were marked, Cadence.marks), or when the run in `target` has begun by itself: then its own state counts.
    Raises CheckpointError when the recipes differ in more than their schedule, or part before `samples`; StorageError.
    """
    if attempts.find_latest_number(target):
        return None
    for place, state in _iterate_usable_checkpoints(source, samples):
        shown = redaction.redact(place.url)
        if not _shares_state(state, recipe, shown):
            if samples is None:
                continue
            raise CheckpointError(
                f"{shown}: its recipe says other learning rates before {samples} samples than the one to go on with: "
                "fork an earlier checkpoint"
            )
        # The seconds that led there are of the run that was under way then.
        content = {**state, "recipe": recipe.to_dict(), PRODUCTIVE_SECONDS_KEY: 0.0}
        about = {"samples": place.samples, "attempt": FORK_ATTEMPT_NUMBER, "time": time.time(), "forked_from": shown}
        url = checkpoint_dir.make_checkpoint_url(get_checkpoints_dir(target), place.samples, FORK_ATTEMPT_NUMBER)
        checkpoint_format.write_folder(url, content, about)
        return place.samples
    return None


def _iterate_usable_checkpoints(source: str, samples: int | None) -> Iterator[tuple[CheckpointFolder, dict[str, Any]]]:
    """Checkpoints of a run, newest first, that count and are whole, with their states; all, or those at `samples`."""
    void = attempts.load_stale_checkpoint_check(source)
    for place in [
        *checkpoint_dir.list_checkpoints(get_checkpoints_dir(source)),
        *checkpoint_dir.list_checkpoints(get_marks_dir(source)),
    ]:
        if samples not in (None, place.samples) or void(place) is not None:
            continue
        try:
            state = checkpoint_format.load(place.url)
        except FileNotFoundError:
            continue  # not committed, or removed just now: its run has newer ones
        except CheckpointError as error:
            _log.warning("passed over: %s", error)
            continue
        yield place, state


def _shares_state(state: dict[str, Any], recipe: Recipe, shown: str) -> bool:
    """Whether a training by `recipe` would be in this state. Raises CheckpointError when it never could be."""
    try:
        own = Recipe.from_dict(state["recipe"])
        done = _count_epochs_done(state, shown)
    except (KeyError, ConfigError, DataError) as error:
        raise CheckpointError(f"{shown}: holds no state of a training run ({type(error).__name__}: {error})") from None
    if differing := find_differences(own, recipe):
        raise CheckpointError(
            f"{shown}: is of a recipe that differs in {', '.join(differing)}: only a run whose schedule alone differs "
            "can go on from it"
        )
    return done <= Fraction(count_shared_epochs(own, recipe))


def _count_epochs_done(state: dict[str, Any], shown: str) -> Fraction:
    """Epochs done; within the first one 1, the most that it can be: how long an epoch is, only one that is over tells.

    Raises DataError for a record that lacks the first epoch.
    """
    first = sample_audit.parse_record(state.get("audit"), shown).get_epoch(0).samples
    if not first:
        raise DataError("its record of what was delivered lacks the first epoch")
    return Fraction(int(state["samples"]), first)
