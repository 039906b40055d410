"""`ray up` with cluster/ssh/cluster.yaml: a laptop and three machines, a real sshd on each."""

import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nodes.scenes import flags
from tests.support import sshd
from tests.support.launched import ROOT, process_tree, title, until
from tests.support.machines import BIN, Machine
from tests.support.nodes import STORE_BYTES
from tests.support.sshd import Site

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

LAUNCHER = ROOT / "cluster" / "ssh"
UP_SECONDS = 300.0
JOINED_SECONDS = 90.0
JOB_SECONDS = 240.0
DOWN_SECONDS = 200.0
# A name that `ray stop` would take for Ray's.
OTHERS = "raylet"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a short path, for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ssh-") as made:
        yield Path(made)


def edited(nodes: list[Machine], runs: Path) -> dict[str, Any]:
    """Return the launcher's file with the parts marked "yours" filled in, small nodes, and installed packages."""
    config: dict[str, Any] = yaml.safe_load((LAUNCHER / "cluster.yaml").read_text())
    head, *workers = nodes
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id"}
    config["setup_commands"] = [f"ln -sfn {shlex.quote(sys.prefix)} ~/googlenet-orchestrator/.venv"]
    for role in ("head", "worker"):
        (command,) = config[f"{role}_start_ray_commands"]
        config[f"{role}_start_ray_commands"] = [
            command.replace("/mnt/shared/runs", str(runs))
            + f" --num-cpus=1 --num-gpus=0 --object-store-memory={STORE_BYTES}"
        ]
    return config


def rays(machine: Machine) -> list[str]:
    """Return the titles of Ray's processes on a machine."""
    titles = [title(pid) for pid in process_tree(machine.init)]
    return [words for words in titles if "site-packages/ray/" in words or "ray::" in words or "bin/ray start" in words]


def joined(site: Site) -> int:
    """Return the number of nodes that the head counts as alive."""
    listed = site.call(f"ssh {SSH} root@{site.nodes[0].address} {shlex.quote(STATUS)}", 60)
    alive = listed.stdout.partition("Active:")[2].partition("Pending:")[0]
    return sum(int(count) for count in re.findall(r"^ (\d+) ", alive, re.MULTILINE))


SSH = "-i ~/.ssh/id -o BatchMode=yes -o StrictHostKeyChecking=accept-new"
STATUS = "RAY_AUTH_MODE=token ~/googlenet-orchestrator/.venv/bin/ray status"


def test_up_trains_and_down_leaves_others_alone(folder: Path) -> None:
    runs = folder / "runs"
    with sshd.site(folder, 3) as site:
        file = folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(edited(site.nodes, runs)))
        # Named like one of Ray's, on the head and on a worker.
        (folder / OTHERS).symlink_to("/bin/sleep")
        others = [machine.exec([str(folder / OTHERS), "3600"]) for machine in site.nodes[:2]]
        made = site.call(f"umask 077; {BIN}/ray get-auth-token --generate", 60)
        assert made.returncode == 0, made.stdout + made.stderr

        began = time.monotonic()
        up = site.call(f"cd {ROOT} && {BIN}/ray up -y --no-config-cache {file}", UP_SECONDS)
        print(up.stdout + up.stderr)
        assert up.returncode == 0
        print(f"ray up: {time.monotonic() - began:.1f} s")
        until(lambda: joined(site) == 3, JOINED_SECONDS, 2.0)
        print(f"three nodes: {time.monotonic() - began:.1f} s")
        assert all(rays(machine) for machine in site.nodes), "otherwise their absence below proves nothing"
        for machine in site.nodes:
            assert (site.home(machine) / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600

        began = time.monotonic()
        job = site.call(SUBMIT.format(head=site.nodes[0].address, words=shlex.join(flags(2, epochs=1))), JOB_SECONDS)
        assert job.returncode == 0, job.stdout + job.stderr
        print(f"job: {time.monotonic() - began:.1f} s")
        assert list(runs.glob("models/*")), job.stdout

        began = time.monotonic()
        down = site.call(f"{sys.executable} {LAUNCHER / 'down.py'} {file}", DOWN_SECONDS)
        print(f"down.py: {time.monotonic() - began:.1f} s\n{down.stdout + down.stderr}")
        assert down.returncode == 0
        assert {machine.name: rays(machine) for machine in site.nodes} == {machine.name: [] for machine in site.nodes}
        assert [other.poll() for other in others] == [None, None]


# As the README has it.
SUBMIT = f"""
ssh -N -L 8265:127.0.0.1:8265 {SSH} root@{{head}} &
trap "kill $!" EXIT
until (: </dev/tcp/127.0.0.1/8265) 2>/dev/null; do sleep 0.2; done
cd {ROOT}
RAY_AUTH_MODE=token {BIN}/ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
    python jobs/train.py {{words}}
"""
