"""Whether a run is done."""

from __future__ import annotations

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.storage import file_io
from orchestrator.storage.commit import CommitError
from orchestrator.training.config import Outcome, get_final_weights_dir, get_outcome_path


def load_finished_outcome(folder: str) -> Outcome | None:
    """The outcome of the run in `folder` if it is done and its final weights are committed, else None.

    A damaged record is no proof of a finished run: training goes on from the newest checkpoint and writes it anew.
    """
    try:
        checkpoint_dir.read_weights_digest(get_final_weights_dir(folder))
        outcome = Outcome.from_record(file_io.read_bytes(get_outcome_path(folder)))
    except (FileNotFoundError, CommitError, ValueError):
        return None
    return outcome if outcome.status == "finished" else None
