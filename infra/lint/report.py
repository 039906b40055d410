"""Reports of checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where, and what to do about it."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Report:
    """Problems that one kind of check found, and the number of files."""

    kind: str
    files: int
    problems: tuple[Problem, ...] = ()
    skipped: str = ""
    """why nothing, or not all, was checked"""

    @property
    def line(self) -> str:
        """One line for a person."""
        if not self.files and not self.skipped:
            status = "nothing of this kind"
        elif self.problems:
            status = f"{len(self.problems)} problem(s)"
        else:
            status = "" if self.skipped else "ok"
        aloud = f"SKIPPED: {self.skipped}" if self.skipped else ""
        return f"{self.kind:<12} {self.files:>4} file(s)  {'; '.join(part for part in (status, aloud) if part)}"
