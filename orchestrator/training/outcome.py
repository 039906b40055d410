"""Whether a run is done."""

from __future__ import annotations

from orchestrator.checkpoint import places
from orchestrator.storage import files
from orchestrator.storage.commit import CommitError
from orchestrator.training.job import Outcome, final_of, outcome_of


def finished(folder: str) -> Outcome | None:
    """The outcome of the run in `folder` if it is done and its final weights are committed, else None.

    A damaged record is no proof of a finished run: training goes on from the newest checkpoint and writes it anew.
    """
    try:
        places.stored_digest(final_of(folder))
        outcome = Outcome.from_record(files.read_bytes(outcome_of(folder)))
    except (FileNotFoundError, CommitError, ValueError):
        return None
    return outcome if outcome.status == "finished" else None
