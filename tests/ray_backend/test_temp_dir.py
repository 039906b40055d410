"""ray_backend/temp_dir.py: where Ray's files lie, and who may enter."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend.temp_dir import make_temp_dir


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like /tmp, and no mask that would close by chance what is made there."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    before = os.umask(0)
    yield folder
    os.umask(before)


@pytest.fixture(autouse=True)
def _any_length(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "length" not in request.node.name:
        monkeypatch.setattr("orchestrator.ray_backend.temp_dir._MAX_SOCKET_PATH_BYTES", 1000)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("before", [None, 0o777, 0o755])
def test_the_parent_is_closed_to_others_whatever_the_umask(shared: Path, before: int | None) -> None:
    parent = shared / f"orchestrator-{os.geteuid()}"
    if before is not None:
        parent.mkdir()
        parent.chmod(before)
    assert make_temp_dir() == str(parent / "ray")
    assert mode(parent) == 0o700
    assert make_temp_dir() == str(parent / "ray"), "a second process takes the same"


def test_a_folder_that_is_closed_already_is_taken_as_it_is(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (False, True):
        own = shared / f"own-{made}"
        if made:
            own.mkdir(mode=0o700)
        monkeypatch.setenv("RAY_TMPDIR", str(own))
        assert make_temp_dir() == str(own / "ray")
        assert mode(own) == 0o700


def test_tmpdir_counts_where_rays_own_variable_is_not_set(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.delenv("RAY_TMPDIR")
    assert make_temp_dir().startswith(f"{shared}/orchestrator-")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_is_refused(shared: Path, tmp_path: Path, kind: str) -> None:
    place = shared / f"orchestrator-{os.geteuid()}"
    if kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.write_text("")
    with pytest.raises(ConfigError, match=f"{place} must be a folder that belongs to user"):
        make_temp_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_that_another_user_made_first_is_refused(shared: Path) -> None:
    place = shared / f"orchestrator-{os.geteuid()}"
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    with pytest.raises(ConfigError, match="got one that user 65534 made"):
        make_temp_dir()


def test_a_folder_where_others_can_rename_ours_is_refused(shared: Path) -> None:
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="must be closed to others or have the sticky bit, got mode 777"):
        make_temp_dir()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_length_that_sockets_do_not_allow_is_refused_with_the_variable(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(name, str(shared / ("x" * 60)))
    with pytest.raises(ConfigError, match=f"^{name}: .*at most 43 bytes.*set RAY_TMPDIR to a shorter folder"):
        make_temp_dir()


def test_a_place_that_is_no_folder_is_refused_with_the_variable(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(shared / "file"))
    with pytest.raises(ConfigError, match=f"^RAY_TMPDIR: {shared}/file must be a folder"):
        make_temp_dir()
