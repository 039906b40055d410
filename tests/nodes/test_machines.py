"""The machines that the tests of this folder run on: private parts, cables, and their end."""

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
# Reads all that a client sends, then sends bytes of its own.
SERVE = """
import contextlib, socket, sys
listening = socket.create_server(("", int(sys.argv[1])))
while True:
    taken, _ = listening.accept()
    with taken, contextlib.suppress(OSError):  # a client that only tests the connection waits for none
        while taken.recv(2**16):
            pass
        taken.sendall(b"x" * int(sys.argv[2]))
"""
# Prints the seconds to send the bytes, and to get the server's.
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
# Prints that it listens, then the number of datagrams once no more arrive; its buffer holds any burst.
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
    """Return a folder in /tmp, where other tests have theirs and each machine has its own."""
    with tempfile.TemporaryDirectory(prefix="nodes-") as made:
        yield Path(made)


@pytest.fixture
def pair(folder: Path) -> Iterator[list[Machine]]:
    """Yield two machines that are on."""
    with network(folder, 2) as made:
        for machine in made:
            machine.boot(made)
        yield made


@contextlib.contextmanager
def served(machine: Machine, answer: int = 0) -> Iterator[None]:
    """Run a server on a machine, until the block ends."""
    server = machine.exec([sys.executable, "-c", SERVE, str(PORT), str(answer)])
    try:
        until(lambda: reaches(machine, machine))
        yield
    finally:
        server.kill()
        server.wait(10)


def reaches(source: Machine, target: Machine) -> bool:
    """Return whether a connection succeeds within a second."""
    attempt = ["timeout", "1", "bash", "-c", f": </dev/tcp/{target.address}/{PORT}"]
    return source.call(attempt).returncode == 0


# ------------------------------------------------------------------ private parts
def test_each_machine_has_its_own_name_address_and_processes(pair: list[Machine]) -> None:
    for machine, other in (pair, reversed(pair)):
        assert machine.ask(["hostname"]).strip() == machine.name
        assert f" {machine.address}/" in machine.ask(["ip", "-o", "-4", "addr", "show", "eth0"])
        for each in (machine, other):
            assert machine.ask(["getent", "hosts", each.name]).split() == [each.address, each.name]
        assert machine.ask(["cat", "/proc/1/environ"]).count(f"NODE={machine.name}\0") == 1
    # At this moment: the first process, its sleep, and the listing itself.
    pids = pair[0].ask(["ls", "/proc"]).split()
    assert sum(name.isdigit() for name in pids) <= 4
    for kind in ("net", "pid", "mnt", "uts", "ipc"):
        spaces = {machine.ask(["readlink", f"/proc/self/ns/{kind}"]) for machine in pair}
        spaces.add(os.readlink(f"/proc/self/ns/{kind}") + "\n")
        assert len(spaces) == 3, kind


def test_each_machine_has_its_own_tmp_and_sees_shared_folders(
    pair: list[Machine], folder: Path, tmp_path: Path
) -> None:
    first, second = pair
    mine = f"/tmp/of-one-machine-{os.getpid()}"
    first.ask(["touch", mine, "/tmp/ray/session", "/dev/shm/memory"])
    assert (first.folder / mine.removeprefix("/")).exists()
    assert (first.folder / "ray" / "session").exists()
    assert not Path(mine).exists()
    for path in (mine, "/tmp/ray/session", "/dev/shm/memory"):
        assert second.call(["test", "-e", path]).returncode != 0, path
    assert first.ask(["stat", "--format=%a", "/tmp"]).strip() == "1777"
    # Nothing of the outer one but the shared folders of this test.
    seen = {Path("/tmp", name) for name in second.ask(["ls", "/tmp"]).split()}
    assert seen - {Path("/tmp/ray")} <= {place for shared in (folder, tmp_path) for place in (shared, *shared.parents)}
    for place in (folder, tmp_path):
        first.ask(["touch", str(place / "common")])
        assert (place / "common").exists()
        second.ask(["test", "-e", str(place / "common")])


