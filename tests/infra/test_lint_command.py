"""python -m infra.lint as a command: its output and its exit status."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from infra.lint.tree import Tree
from tests.support.launched import ROOT

pytestmark = pytest.mark.process


def run(root: Path, *flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "infra.lint", "--root", str(root), *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(autouse=True)
def _extra() -> None:
    if find_spec("kubernetes_validate") is None:
        pytest.skip("the extra `lint` is not installed: `make check` installs it")


def test_problems_are_printed_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/run.sh").write_text("#!/bin/sh\n\nrm $1\n")
    (tmp_path / "values.yaml").write_text("a: 1\na: 2\n")
    done = run(tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith("deploy/run.sh:3: ") and "SC2086" in line for line in lines), done.stdout
    assert any(line.startswith("values.yaml:2: ") and "duplication" in line for line in lines), done.stdout
    assert any(line.split()[:2] == ["kuberay", "0"] and "nothing of this kind" in line for line in lines)


def test_a_skipped_check_is_reported_and_fails_when_strict(tmp_path: Path) -> None:
    (tmp_path / "main.tf").write_text('locals {\n  a = "b"\n}\n')
    nowhere = str(tmp_path / "bin")
    done = run(tmp_path, PATH=nowhere)
    assert done.returncode == 0, done.stdout
    assert "SKIPPED: terraform is not on PATH" in done.stdout
    assert run(tmp_path, "--strict", PATH=nowhere).returncode == 1


def test_files_that_git_ignores_are_left_out(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/runs/\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/it.sh").write_text("rm $1\n")
    (tmp_path / "new.sh").write_text("true\n")
    assert Tree(tmp_path).files == [".gitignore", "new.sh"]
