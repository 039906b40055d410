"""The environment of a job, the folder of Ray's files, and the guard of Ray's private parts."""

import builtins
import getpass
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import ray_env
from orchestrator.ray_backend.ray_env import FAST_START_VARIABLE, load_fast_start, load_ray_internals, make_temp_dir
from tests.support import private_ray
from tests.support.launched import ROOT
from tests.support.private_ray import list_private_modules


def test_a_user_without_home_and_name_gets_both_for_the_time_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")

    def absent(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", absent)
    ray_env.prepare_process()
    home = os.path.expanduser("~")
    assert os.stat(home).st_mode & 0o777 == 0o700
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.environ["MPLBACKEND"] == "Agg"
    ray_env.prepare_process()
    assert os.path.expanduser("~") == home
    os.rmdir(home)


# ------------------------------------------------------------------ ray_backend/ray_env.py and the makefile: surround
BROKEN = ["with space", "a(1)", "a'b", 'a"b', "a$b", "a&b", "a;b", "a`b", "a\\b", "a|b", "a<b", "a*"]
WORKING = ["withé", "plain-1.2_x", "a#b", "a~b", "a{b}", "a[b]", "a@b", "画像"]


@pytest.mark.parametrize("folder", [*BROKEN, "a{x,y}", "a\tb"])
def test_an_interpreter_whose_path_a_shell_takes_apart_is_rejected(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", f"/clones/{folder}/.venv/bin/python")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"interpreter's path must hold no .* got /clones/.*; move the clone"):
        ray_env.check_ray_environment()


@pytest.mark.parametrize("folder", WORKING)
def test_other_letters_are_no_reason_to_refuse(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", f"/clones/{folder}/.venv/bin/python")
    ray_env.check_interpreter_path()
    # The rule is bash's own.
    answer = subprocess.run(["bash", "-c", f"printf %s {sys.executable}"], capture_output=True, text=True, check=True)
    assert answer.stdout == sys.executable


@pytest.mark.parametrize(("folder", "refused"), [*((name, True) for name in BROKEN), *((n, False) for n in WORKING)])
@pytest.mark.process
def test_make_refuses_a_clone_in_such_a_folder(tmp_path: Path, folder: str, refused: bool) -> None:
    clone = tmp_path / folder
    clone.mkdir()
    shutil.copy(ROOT / "Makefile", clone)
    done = subprocess.run(
        ["make", "help"], cwd=clone, capture_output=True, text=True, check=False,
        env={name: text for name, text in os.environ.items() if not name.startswith("MAKE")},
    )  # fmt: skip
    assert (done.returncode != 0) == refused, done.stderr
    assert len(done.stderr.splitlines()) == refused
    assert ("must hold no spaces" in done.stderr) == refused


@pytest.mark.parametrize("address", ["http://user:PW@127.0.0.1:8265", "https://head:8265", "ray://head:10001"])
def test_an_address_of_another_kind_is_rejected(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        ConfigError, match=r"RAY_ADDRESS must be HOST:PORT of a Ray head, got .*unset RAY_ADDRESS"
    ) as answer:
        ray_env.check_ray_environment()
    assert "PW" not in str(answer.value)


def test_a_word_for_a_private_cluster_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not ray_env.has_existing_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ray_env.has_existing_cluster()
    ray_env.check_ray_environment()


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
        monkeypatch.setattr("orchestrator.ray_backend.ray_env._MAX_SOCKET_PATH_BYTES", 1000)


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
def test_what_is_no_folder_is_rejected(shared: Path, tmp_path: Path, kind: str) -> None:
    place = shared / f"orchestrator-{os.geteuid()}"
    if kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.write_text("")
    with pytest.raises(ConfigError, match=f"{place} must be a folder that belongs to user"):
        make_temp_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_that_another_user_made_first_is_rejected(shared: Path) -> None:
    place = shared / f"orchestrator-{os.geteuid()}"
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    with pytest.raises(ConfigError, match="got one that user 65534 made"):
        make_temp_dir()


def test_a_folder_where_others_can_rename_ours_is_rejected(shared: Path) -> None:
    shared.chmod(0o777)
    with pytest.raises(ConfigError, match="must be closed to others or have the sticky bit, got mode 777"):
        make_temp_dir()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_length_that_sockets_do_not_allow_is_rejected_with_the_variable(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(name, str(shared / ("x" * 60)))
    with pytest.raises(ConfigError, match=f"^{name}: .*at most 43 bytes.*set RAY_TMPDIR to a shorter folder"):
        make_temp_dir()


def test_a_place_that_is_no_folder_is_rejected_with_the_variable(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(shared / "file"))
    with pytest.raises(ConfigError, match=f"^RAY_TMPDIR: {shared}/file must be a folder"):
        make_temp_dir()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded nothing yet."""
    monkeypatch.setattr(ray_env, "_loaded", {})
    monkeypatch.delenv(FAST_START_VARIABLE, raising=False)
    yield


def forget_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next load import the two modules anew."""
    for name in ("fast_start", "ray_internals"):
        monkeypatch.delitem(sys.modules, f"orchestrator.ray_backend.{name}", raising=False)
        monkeypatch.delattr(f"orchestrator.ray_backend.{name}", raising=False)


def block(monkeypatch: pytest.MonkeyPatch, modules: list[str]) -> None:
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)  # put back afterwards
    private_ray.block(modules)


def test_a_tested_version_starts_fast_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    internals, fast_start = load_ray_internals(), load_fast_start()
    assert internals is not None and fast_start is not None
    assert load_fast_start() is fast_start
    assert caplog.text == ""


@pytest.mark.parametrize("reason", ["version", "switch", "import"])
def test_anything_else_uses_the_public_api_and_warns_once(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "version":
        monkeypatch.setattr(ray_env, "version", lambda _: "9.1.0")
    elif reason == "switch":
        monkeypatch.setenv(FAST_START_VARIABLE, "0")
    else:
        forget_door(monkeypatch)
        block(monkeypatch, ["ray._private.state"])
    assert [load_ray_internals(), load_fast_start(), load_ray_internals(), load_fast_start()] == [None] * 4
    [warning] = caplog.messages
    cause = {
        "version": "Ray 9.1.0 is not a version that it was tested with (2.60.0)",
        "switch": "ORCHESTRATOR_FAST_START is 0",
        "import": "lacks what it needs (ImportError: ray._private.state is blocked)",
    }
    assert cause[reason] in warning and "public API" in warning


@pytest.mark.parametrize("module", list_private_modules())
def test_whichever_private_module_is_missing_runs_start_through_the_public_api(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_door(monkeypatch)
    block(monkeypatch, [module])
    assert load_fast_start() is None
    assert (load_ray_internals() is None) == (".train." not in module and ".data." not in module)
    assert len(caplog.messages) == 1 and f"{module} is blocked" in caplog.text


def test_the_installed_version_is_one_that_the_tests_run_with() -> None:
    assert version("ray") in ray_env.TESTED_RAY_VERSIONS


@pytest.mark.parametrize("value", ["off", "2", " "])
def test_another_value_of_the_switch_is_an_error_that_names_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAST_START_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"ORCHESTRATOR_FAST_START must be 0 or 1, got '{value}'"):
        ray_env.check_ray_environment()


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_zero_and_one_are_values_of_the_switch(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAST_START_VARIABLE, value)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    ray_env.check_ray_environment()
    assert (ray_env.load_ray_internals() is None) == (value == "0")
