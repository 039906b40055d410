"""Errors of jobs that use a cluster. Importable without Ray, so that every command can catch them."""

from __future__ import annotations


class JobError(RuntimeError):
    """A job that cannot start or finish; each of `problems` is a line that says what to do."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class ClusterError(JobError):
    """A cluster that cannot be reached or is too small."""


class PreflightError(JobError):
    """Problems to fix before the job can run."""


class RunFailedError(JobError):
    """A run whose workers crashed more often than its placement allows; ends with the last cause."""


class NotRecordedError(JobError):
    """A job whose work is done and stored, but not completely recorded in the tracker."""


def get_last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where Ray puts the cause, without the causes that Ray supposes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return strip_suppositions(lines[-1]) if lines else type(error).__name__


def strip_suppositions(text: str) -> str:
    """Return Ray's account of a failure without its list of possible causes."""
    return text.partition(" Some common causes")[0].strip()
