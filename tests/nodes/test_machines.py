"""The machines that the tests of this folder run on: what is their own, what happens to their cables, their end."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import machines
from tests.support.launched import process_tree, until
from tests.support.machines import CGROUPS, Machine, network

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(120)]

PORT = 5001
MEBIBYTE = 2**20
DATAGRAMS = 1000
# Takes what others send, and is sent for what it has itself.
SERVE = """
import contextlib, socket, sys
listening = socket.create_server(("", int(sys.argv[1])))
while True:
    taken, _ = listening.accept()
    with taken, contextlib.suppress(OSError):  # who only looks whether somebody answers waits for none
        while taken.recv(2**16):
            pass
        taken.sendall(b"x" * int(sys.argv[2]))
"""
# Seconds to send so many bytes, and to get the server's.
EXCHANGE = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as made:
    began = time.monotonic()
    made.sendall(b"x" * int(sys.argv[3]))
    made.shutdown(socket.SHUT_WR)
    made.recv(1, socket.MSG_PEEK)
    sent = time.monotonic()
    while made.recv(2**16):
        pass
    print(sent - began, time.monotonic() - sent)
"""
# Says that it listens, then how many datagrams have come when none does any more; no burst is too large for it.
COUNT = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taking:
    taking.setsockopt(socket.SOL_SOCKET, 33, 2**24)
    taking.bind(("", int(sys.argv[1])))
    taking.settimeout(0.7)
    print("listening", flush=True)
    count = 0
    try:
        while taking.recv(16):
            count += 1
    except TimeoutError:
        print(count)
