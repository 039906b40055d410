"""Paths and records in a run's folder. Importable without torch."""

from __future__ import annotations

import logging

from pydantic import Field

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.storage import file_io
from orchestrator.storage.commit import CommitError
from orchestrator.training.config import Outcome

VALIDATION_FILE = "validation.json"  # rank 0's class results of the last validation
MAX_CLASSES_SHOWN = 10
_log = logging.getLogger(__name__)


def get_checkpoints_dir(folder: str) -> str:
    """Return where a run keeps its checkpoints."""
    return file_io.join(folder, "checkpoints")


def get_final_weights_dir(folder: str) -> str:
    """Return where a finished run keeps its final weights."""
    return file_io.join(folder, "final")


def get_best_weights_dir(folder: str) -> str:
    """Return where a run keeps the weights that validated best, below a folder named as checkpoints are."""
    return file_io.join(folder, "best")


def get_journal_dir(folder: str) -> str:
    """Return where a run keeps its journal."""
    return file_io.join(folder, "journal")


def get_attempts_dir(folder: str) -> str:
    """Return where a run keeps the records of its attempts."""
    return file_io.join(folder, "attempts")


def get_outcome_path(folder: str) -> str:
    """Return where rank 0 writes the outcome."""
    return file_io.join(folder, "outcome.json")


class ClassResult(Config):
    """One class in the last validation of a run; errors in percent, None without images."""

    name: str
    images: int
    top1_error: float | None
    top5_error: float | None


class ValidationResult(Config):
    """The last validation of a run, class by class in the order of labels."""

    weights: str = Field(description='"averaged" or "raw"')
    samples: int = Field(description="training samples so far")
    classes: tuple[ClassResult, ...]

    def describe(self) -> list[str]:
        """Return lines for people: the classes with the largest top-1 errors, the worst first."""
        rows = [row for row in self.classes if row.images]
        worst = sorted(rows, key=lambda row: -(row.top1_error or 0.0))[:MAX_CLASSES_SHOWN]
        shown = f"the {MAX_CLASSES_SHOWN} worst of {len(self.classes)} classes" if len(rows) > len(worst) else "classes"
        return [
            f"{shown} in the last validation ({self.weights} weights), top-1 / top-5 error:",
            *(f"  {row.name:30} {row.top1_error:6.2f}% / {row.top5_error:.2f}% ({row.images} images)" for row in worst),
        ]


def load_validation_result(folder: str) -> ValidationResult | None:
    """Return the class results of the run in `folder`; None when there are none that can be read."""
    try:
        return ValidationResult.from_record(file_io.read_bytes(file_io.join(folder, VALIDATION_FILE)))
    except (FileNotFoundError, ValueError):
        return None


def load_finished_outcome(folder: str) -> Outcome | None:
    """Return the outcome of the run in `folder` if it is finished and its final weights are committed, else None.

    A damaged record is logged and does not count: training resumes from the newest checkpoint and writes it again.
    """
    url = get_outcome_path(folder)
    try:
        checkpoint_dir.read_weights_digest(get_final_weights_dir(folder))
        outcome = Outcome.from_record(file_io.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValueError as error:
        damage = str(error) if isinstance(error, CommitError) else f"{redaction.redact(url)}: damaged: {error}"
        _log.warning("not taken as finished, rerun its training: %s", damage)
        return None
    return outcome if outcome.status == "finished" else None
