"""The probe says what is wrong with a place before work starts there."""

import os
from pathlib import Path

import pytest

from orchestrator.storage import files, probe


def test_a_good_place_has_no_problem_and_keeps_no_trace(place: str) -> None:
    files.write_bytes(files.join(place, "mine"), b"1")
    assert probe.problem(place) is None
    assert files.list_names(place) == ["mine"]


def test_a_place_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    problem = probe.problem(str(tmp_path / "file" / "runs"))
    assert problem is not None
    assert "not writable" in problem
    assert str(tmp_path / "file" / "runs") in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_read_only_place_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    problem = probe.problem(str(tmp_path))
    assert problem is not None
    assert "PermissionError" in problem


def test_a_problem_shows_no_secret() -> None:
    problem = probe.problem("nonsense://user:secret@host/x")
    assert problem is not None
    assert "nonsense://host/x" in problem
    assert "secret" not in problem
