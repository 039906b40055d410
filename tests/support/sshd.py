"""Machines that are reached over ssh: each runs a real sshd, and root's home on it is its own."""

import functools
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import machines
from tests.support.launched import until
from tests.support.machines import Machine, network

PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "rsync": "rsync"}
START_SECONDS = 30.0
HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)
CONFIGURATION = """
ListenAddress {address}
Port 22
HostKey {key}
PidFile none
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
PermitRootLogin prohibit-password
PasswordAuthentication no
AuthorizedKeysFile .ssh/authorized_keys
"""
# A home of the machine's own; the interpreter behind the virtual environment stays where it is if it lies in root's.
MOVE = """
set -e; mkdir -p /run/sshd
if [ -n "$KEPT" ]; then mkdir -p "$PRIVATE$KEPT"; mount --bind "$HOME$KEPT" "$PRIVATE$KEPT"; fi
mount --rbind "$PRIVATE" "$HOME"
"""


@functools.cache
def trouble() -> str | None:
    """Return why this host permits no such machines; None when it does."""
    if (reason := machines.trouble()) is not None:
        return reason
    missing = {package for program, package in PACKAGES.items() if shutil.which(program) is None}
    if missing:
        return f"no ssh: apt-get install -y --no-install-recommends {' '.join(sorted(missing))}"
    return None


@dataclass
class Site:
    """Machines with an sshd each, and a laptop without, whose key opens all of them; all on."""

    laptop: Machine
    nodes: list[Machine]

    def home(self, machine: Machine) -> Path:
        """Root's home on a machine, seen from outside."""
        return machine.folder / "home"

    def call(self, words: str, seconds: float, **more: str) -> "subprocess.CompletedProcess[str]":
        """A line of bash on the laptop, as a user there has it: nothing of the tests' token in its environment."""
        clean = ["env", "-u", "RAY_AUTH_TOKEN", "-u", "RAY_AUTH_MODE", "bash", "-c", words]
        return self.laptop.call(clean, {"HOME": str(HOME), **more}, seconds)


@contextmanager
def site(folder: Path, count: int) -> Iterator[Site]:
    """A laptop and so many machines that take ssh, `id` in the laptop's ~/.ssh being the key; skips, aloud, without.

    folder: of what the machines keep for themselves; short, since sockets lie below it.
    """
    if (reason := trouble()) is not None:
        pytest.skip(reason)
    with network(folder, count + 1) as made:
        *nodes, laptop = made
        running = Site(laptop, nodes)
        for machine in made:
            machine.boot(made)
            _give_home(machine, running.home(machine))
        keys = running.home(laptop) / ".ssh"
        _make_key(keys / "id")
        for node in nodes:
            shutil.copy(keys / "id.pub", running.home(node) / ".ssh" / "authorized_keys")
            _serve(node)
        yield running


def _give_home(machine: Machine, home: Path) -> None:
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".bashrc").touch()
    kept = Path(sys.base_prefix).resolve()
    below = f"/{kept.relative_to(HOME)}" if kept.is_relative_to(HOME) else ""
    machine.ask(["bash", "-c", MOVE], {"HOME": str(HOME), "PRIVATE": str(home), "KEPT": below})


def _make_key(path: Path) -> None:
    machines.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def _serve(node: Machine) -> None:
    key, configuration, log = node.folder / "host", node.folder / "sshd_config", node.folder / "sshd.log"
    _make_key(key)
    configuration.write_text(CONFIGURATION.format(address=node.address, key=key))
    sshd = shutil.which("sshd")
    assert sshd is not None
    with open(log, "wb") as out:
        # Nothing of this process's environment but what a daemon has: sessions inherit it.
        daemon = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", sshd, "-D", "-e", "-f", str(configuration)]
        node.exec(daemon, out=out)
    until(lambda: "Server listening" in log.read_text(), START_SECONDS, 0.1)