def test_a_machines_scratch_space_can_be_limited_and_is_empty_after_a_reboot(folder: Path) -> None:
    with network(folder, 1) as (machine,):
        machine.boot([machine], scratch="1m")
        fill = ["dd", "if=/dev/zero", "bs=64k", "count=32"]
        assert machine.call([*fill, "of=/tmp/ray/large"]).returncode != 0
        machine.ask([*fill, "of=/tmp/large"])
        machine.kill()
        machine.boot([machine])
        assert "large" not in machine.ask(["ls", "/tmp", "/tmp/ray"])


# ------------------------------------------------------------------ cables
def test_a_cable_is_cut_and_healed(pair: list[Machine]) -> None:
    first, second = pair
    with served(second):
        assert reaches(first, second)
        second.cut()
        assert not reaches(first, second)
        assert reaches(second, second), "it is on all the while"
        second.heal()
        until(lambda: reaches(first, second))


def test_a_narrow_cable_has_its_rate_in_each_direction(pair: list[Machine]) -> None:
    first, second = pair
    with served(second, MEBIBYTE):
        measured = {}
        for rate in (8, 1000):
            second.narrow(rate)
            printed = first.ask([sys.executable, "-c", EXCHANGE, second.address, str(PORT), str(MEBIBYTE)])
            measured[rate] = [float(seconds) for seconds in printed.split()]
    print(f"1 MiB there and back, seconds by Mbit/s: {measured}")
    # 1.05 s, less the 128 KiB that a bucket holds beforehand.
    assert all(0.8 < seconds < 3.0 for seconds in measured[8])
    assert all(seconds < 0.5 for seconds in measured[1000])


def arrived(sender: Machine, receiver: Machine) -> int:
    """Return how many of a thousand datagrams arrive."""
    with tempfile.TemporaryFile() as out:
        counting = receiver.exec([sys.executable, "-c", COUNT, str(PORT)], out=out)
        until(lambda: os.fstat(out.fileno()).st_size > 0)
        sender.ask([sys.executable, "-c", SEND, receiver.address, str(PORT), str(DATAGRAMS)])
        assert counting.wait(20) == 0
        out.seek(0)
        return int(out.read().split()[-1])


def test_a_lossy_cable_loses_its_share_and_others_lose_nothing(pair: list[Machine]) -> None:
    first, second = pair
    counts = {"before": arrived(first, second)}
    for share in (0.3, 1.0, 0.0):
        second.lose(share)
        counts[f"{share:.0%}"] = arrived(first, second)
    second.lose(0.3)
    counts["30% of another's"] = arrived(second, first)
    print(f"arrived of {DATAGRAMS}: {counts}")
    # 700, and 100 are seven standard deviations.
    assert 600 < counts.pop("30%") < 800
    assert counts.pop("100%") == 0
    assert set(counts.values()) == {DATAGRAMS}


# ------------------------------------------------------------------ their end
def traces(prefix: str) -> list[str]:
    """Return the namespaces, links and cgroups of machines."""
    names = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.splitlines()
    links = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout.splitlines()
    names += [line.split(": ")[1] for line in links]
    names += [path.name for path in CGROUPS.glob("*")]
    return sorted(name for name in names if name.startswith(prefix))


def test_nothing_of_them_is_left_and_no_other_process_is_ended(folder: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        with network(folder, 2) as made:
            for machine in made:
                if CGROUPS.is_dir():
                    machine.ration(0.5)
                machine.boot(made)
            # Like a daemon: no child of this process, in a session of its own.
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


# ------------------------------------------------------------------ hosts that permit no machines
@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forget the answer of `trouble()` before and after the test."""
    machines.trouble.cache_clear()
    yield monkeypatch
    machines.trouble.cache_clear()


FORBIDDEN = "mount --make-shared /run/netns failed: Operation not permitted"


def forbidden(*argv: str) -> None:
    """Fail as in a container without the right."""
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
def test_a_test_is_skipped_with_the_reason_on_a_host_that_permits_no_machines(
    anew: pytest.MonkeyPatch, folder: Path, target: str, value: object, expected: str
) -> None:
    anew.setattr(target, value)
    assert machines.trouble() == expected
    with pytest.raises(pytest.skip.Exception) as skipped, network(folder, 1):
        pass
    assert skipped.value.msg == expected
