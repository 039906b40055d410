"""The code that a sweep was made with, by its commit or its contents."""

import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.tuning import code_version


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A package of two files."""
    made = tmp_path / "clone"
    (made / "orchestrator" / "room").mkdir(parents=True)
    (made / "orchestrator" / "one.py").write_text("1\n")
    (made / "orchestrator" / "room" / "two.py").write_text("2\n")
    return made


def test_a_copy_is_known_by_its_contents_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "job")
    version = code_version.get_code_version(root)
    assert version.startswith("sha256:")
    assert code_version.get_code_version(tmp_path / "job") == version
    (tmp_path / "job" / "orchestrator" / "room" / "two.py").write_text("3\n")
    assert code_version.get_code_version(tmp_path / "job") != version
    (root / "orchestrator" / "one.py").rename(root / "orchestrator" / "other.py")
    assert code_version.get_code_version(root) != version, "names count, too"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_checkout_is_known_by_its_commit_with_packed_references_and_in_a_worktree(root: Path, tmp_path: Path) -> None:
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    commit = git(root, "rev-parse", "HEAD")
    assert code_version.get_code_version(root) == commit
    git(root, "pack-refs", "--all")
    assert code_version.get_code_version(root) == commit
    git(root, "worktree", "add", "-q", str(tmp_path / "tree"))
    assert code_version.get_code_version(tmp_path / "tree") == commit
    (root / "orchestrator" / "one.py").write_text("changed\n")
    assert code_version.get_code_version(root) == f"{commit}, changed: {code_version.compute_source_digest(root)}"


def test_a_folder_inside_of_another_checkout_is_none(root: Path) -> None:
    subprocess.run(["git", "-C", str(root.parent), "init", "-q"], check=False)
    assert code_version.get_code_version(root).startswith("sha256:")


def test_this_package_has_a_version() -> None:
    assert code_version.get_code_version()
