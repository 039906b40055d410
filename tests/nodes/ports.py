"""What listens where: the table of ports in docs/operations.md, and how a machine compares with it."""

import ipaddress
import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from tests.support.launched import ROOT

DOCUMENT = ROOT / "docs" / "operations.md"
HEADING = "| port | address | on |"
ALL, NODE, LOOPBACK = "all", "the node's", "127.0.0.1"
# Of the columns `address` and `on`.
ADDRESSES = {
    "all": {ALL},
    "the node's": {NODE},
    "the node's and 127.0.0.1": {NODE, LOOPBACK},
    "127.0.0.1": {LOOPBACK},
}
ROLES = {"head": {"head"}, "head, workers": {"head", "worker"}}


@dataclass(frozen=True)
class Listening:
    """Where a node of one role listens by its documentation."""

    # Each of these ports has a listener at each of its addresses, and at no other.
    pinned: dict[int, Set[str]]
    # Ports at which there may be somebody.
    ranges: list[range]


def documented(role: str, document: Path = DOCUMENT) -> Listening:
    """What the table says of a head or a worker. Rows without a number are of what listens now and then."""
    found = Listening({}, [])
    for row in _rows(document.read_text()):
        ports, addresses, roles = row[:3]
        if role not in ROLES[roles]:
            continue
        for part in re.findall(r"[\d-]+", ports):
            first, _, last = part.partition("-")
            if last:
                found.ranges.append(range(int(first), int(last) + 1))
            else:
                assert int(first) not in found.pinned, f"{document.name} has port {first} twice"
                found.pinned[int(first)] = ADDRESSES[addresses]
    return found


def _rows(text: str) -> list[list[str]]:
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(HEADING)) + 2
    table = lines[first : next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def listened(sockets: str, address: str) -> dict[int, set[str]]:
    """What `ss -Hltn` prints on a machine of that address, in the words of the table: addresses by port."""
    found: dict[int, set[str]] = defaultdict(set)
    for line in sockets.splitlines():
        host, _, port = line.split()[3].rpartition(":")
        found[int(port)].add(_worded(host, address))
    return dict(found)


def _worded(host: str, address: str) -> str:
    plain = host.strip("[]").partition("%")[0]
    if plain == "*":
        return ALL
    parsed = ipaddress.ip_address(plain)
    # IPv4 as sockets of IPv6 have it.
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return ALL if parsed.is_unspecified else {address: NODE}.get(str(parsed), str(parsed))


def differences(found: dict[int, set[str]], expected: Listening) -> list[str]:
    """How a machine differs from its documentation, a line for each port and address."""
    told = []
    for port in sorted(found.keys() | expected.pinned.keys()):
        if any(port in ports for ports in expected.ranges):
            continue
        here, there = found.get(port, set()), expected.pinned.get(port, set())
        told += [f"{port} on {one}: not documented" for one in sorted(here - there)]
        told += [f"{port} on {one}: documented, and nobody listens" for one in sorted(there - here)]
    return told
