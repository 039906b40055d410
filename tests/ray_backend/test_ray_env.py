"""What a job makes of the environment that it is started in."""

import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import ray_env
from tests.support.launched import ROOT


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
def test_an_interpreter_whose_path_a_shell_takes_apart_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", f"/clones/{folder}/.venv/bin/python")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"interpreter's path must hold no .* got /clones/.*; move the clone"):
        ray_env.check_ray_environment()


@pytest.mark.parametrize("folder", WORKING)
def test_other_letters_are_no_reason_to_refuse(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", f"/clones/{folder}/.venv/bin/python")
    ray_env.check_interpreter_path()
    # The rule is bash's own.
    told = subprocess.run(["bash", "-c", f"printf %s {sys.executable}"], capture_output=True, text=True, check=True)
    assert told.stdout == sys.executable


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
def test_an_address_of_another_kind_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(
        ConfigError, match=r"RAY_ADDRESS must be HOST:PORT of a Ray head, got .*unset RAY_ADDRESS"
    ) as told:
        ray_env.check_ray_environment()
    assert "PW" not in str(told.value)


def test_a_word_for_a_private_cluster_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not ray_env.has_existing_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ray_env.has_existing_cluster()
    ray_env.check_ray_environment()
