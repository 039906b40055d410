"""Waits for EC2's notice that this spot machine is taken back, two minutes before it is, then runs a command.

spot.py node.sh stop    Ray drains the node when it is asked to end, so what trains here is saved
"""

from __future__ import annotations

import contextlib
import subprocess
import time
import urllib.request
from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Spot:
    """Run a command when EC2 says that this machine is taken back."""

    command: tyro.conf.Positional[tuple[str, ...]]
    """what to run then"""
    metadata: str = "http://169.254.169.254"
    """address of EC2's metadata server"""
    poll_seconds: float = 5.0
    """between two looks, as AWS advises"""


def main() -> int:
    """The exit status of the command."""
    spot = tyro.cli(Spot, description=__doc__)
    print(f"spot.py: waiting for a notice from {spot.metadata}", flush=True)
    while (message := notice(spot.metadata)) is None:
        time.sleep(spot.poll_seconds)
    print(f"spot.py: {message}: running {' '.join(spot.command)}", flush=True)
    return subprocess.run(spot.command, check=False).returncode


def notice(metadata: str) -> str | None:
    """Return EC2's notice as it came; None while there is none, or when the metadata server cannot be reached."""
    with contextlib.suppress(OSError):
        session = ask(f"{metadata}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        # 404, an OSError too, is the usual answer.
        return ask(f"{metadata}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": session})
    return None


def ask(url: str, method: str, headers: dict[str, str]) -> str:
    """An answer of the metadata server. Raises OSError."""
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=2) as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    raise SystemExit(main())
