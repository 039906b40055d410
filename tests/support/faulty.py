"""An HTTP proxy on 127.0.0.1 that delays and breaks answers by plan, before an S3 server.

It forwards heads as they are (signatures cover Host), keeps connections alive and streams bodies in large pieces. In
tests it runs on threads, so that a test can change its plan; benchmarks run it as a process of its own: `delayed`.
"""

import argparse
import itertools
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tests.support.s3 import launched

PIECE_BYTES = 2**20
REMEMBERED = 10_000
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Request:
    """A request, by which a plan decides. `number` counts a proxy's requests from 0; header names are in lower case."""

    number: int
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Fault:
    """The fault of a request: an error in its place, an answer that is lost, or a body that ends badly.

    reset_after, cut_after and stall_after: after so many bytes of the body.
    """

    status: int = 0
    code: str = "InternalError"
    lost: bool = False  # the server has done it, and the connection closes
    reset_after: int | None = None
    cut_after: int | None = None
    stall_after: int | None = None


Plan = Callable[[Request], Fault | None]

SLOW_DOWN = Fault(503, "SlowDown")
INTERNAL = Fault(500, "InternalError")
DENIED = Fault(403, "AccessDenied")
NO_KEY = Fault(404, "NoSuchKey")


def sequence(*faults: Fault | None, method: str = "GET") -> Plan:
    """The faults, one for each request by that method, in order; none after the last."""
    left, lock = deque(faults), threading.Lock()

    def plan(request: Request) -> Fault | None:
        with lock:
            return left.popleft() if left and request.method == method else None

    return plan


class Proxy:
    """A proxy on threads of this process. `plan` may be changed at any time."""

    def __init__(self, upstream: str, plan: Plan | None = None, latency_seconds: float = 0.0) -> None:
        where = urlsplit(upstream)
        self._upstream = (where.hostname or "127.0.0.1", where.port or 80)
        self.plan = plan
        self.latency_seconds = latency_seconds
        self.requests: deque[Request] = deque(maxlen=REMEMBERED)
        self.num_requests = 0
        self.bytes = 0  # of bodies, to clients
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, name="faulty", daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Close everything. Threads that still hold a connection end by that."""
        self._stopped.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(10)
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    # -------------------------------------------------------------- connections
    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(client,), name="faulty", daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        try:
            with client, suppress(OSError, ValueError):
                self._prepared(client)
                server = self._prepared(socket.create_connection(self._upstream, timeout=IDLE_SECONDS))
                with server, client.makefile("rb") as asked, server.makefile("rb") as answered:
                    while self._exchange(client, asked, server, answered):
                        pass
        finally:
            with self._lock:
                self._open -= {client, server}

    def _prepared(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(IDLE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self._stopped.is_set():
                raise OSError("stopped")
            self._open.add(connection)
        return connection

    def _exchange(self, client: socket.socket, asked: BinaryIO, server: socket.socket, answered: BinaryIO) -> bool:
        """One request and its answer; False when the connection is over."""
        head, first, headers = _read_head(asked)
        if not head:
            return False
        method, path, *_ = first.split(" ")
        with self._lock:
            request = Request(next(self._numbers), method, path, headers)
            self.num_requests += 1
        self.requests.append(request)
        fault = self.plan(request) if self.plan else None
        if self.latency_seconds and self._stopped.wait(self.latency_seconds):
            return False
        if "expect" in headers:
            # Not signed, and answered here: the server then needs no word of it.
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"".join(line for line in head.splitlines(keepends=True) if not line.lower().startswith(b"expect:"))
        if fault is not None and fault.status:
            _relay(asked, None, headers)
            _answer(client, fault, method)
            return True
        server.sendall(head)
        _relay(asked, server.sendall, headers)
        head, first, headers = _read_head(answered)
        if not head or (fault is not None and fault.lost):
            return False
        client.sendall(head)
        if method == "HEAD" or first.split(" ")[1] in {"204", "304"}:
            return True
        return self._pass_on(client, answered, headers, fault or Fault())

    def _pass_on(self, client: socket.socket, answered: BinaryIO, headers: Mapping[str, str], fault: Fault) -> bool:
        """An answer's body, or as much of it as the fault lets through."""
        ends = [end for end in (fault.reset_after, fault.cut_after, fault.stall_after) if end is not None]

        def send(piece: memoryview | bytes) -> None:
            client.sendall(piece)
            self.bytes += len(piece)

        _relay(answered, send, headers, limit=min(ends, default=None))
        if fault.stall_after is not None:
            # Until the client gives up and closes, or the test ends.
            client.settimeout(IDLE_SECONDS)
            client.recv(1)
        elif fault.reset_after is not None:
            # Closed with bytes lingering for no time at all: the peer sees a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return not ends


