"""infra/compose: its script makes the secrets that its services name, readable by their owner alone."""

import json
import os
import re
import stat
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.support.launched import ROOT

pytestmark = pytest.mark.process
FOLDER = ROOT / "infra" / "compose"
COMPOSE = (FOLDER / "compose.yaml").read_text()
OWNER = 1000


def make(folder: Path, user: int | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the script, as another user if `user` is given."""
    return subprocess.run(
        [str(FOLDER / "secrets.sh"), str(folder)], capture_output=True, text=True, timeout=30, user=user, check=False
    )


@pytest.fixture
def made(tmp_path: Path) -> Path:
    if os.geteuid() not in (0, OWNER):
        pytest.skip(f"secrets.sh wants root or user {OWNER}")
    done = make(tmp_path / "secrets")
    assert done.returncode == 0, done.stderr
    return tmp_path / "secrets"


def test_every_secret_that_is_named_is_made_and_no_other(made: Path) -> None:
    named = dict(re.findall(r"^  (\w+): \{file: secrets/(\w+)\}$", COMPOSE, re.MULTILINE))
    assert named
    assert all(name == file for name, file in named.items())
    assert {path.name for path in made.iterdir()} == set(named)
    used = set(re.findall(r"/run/secrets/(\w+)", COMPOSE))
    for listed in re.findall(r"secrets: \[([^\]]+)\]", COMPOSE):
        used |= set(listed.split(", "))
    used |= set(re.findall(r"^    - (?:source: )?(\w+)$", COMPOSE, re.MULTILINE)) & set(named)
    assert used == set(named), "each is used, and what is used is there"


def test_only_the_owner_reads_them_and_they_are_made_once(made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    for path in made.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
        assert path.stat().st_uid == OWNER, path.name
    words = [text for name, text in before.items() if name.endswith(("_password", "_token", "_key"))]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(rb"[0-9a-f]{64}", word) for word in words)
    assert make(made).returncode == 0
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_both_sides_of_a_login_are_alike(made: Path) -> None:
    client = ConfigParser()
    client.read(made / "mlflow_credentials")
    assert client["mlflow"]["mlflow_tracking_password"] == (made / "jobs_password").read_text()
    keys = ConfigParser()
    keys.read(made / "s3_credentials")
    (identity,) = json.loads((made / "s3_identities").read_text())["identities"]
    assert identity["credentials"] == [
        {"accessKey": keys["default"]["aws_access_key_id"], "secretKey": keys["default"]["aws_secret_access_key"]}
    ]


def test_a_users_own_secret_is_kept(made: Path) -> None:
    (made / "admin_password").write_text("of my own choice")
    (made / "s3_identities").unlink()
    keys = (made / "s3_credentials").read_bytes()
    assert make(made).returncode == 0
    assert (made / "admin_password").read_text() == "of my own choice"
    assert (made / "s3_credentials").read_bytes() != keys, "half of a pair is of no use"


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user")
def test_a_user_whose_files_the_containers_could_not_read_gets_an_error(tmp_path: Path) -> None:
    done = make(tmp_path / "secrets", user=65534)
    assert done.returncode == 1
    assert "run it with sudo" in done.stderr
    assert not (tmp_path / "secrets").exists()


def test_ports_are_published_on_loopback_alone() -> None:
    published = re.findall(r'^    ports: \["(.*)"\]$', COMPOSE, re.MULTILINE)
    assert COMPOSE.count("ports:") == len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)
