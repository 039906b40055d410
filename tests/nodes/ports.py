"""Listening ports: the table in docs/operations.md, and its comparison with a machine."""

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
    """The documented ports of a node of one role."""

    # Each of these ports has a listener at each of its addresses, and at no other.
    pinned: dict[int, Set[str]]
    # Ports that may have a listener.
    ranges: list[range]


def documented(role: str, document: Path = DOCUMENT) -> Listening:
    """Return the table's ports of a head or a worker, without the rows that have no number."""
    listening = Listening({}, [])
    for row in _rows(document.read_text()):
        ports, addresses, roles = row[:3]
        if role not in ROLES[roles]:
            continue
        for part in re.findall(r"[\d-]+", ports):
            first, _, last = part.partition("-")
            if last:
                listening.ranges.append(range(int(first), int(last) + 1))
            else:
                assert int(first) not in listening.pinned, f"{document.name} has port {first} twice"
                listening.pinned[int(first)] = ADDRESSES[addresses]
    return listening


def _rows(text: str) -> list[list[str]]:
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(HEADING)) + 2
    table = lines[first : next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def listened(sockets: str, address: str) -> dict[int, set[str]]:
    """Return the addresses by port, in the words of the table, from the output of `ss -Hltn` on a machine."""
    addresses: dict[int, set[str]] = defaultdict(set)
    for line in sockets.splitlines():
        host, _, port = line.split()[3].rpartition(":")
        addresses[int(port)].add(_worded(host, address))
    return dict(addresses)


def _worded(host: str, address: str) -> str:
    plain = host.strip("[]").partition("%")[0]
    if plain == "*":
        return ALL
    parsed = ipaddress.ip_address(plain)
    # IPv4 addresses as IPv6 sockets show them.
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return ALL if parsed.is_unspecified else {address: NODE}.get(str(parsed), str(parsed))


def differences(listening: dict[int, set[str]], expected: Listening) -> list[str]:
    """Return the differences from the documentation, a line for each port and address."""
    lines = []
    for port in sorted(listening.keys() | expected.pinned.keys()):
        if any(port in ports for ports in expected.ranges):
            continue
        here, there = listening.get(port, set()), expected.pinned.get(port, set())
        lines += [f"{port} on {address}: not documented" for address in sorted(here - there)]
        lines += [f"{port} on {address}: documented, but nothing listens" for address in sorted(there - here)]
    return lines
