"""What a job makes of the environment that it is started in."""

import getpass
import os

import pytest

from orchestrator.ray_backend import ray_env


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
