"""The version of the code that ran a sweep. Importable without torch or ray."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10.0


def get_code_version(root: Path = REPO_ROOT) -> str:
    """Return the commit of a checkout, else `sha256:` and a digest of the package's sources.

    A submitted job runs from a copy without history (.rayignore). Equal sources have equal digests:
    `python -m orchestrator.tuning.code_version` prints that of a checkout for comparison.
    """
    return _read_commit(root) or compute_source_digest(root)


def compute_source_digest(root: Path = REPO_ROOT) -> str:
    """Return a digest of the names and contents of the package's Python files."""
    digest = hashlib.sha256()
    package = root / "orchestrator"
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return f"sha256:{digest.hexdigest()}"


def _read_commit(root: Path) -> str:
    """Return the commit, with a mark when files differ from it; empty without a checkout or git."""
    if not (root / ".git").exists():  # git would search the folders above
        return ""
    try:
        commit, changed = (
            _run_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}, changed: {compute_source_digest(root)}" if changed else commit


def _run_git(root: Path, *words: str) -> str:
    result = subprocess.run(  # noqa: S603  fixed arguments
        ["git", "-C", str(root), *words],  # noqa: S607  the user's git
        check=True,
        capture_output=True,
        text=True,
        timeout=GIT_SECONDS,
    )
    return result.stdout.strip()


if __name__ == "__main__":
    sys.stdout.write(compute_source_digest() + "\n")
