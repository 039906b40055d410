"""The comparison of listening ports with the documented ones. Needs no nodes."""

from pathlib import Path

import pytest

from tests.nodes import ports
from tests.nodes.ports import ALL, LOOPBACK, NODE

# Of a head, as `ss -Hltn` printed it.
HEAD = """\
LISTEN 0      10             0.0.0.0:6385         0.0.0.0:*
LISTEN 0      5              0.0.0.0:44217        0.0.0.0:*
LISTEN 0      5              0.0.0.0:44227        0.0.0.0:*
LISTEN 0      100          127.0.0.1:8265         0.0.0.0:*
LISTEN 0      128          127.0.0.1:6384         0.0.0.0:*
LISTEN 0      128          10.88.0.1:6384         0.0.0.0:*
LISTEN 0      128          10.88.0.1:6382         0.0.0.0:*
LISTEN 0      4096                 *:6379               *:*
LISTEN 0      4096                 *:6380               *:*
LISTEN 0      4096                 *:6381               *:*
LISTEN 0      4096                 *:6383               *:*
LISTEN 0      4096                 *:10017              *:*
LISTEN 0      4096   [::ffff:127.0.0.1]:6386            *:*
LISTEN 0      4096   [::ffff:10.88.0.1]:6386            *:*
"""
OF_THE_HEAD_ALONE = (":6379 ", ":6386 ", ":8265 ", ":44217 ", ":44227 ")


def compare(sockets: str, role: str = "head") -> list[str]:
    """Return how a machine with these sockets differs from the documentation."""
    return ports.differences(ports.listened(sockets, "10.88.0.1"), ports.documented(role))


def line(local: str) -> str:
    """Return the line of one more socket."""
    return f"LISTEN 0 128 {local} 0.0.0.0:*\n"


def test_a_documented_machine_has_no_differences() -> None:
    assert compare(HEAD) == []
    worker = "".join(one for one in HEAD.splitlines(True) if not any(port in one for port in OF_THE_HEAD_ALONE))
    assert compare(worker, "worker") == []


def test_the_table_is_read() -> None:
    head, worker = ports.documented("head"), ports.documented("worker")
    assert head.pinned[6379] == head.pinned[44227] == {ALL}
    assert head.pinned[6382] == {NODE}
    assert head.pinned[6384] == {NODE, LOOPBACK}
    assert head.pinned[8265] == {LOOPBACK}
    assert head.ranges == worker.ranges == [range(10002, 11000)]
    assert head.pinned.keys() - worker.pinned.keys() == {6379, 6386, 8265, 44217, 44227}
    assert worker.pinned.keys() < head.pinned.keys()


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ("*:7777", "7777 on all: not documented"),
        ("[::]:7777", "7777 on all: not documented"),
        ("127.0.0.1:7777", "7777 on 127.0.0.1: not documented"),
        # Documented ports at other addresses.
        ("*:8265", "8265 on all: not documented"),
        ("0.0.0.0:6382", "6382 on all: not documented"),
        ("10.88.0.1:8265", "8265 on the node's: not documented"),
        ("10.0.0.7%eth1:6384", "6384 on 10.0.0.7: not documented"),
        ("[::1]:6384", "6384 on ::1: not documented"),
        # Next to the ports of workers, any of which may have a listener.
        ("*:10001", "10001 on all: not documented"),
        ("*:11000", "11000 on all: not documented"),
    ],
)
def test_a_socket_that_should_not_be_there_is_found(planted: str, expected: str) -> None:
    assert compare(HEAD + line(planted)) == [expected]


def test_a_listener_that_is_gone_or_has_moved_is_found() -> None:
    assert compare(HEAD.replace("127.0.0.1:8265", "  0.0.0.0:8265")) == [
        "8265 on all: not documented",
        "8265 on 127.0.0.1: documented, but nothing listens",
    ]
    assert compare(HEAD.replace("[::ffff:127.0.0.1]:6386", "*:10018")) == [
        "6386 on 127.0.0.1: documented, but nothing listens"
    ]
    assert "6379 on all: not documented" in compare(HEAD, "worker")


def test_a_table_with_a_port_twice_or_an_unknown_word_is_an_error(tmp_path: Path) -> None:
    document = tmp_path / "operations.md"
    row = "| 6379 | all | head | GCS | the token |\n"
    document.write_text(f"{ports.HEADING}\n|---|\n{row}{row}\nText.\n")
    with pytest.raises(AssertionError, match="port 6379 twice"):
        ports.documented("head", document)
    document.write_text(f"{ports.HEADING}\n|---|\n{row.replace('all', 'most')}\n")
    with pytest.raises(KeyError, match="most"):
        ports.documented("head", document)
