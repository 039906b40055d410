"""Stops the Ray of a cluster that `ray up cluster/ssh/cluster.yaml` started, on all of its machines: `down.py CONFIG`.

`ray down` is no help with machines of one's own: it leaves the workers running, and its `ray stop` on the head ends the
Ray of everybody there. This runs `node.sh stop` on each machine, the head first, since it would start workers anew.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml

CONFIG = Path(__file__).with_name("cluster.yaml")
AT_ONCE = 32
NODE = "~/googlenet-orchestrator/cluster/ssh/node.sh"


@dataclass(frozen=True)
class Down:
    """Stop the Ray of a cluster over ssh, and nothing else on its machines."""

    config: tyro.conf.Positional[Path] = CONFIG
    """the launcher's file"""
    ssh: str = "ssh"
    """the ssh client"""
    seconds: float = 150.0
    """patience with each machine"""


def main() -> int:
    """The exit status: 1 when a machine could not be reached or did not stop."""
    down = tyro.cli(Down, description=__doc__)
    config: dict[str, Any] = yaml.safe_load(down.config.read_text(encoding="utf-8"))
    head, *workers = addresses(config)
    failed = [] if stopped(down, config["auth"], head) else [head]
    # All at the same time: each waits for half a minute for the head to drain it.
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(lambda address: stopped(down, config["auth"], address), workers)
        failed += [address for address, well in zip(workers, done, strict=True) if not well]
    if failed:
        print(f"down.py: error: not stopped: {', '.join(failed)}: run `{NODE} stop` there", file=sys.stderr)
    return 1 if failed else 0


def addresses(config: dict[str, Any]) -> list[str]:
    """The machines of a cluster, the head first."""
    provider = config["provider"]
    return [provider.get("external_head_ip") or provider["head_ip"], *provider["worker_ips"]]


def stopped(down: Down, auth: dict[str, str], address: str) -> bool:
    """Return whether a machine stopped what node.sh had started there; nothing running counts."""
    command = [down.ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    # `ray up` keeps no host keys: they may be new here, but one that is known must be the same.
    command += ["-o", "StrictHostKeyChecking=accept-new"]
    if "ssh_private_key" in auth:
        command += ["-i", str(Path(auth["ssh_private_key"]).expanduser())]
    command += [f"{auth['ssh_user']}@{address}", f"{NODE} stop"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=down.seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"{address}: no answer within {down.seconds:g} s", flush=True)
        return False
    print(f"{address}: {(done.stdout + done.stderr).strip() or 'nothing ran'}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
