"""Access to a cluster, and the ports that it listens on."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.nodes import ports
from tests.nodes.scenes import flags
from tests.support.launched import ROOT, until
from tests.support.machines import BIN, Machine, network
from tests.support.nodes import STORE_BYTES, Cluster, cluster

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

CERTIFICATES = ROOT / "cluster" / "tls" / "certificates.sh"
# Time for a driver to find out that it has no access.
REJECTED_SECONDS = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a short path, for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix="nodes-") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Yield two nodes, behind this session's token."""
    with tempfile.TemporaryDirectory(prefix="nodes-") as made, cluster(Path(made), (1, 1)) as running:
        yield running


def trained(nodes: Cluster, storage: Path, environment: dict[str, str]) -> tuple[int, str, float]:
    """Run a job on the head; return its status, output and seconds."""
    return trained_at(nodes.address, nodes.nodes[0], storage, environment)


def trained_at(address: str, machine: Machine, storage: Path, environment: dict[str, str]) -> tuple[int, str, float]:
    """Run a job on a machine against a head; return its status, output and seconds."""
    began = time.monotonic()
    done = machine.call(
        [sys.executable, str(ROOT / "jobs" / "train.py"), *flags(2, epochs=1)],
        {"RAY_ADDRESS": address, "ORCHESTRATOR_RUNS": str(storage), **environment},
        seconds=240,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


# ------------------------------------------------------------------ the token
@pytest.mark.parametrize("token", ["f" * 64, ""], ids=["another", "none"])
def test_a_job_without_the_clusters_token_fails_and_says_why(pair: Cluster, folder: Path, token: str) -> None:
    status, output, seconds = trained(pair, folder / "runs", {"RAY_AUTH_TOKEN": token, "HOME": str(folder)})
    print(f"rejected after {seconds:.1f} s: {output.strip().splitlines()[-1]}")
    assert status != 0
    assert "token" in output.strip().splitlines()[-1], output
    assert len(output.strip().splitlines()) <= 3, output
    assert seconds < REJECTED_SECONDS
    assert not (folder / "runs" / "models").exists()


def test_a_node_without_the_token_does_not_get_in(folder: Path) -> None:
    with network(folder, 3) as machines:
        nodes = Cluster(machines[:2], machines[2], (1, 1))
        nodes.start([0])
        nodes.environment = {"RAY_AUTH_TOKEN": "f" * 64}
        joining = nodes.join(1)
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it still retries, outside of the cluster
            assert joining.wait(120) != 0
        listed = nodes.ask(0, [str(BIN / "ray"), "status", "--address", nodes.address])
        assert listed.count("node_") == 1, listed


OLDER = "import sys, ray; ray.__version__ = '2.59.0'; from ray.scripts.scripts import main; main()"


def test_a_node_with_another_version_of_ray_does_not_get_in(pair: Cluster) -> None:
    head = pair.nodes[0]
    began = time.monotonic()
    done = head.call([sys.executable, "-c", OLDER, "start", f"--address={pair.address}", "--num-cpus=1"], seconds=120)
    print(f"rejected after {time.monotonic() - began:.1f} s")
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert "2.59.0" in output, output
    assert "Version mismatch" in output, output
    assert time.monotonic() - began < REJECTED_SECONDS
    listed = pair.ask(0, [str(BIN / "ray"), "status", "--address", pair.address])
    assert listed.count("node_") == 2, listed


# ------------------------------------------------------------------ TLS
def test_a_training_over_tls_and_no_access_without_certificates(folder: Path) -> None:
    with network(folder, 3) as machines:
        certificates = folder / "tls"
        subprocess.run([str(CERTIFICATES), str(certificates), *(one.address for one in machines)], check=True)
        assert {path.stat().st_mode & 0o777 for path in certificates.iterdir()} == {0o600}
        tls = {
            "RAY_USE_TLS": "1",
            "RAY_TLS_CA_CERT": str(certificates / "ca.crt"),
            "RAY_TLS_SERVER_CERT": str(certificates / "node.crt"),
            "RAY_TLS_SERVER_KEY": str(certificates / "node.key"),
        }
        nodes = Cluster(machines[:2], machines[2], (1, 1), environment=tls)
        nodes.start([0, 1])
        status, output, _ = trained(nodes, folder / "runs", tls)
        assert status == 0, output
        assert [set(group.values()) for group in nodes.groups()] == [{0, 1}]
        status, output, _ = trained(nodes, folder / "other", {})
        assert status != 0


# ------------------------------------------------------------------ ports
def sockets(machine: Machine) -> str:
    """Return the listening sockets of a machine, as ss prints them."""
    return machine.ask(["ss", "-Hltn"])


def unlike(title: str, machine: Machine, role: str) -> list[str]:
    """Return how a machine differs from the documentation of a head or a worker; print both."""
    listening = ports.listened(sockets(machine), machine.address)
    differing = ports.differences(listening, ports.documented(role))
    print(title, *(f"  {port} on {' and '.join(sorted(listening[port]))}" for port in sorted(listening)), sep="\n")
    print("unlike its documentation:", *(differing or ["nothing"]), sep="\n  ")
    return differing


def started(machine: Machine, command: str, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run one of the launcher's start commands on a machine, as it would."""
    home = folder / f"home-{machine.number}"
    home.mkdir(exist_ok=True)
    local = command.replace("~/googlenet-orchestrator", str(ROOT)).replace("/mnt/shared/runs", str(folder / "runs"))
    # Written by the launcher, for its autoscaler.
    local = local.replace('--autoscaling-config="$HOME/ray_bootstrap_config.yaml"', "")
    local += f" --num-cpus=1 --num-gpus=0 --object-store-memory={STORE_BYTES}"
    environment = {
        "HOME": str(home),
        "ORCHESTRATOR_VENV": sys.prefix,
        "RAY_CLOUD_INSTANCE_ID": machine.address,
        "RAY_HEAD_IP": "10.88.0.1",
        **more,
    }
    return machine.call(["bash", "-c", local], environment, 120)


def test_a_head_listens_where_the_documentation_says_and_never_without_a_token(folder: Path) -> None:
    launcher = yaml.safe_load((ROOT / "cluster" / "ssh" / "cluster.yaml").read_text())
    with network(folder, 3) as machines:
        for machine in machines:
            machine.boot(machines)
        head, worker, plain = machines
        as_ray_does = [str(BIN / "ray"), "start", "--head", "--num-cpus=1", f"--object-store-memory={STORE_BYTES}"]
        assert plain.call(as_ray_does, {"HOME": str(folder)}, 120).returncode == 0
        # By default some ports are random: no firewall rule can name them.
        assert unlike("a head as Ray starts it", plain, "head")
        plain.kill()
        without = started(head, launcher["head_start_ray_commands"][0], folder, RAY_AUTH_TOKEN="")
        assert without.returncode != 0
        assert "missing or empty: Ray would be open to everybody" in without.stderr
        assert sockets(head) == "", "nothing is started without a token"

        up = started(head, launcher["head_start_ray_commands"][0], folder)
        assert up.returncode == 0, up.stdout + up.stderr
        joined = started(worker, launcher["worker_start_ray_commands"][0], folder)
        assert joined.returncode == 0, joined.stdout + joined.stderr
        status, output, _ = trained_at(f"{head.address}:6379", head, folder / "runs", {})
        assert status == 0, output

        assert unlike("a head as cluster/ssh/cluster.yaml starts it", head, "head") == []
        assert unlike("a worker", worker, "worker") == []
        # A listener of another program is found.
        planted = head.exec([sys.executable, "-c", PLANTED])
        until(lambda: ":7777 " in sockets(head))
        assert unlike("a head with another listener", head, "head") == ["7777 on all: not documented"]
        assert planted.poll() is None


PLANTED = "import socket, time; listener = socket.create_server(('', 7777)); time.sleep(60)"
