"""Which code a sweep was made with. Importable without torch or ray."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10.0


def get_code_version(root: Path = REPO_ROOT) -> str:
    """The commit where the code is a checkout, else `sha256:` and a digest of the package's sources.

    A submitted job runs from a copy without its history (.rayignore). The digest is equal for equal sources, wherever
    they lie: `python -m orchestrator.tuning.code_version` prints that of a checkout to compare.
    """
    return _read_commit(root) or compute_source_digest(root)


def compute_source_digest(root: Path = REPO_ROOT) -> str:
    """A digest of names and contents of the package's Python files."""
    found = hashlib.sha256()
    package = root / "orchestrator"
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        text = path.read_bytes()
        found.update(f"{path.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return f"sha256:{found.hexdigest()}"


def _read_commit(root: Path) -> str:
    """With a mark where files differ from it; empty where there is none, or no git."""
    if not (root / ".git").exists():  # git would look for one in the folders above
        return ""
    try:
        commit, changed = (
            _run_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}, changed: {compute_source_digest(root)}" if changed else commit


def _run_git(root: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603  no words of a user's
        ["git", "-C", str(root), *words],  # noqa: S607  whichever the user has
        check=True,
        capture_output=True,
        text=True,
        timeout=GIT_SECONDS,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.stdout.write(compute_source_digest() + "\n")
