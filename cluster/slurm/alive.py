"""Wait until the nodes of a Ray cluster are there: `alive.py HOST:PORT NODES LEAST SECONDS`.

Ends with 0 as soon as all are, or after so many seconds when at least LEAST are; else with 1.
"""

from __future__ import annotations

import socket
import sys
import time
from importlib import import_module
from typing import Any

_raylet: Any = import_module("ray._raylet")  # Ray's types do not name what is used here

ALIVE = 0  # a node's state, as the head keeps it
LOOK_SECONDS = 1.0


def main(address: str, nodes: int, least: int, seconds: float) -> int:
    """The exit status."""
    began = time.monotonic()
    found, printed = 0, -1
    while found < nodes and time.monotonic() - began < seconds:
        time.sleep(LOOK_SECONDS if printed >= 0 else 0)
        found = alive(address)
        if found != printed:
            print(f"{time.strftime('%T')} {found} of {nodes} nodes, after {time.monotonic() - began:.0f} s", flush=True)
            printed = found
    if found >= least:
        if found < nodes:
            print(f"going on with {found} of {nodes} nodes: the others did not come in {seconds:g} s")
        return 0
    print(f"error: {found} of {nodes} nodes after {seconds:g} s, at least {least} are needed", file=sys.stderr)
    return 1


def alive(address: str) -> int:
    """Return how many nodes there are; 0 while the head does not answer."""
    host, _, port = address.rpartition(":")
    try:
        # Asked first: Ray's client would try for long, and loudly.
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        return 0
    return sum(node.state == ALIVE for node in _raylet.GcsClient(address=address).get_all_node_info().values())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
