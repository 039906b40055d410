"""Probes of a storage before work starts there."""

import os
import uuid
from pathlib import Path
from unittest.mock import Mock

import pytest

from orchestrator.storage import file_io
from tests.support.s3 import S3Server, forget_clients, lead


def test_a_good_place_has_no_problem_and_keeps_no_trace(place: str) -> None:
    file_io.write_bytes(file_io.join(place, "mine"), b"1")
    assert file_io.find_write_problem(place) is None
    assert file_io.list_names(place) == ["mine"]


def test_a_place_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    problem = file_io.find_write_problem(str(tmp_path / "file" / "runs"))
    assert problem is not None
    assert "not writable" in problem
    assert str(tmp_path / "file" / "runs") in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_read_only_place_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    problem = file_io.find_write_problem(str(tmp_path))
    assert problem is not None
    assert "PermissionError" in problem


def test_a_problem_shows_no_secret() -> None:
    problem = file_io.find_write_problem("nonsense://user:secret@host/x")
    assert problem is not None
    assert "nonsense://host/x" in problem
    assert "secret" not in problem


def test_a_place_where_objects_are_created_once_is_guarded(place: str) -> None:
    file_io.write_bytes(file_io.join(place, "mine"), b"1")
    assert file_io.find_conditional_create_problem(place) is None
    assert file_io.list_names(place) == ["mine"]


@pytest.mark.process
def test_a_store_that_ignores_conditions_is_named(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    lead(monkeypatch, s3_server.endpoint)  # rclone's own, which creates an object over another
    place = s3_server.bucket(f"b-{uuid.uuid4().hex}") + "/place"
    said = file_io.find_conditional_create_problem(place)
    left = file_io.list_names(place)
    forget_clients()
    assert said is not None
    assert said.startswith(f"{place}: this store ignores conditional creates (If-None-Match)")
    assert left == []


def test_an_unwritable_place_is_left_to_the_write_probe() -> None:
    assert file_io.find_conditional_create_problem("nonsense://user:secret@host/x") is None


def test_a_store_that_rejects_conditional_creates_keeps_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"memory://{uuid.uuid4().hex}"
    rejected = file_io.StorageError("501 NotImplemented")
    monkeypatch.setattr(file_io, "create_bytes", Mock(side_effect=rejected))
    assert file_io.find_conditional_create_problem(place) is None
    assert file_io.list_names(place) == []