"""
SEND = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
    for number in range(int(sys.argv[3])):
        sending.sendto(b"x", (sys.argv[1], int(sys.argv[2])))
        if number % 20 == 0:
            time.sleep(0.005)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """As other tests make it: in /tmp, where each machine has its own."""
    with tempfile.TemporaryDirectory(prefix="nodes-") as made:
        yield Path(made)


@pytest.fixture
def pair(folder: Path) -> Iterator[list[Machine]]:
    """Two machines that are on."""
    with network(folder, 2) as made:
        for machine in made:
            machine.boot(made)
        yield made


@contextlib.contextmanager
def served(machine: Machine, answer: int = 0) -> Iterator[None]:
    """A server on a machine, reached from there."""
    server = machine.exec([sys.executable, "-c", SERVE, str(PORT), str(answer)])
    try:
        until(lambda: reaches(machine, machine))
        yield
    finally:
        server.kill()
        server.wait(10)


def reaches(one: Machine, other: Machine) -> bool:
    """Whether a connection comes about within a second."""
    attempt = ["timeout", "1", "bash", "-c", f": </dev/tcp/{other.address}/{PORT}"]
    return one.call(attempt).returncode == 0


# ------------------------------------------------------------------ what is their own
def test_each_machine_has_its_own_name_address_and_processes(pair: list[Machine]) -> None:
    for machine, other in (pair, reversed(pair)):
        assert machine.ask(["hostname"]).strip() == machine.name
        assert f" {machine.address}/" in machine.ask(["ip", "-o", "-4", "addr", "show", "eth0"])
        for one in (machine, other):
            assert machine.ask(["getent", "hosts", one.name]).split() == [one.address, one.name]
        assert machine.ask(["cat", "/proc/1/environ"]).count(f"NODE={machine.name}\0") == 1
    # Of this very moment: the first process, what it sleeps with, and the listing itself.
    pids = pair[0].ask(["ls", "/proc"]).split()
    assert sum(name.isdigit() for name in pids) <= 4
    for kind in ("net", "pid", "mnt", "uts", "ipc"):
        spaces = {machine.ask(["readlink", f"/proc/self/ns/{kind}"]) for machine in pair}
        spaces.add(os.readlink(f"/proc/self/ns/{kind}") + "\n")
        assert len(spaces) == 3, kind


def test_each_machine_has_its_own_tmp_and_sees_what_tests_share(
    pair: list[Machine], folder: Path, tmp_path: Path
) -> None:
    one, other = pair
    mine = f"/tmp/of-one-machine-{os.getpid()}"
    one.ask(["touch", mine, "/tmp/ray/session", "/dev/shm/memory"])
    assert (one.folder / mine.removeprefix("/")).exists()
    assert (one.folder / "ray" / "session").exists()
    assert not Path(mine).exists()
    for path in (mine, "/tmp/ray/session", "/dev/shm/memory"):
        assert other.call(["test", "-e", path]).returncode != 0, path
    assert one.ask(["stat", "--format=%a", "/tmp"]).strip() == "1777"
    # Nothing of the outer one but what is shared, the folders of this test.
    seen = {Path("/tmp", name) for name in other.ask(["ls", "/tmp"]).split()}
    assert seen - {Path("/tmp/ray")} <= {place for shared in (folder, tmp_path) for place in (shared, *shared.parents)}
    for place in (folder, tmp_path):
        one.ask(["touch", str(place / "common")])
        assert (place / "common").exists()
        other.ask(["test", "-e", str(place / "common")])


def test_what_a_machine_may_write_can_be_limited_and_is_gone_when_it_boots_again(folder: Path) -> None:
    with network(folder, 1) as (machine,):
        machine.boot([machine], scratch="1m")
        fill = ["dd", "if=/dev/zero", "bs=64k", "count=32"]
        assert machine.call([*fill, "of=/tmp/ray/large"]).returncode != 0
        machine.ask([*fill, "of=/tmp/large"])
        machine.kill()
        machine.boot([machine])
        assert "large" not in machine.ask(["ls", "/tmp", "/tmp/ray"])


# ------------------------------------------------------------------ what happens to their cables
def test_a_cable_is_cut_and_healed(pair: list[Machine]) -> None:
    one, other = pair
    with served(other):
        assert reaches(one, other)
        other.cut()
        assert not reaches(one, other)
        assert reaches(other, other), "it is on all the while"
        other.heal()
        until(lambda: reaches(one, other))


def test_a_narrow_cable_is_as_slow_as_it_is_narrow_in_each_direction(pair: list[Machine]) -> None:
    one, other = pair
    with served(other, MEBIBYTE):
        found = {}
        for rate in (8, 1000):
            other.narrow(rate)
            said = one.ask([sys.executable, "-c", EXCHANGE, other.address, str(PORT), str(MEBIBYTE)])
            found[rate] = [float(seconds) for seconds in said.split()]
    print(f"1 MiB there and back, seconds by Mbit/s: {found}")
    # 1.05 s, less the 128 KiB that a bucket holds beforehand.
    assert all(0.8 < seconds < 3.0 for seconds in found[8])
    assert all(seconds < 0.5 for seconds in found[1000])


def arrived(sender: Machine, receiver: Machine) -> int:
    """How many of a thousand datagrams arrive."""
    with tempfile.TemporaryFile() as out:
        counting = receiver.exec([sys.executable, "-c", COUNT, str(PORT)], out=out)
        until(lambda: os.fstat(out.fileno()).st_size > 0)
        sender.ask([sys.executable, "-c", SEND, receiver.address, str(PORT), str(DATAGRAMS)])
        assert counting.wait(20) == 0
        out.seek(0)
        return int(out.read().split()[-1])


def test_a_lossy_cable_loses_its_share_and_no_other(pair: list[Machine]) -> None:
    one, other = pair
    found = {"before": arrived(one, other)}
    for share in (0.3, 1.0, 0.0):
        other.lose(share)
        found[f"{share:.0%}"] = arrived(one, other)
    other.lose(0.3)
    found["30% of another's"] = arrived(other, one)
    print(f"arrived of {DATAGRAMS}: {found}")
    # 700, and 100 are seven standard deviations.
    assert 600 < found.pop("30%") < 800
    assert found.pop("100%") == 0
    assert set(found.values()) == {DATAGRAMS}


# ------------------------------------------------------------------ their end
def traces(prefix: str) -> list[str]:
    """What there is of machines: namespaces, links, cgroups."""
    found = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.splitlines()
    links = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout.splitlines()
    found += [line.split(": ")[1] for line in links]
    found += [path.name for path in CGROUPS.glob("*")]
    return sorted(name for name in found if name.startswith(prefix))


def test_nothing_of_them_is_left_and_nobody_else_is_ended(folder: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        with network(folder, 2) as made:
            for machine in made:
                if CGROUPS.is_dir():
                    machine.ration(0.5)
                machine.boot(made)
            # One of them as daemons are: no child of this process, in a session of its own.
            made[0].ask(["bash", "-c", "setsid sleep 600 >/dev/null 2>&1 &"])
            started = [machine.exec(["sleep", "600"]) for machine in made]
            of_one, of_other = (process_tree(machine.init) for machine in made)
            assert len(of_one) > len(of_other)
            prefix = made[0].name.removesuffix("n0")
            assert {name for name in traces(prefix) if name.endswith(("n0", "n1"))} == {one.name for one in made}
            made[0].kill()
            assert started[0].wait(10) != 0
            assert started[1].poll() is None, "a machine ends alone"
        until(lambda: not [pid for pid in of_one + of_other if (Path("/proc") / str(pid)).exists()])
        assert started[1].poll() is not None
        until(lambda: traces(prefix) == [])
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


# ------------------------------------------------------------------ where there can be none
@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is asked about this machine is asked again, by this test and by those after it."""
    machines.trouble.cache_clear()
    yield monkeypatch
    machines.trouble.cache_clear()


FORBIDDEN = "mount --make-shared /run/netns failed: Operation not permitted"


def forbidden(*argv: str) -> None:
    """As a container without the right has it."""
    raise subprocess.CalledProcessError(1, argv, stderr=f"{FORBIDDEN}\n")


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        ("os.geteuid", lambda: 1000, "network namespaces need root"),
        ("shutil.which", lambda tool: None, "ip is not installed (packages iproute2, util-linux, hostname)"),
        ("tests.support.machines.run", forbidden, f"network namespaces are not permitted: {FORBIDDEN}"),
    ],
    ids=["root", "tool", "right"],
)
def test_a_test_is_skipped_with_the_reason_where_there_can_be_no_machines(
    anew: pytest.MonkeyPatch, folder: Path, target: str, value: object, expected: str
) -> None:
    anew.setattr(target, value)
    assert machines.trouble() == expected
    with pytest.raises(pytest.skip.Exception) as skipped, network(folder, 1):
        pass
    assert skipped.value.msg == expected