# ------------------------------------------------------------------ HTTP
def _read_head(stream: BinaryIO) -> tuple[bytes, str, dict[str, str]]:
    """The bytes of a head, its first line and its headers; empty at the end of the stream."""
    lines = _head_lines(stream)
    if not lines:
        return b"", "", {}
    split = (line.decode("latin-1").partition(":") for line in lines[1:-1])
    headers = {name.strip().lower(): value.strip() for name, _, value in split}
    return b"".join(lines), lines[0].decode("latin-1").strip(), headers


def _head_lines(stream: BinaryIO) -> list[bytes]:
    lines: list[bytes] = []
    while not lines or lines[-1] != b"\r\n":
        line = stream.readline(2**16)
        if not line:
            return []
        lines.append(line)
    return lines


def _relay(
    source: BinaryIO,
    send: Callable[[memoryview | bytes], object] | None,
    headers: Mapping[str, str],
    limit: int | None = None,
) -> None:
    """A body as it comes, up to `limit` bytes; dropped without `send`."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = source.readline(2**16)
            if send:
                send(line)
            size = int(line.split(b";")[0], 16)
            _copy(source, send, size + 2)
            if size == 0:
                return
    length = int(headers.get("content-length", 0))
    _copy(source, send, length if limit is None else min(length, limit))


def _copy(source: BinaryIO, send: Callable[[memoryview | bytes], object] | None, length: int) -> None:
    piece = memoryview(bytearray(min(length, PIECE_BYTES)))
    while length:
        count = source.readinto1(piece[: min(length, PIECE_BYTES)])  # type: ignore[attr-defined]
        if not count:
            raise OSError("the peer closed")
        if send:
            send(piece[:count])
        length -= count


def _answer(client: socket.socket, fault: Fault, method: str) -> None:
    """An error as S3 tells it."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.code}</Code>'
        f"<Message>made by the test</Message><RequestId>0</RequestId></Error>"
    ).encode()
    head = (
        f"HTTP/1.1 {fault.status} {fault.code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    client.sendall(head if method == "HEAD" else head + body)


# ------------------------------------------------------------------ running
@contextmanager
def proxied(upstream: str, plan: Plan | None = None, latency_seconds: float = 0.0) -> Iterator[Proxy]:
    """A proxy on threads while the block runs."""
    proxy = Proxy(upstream, plan, latency_seconds)
    try:
        yield proxy
    finally:
        proxy.stop()


@contextmanager
def delayed(upstream: str, latency_seconds: float, cpus: Collection[int] = ()) -> Iterator[str]:
    """The endpoint of a proxy in a process of its own that delays every request, pinned to `cpus` if there are any."""
    root = Path(__file__).resolve().parent.parent.parent
    arguments = ("-m", "tests.support.faulty", "--upstream", upstream, "--latency", str(latency_seconds))
    process = subprocess.Popen(
        launched(sys.executable, *arguments, cpus=cpus),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    try:
        assert process.stdout is not None
        # Its first line, or the end of the file when it fails: it waits for nothing before.
        endpoint = process.stdout.readline().strip()
        assert endpoint.startswith("http://"), f"the proxy ended with {process.poll()}"
        yield endpoint
    finally:
        process.kill()
        process.communicate(timeout=10)


def main() -> None:
    """Run a proxy until standard input ends, which it does with the parent."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--latency", type=float, default=0.0)
    arguments = parser.parse_args()
    with proxied(arguments.upstream, latency_seconds=arguments.latency) as proxy:
        print(proxy.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
