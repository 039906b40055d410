"""The classifier over HTTP for bodies that are images, which `mlflow models serve` refuses.

    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'

The standard library's server is enough for an endpoint that does one thing; Ray Serve would bring packages of its own
and a cluster. It has no login and no TLS: to reach it from elsewhere, put a proxy before it that has both.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import NoReturn
from urllib.parse import parse_qsl, urlsplit

from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.data.errors import BadSampleError
from orchestrator.ensemble import predicting
from orchestrator.ensemble.predicting_config import Serve
from orchestrator.evaluation.classifier import Classifier, Guess
from orchestrator.launch import interrupt

TYPES = ("image/jpeg", "image/png")
MAX_BODY_BYTES = 16 * 2**20
# Without a byte, and for a whole body: who says nothing, or very little, must not keep others out.
SILENCE_SECONDS, BODY_SECONDS = 30.0, 60.0
# Requests that are read or wait for the networks, which answer one at a time; more would only fill the memory.
MAX_WAITING = 16


class RefusedError(Exception):
    """A request that cannot be answered, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Endpoint(ThreadingHTTPServer):
    """Listens from its making on; `serve_forever` answers, until `shutdown` from another thread."""

    daemon_threads = True

    def __init__(self, classifier: Classifier, config: Serve) -> None:
        """Raises ConfigError when the address cannot be listened on."""
        self._classifier, self._config = classifier, config
        self._networks = threading.Lock()
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            raise ConfigError(f"host, port: {config.host}:{config.port}: cannot listen there: {error}") from None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no trouble of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Room for one request. Raises RefusedError when there is none."""
        if not self._waiting.acquire(blocking=False):
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_WAITING} requests wait already; try again")
        try:
            yield
        finally:
            self._waiting.release()

    def answer(self, image: bytes, crops: int | None, top: int | None, members: Sequence[int]) -> list[Guess]:
        """The likeliest classes; None is the configured default. Raises RefusedError."""
        try:
            with self._networks:
                (found,) = self._classifier.classify(
                    [image], crops or self._config.crops, top or self._config.top, members
                )
        except ValueError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from None
        if isinstance(found, BadSampleError):
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(found))
        return found


def serve(config: Serve, screen: Console) -> int:
    """Serve until Ctrl-C, SIGTERM or SIGHUP; the exit status.

    Raises ConfigError, DataError or StorageError before that.
    """
    for number in interrupt.ending_signals():
        signal.signal(number, _interrupt)
    known = predicting.opened(config.chosen, lambda text: screen.print(text, highlight=False, markup=False))
    with Endpoint(known, config) as endpoint:
        host, port = endpoint.server_address[:2]
        screen.print(f"listening on http://{host!s}:{port}", highlight=False, markup=False)
        try:
            endpoint.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    timeout = SILENCE_SECONDS
    protocol_version = "HTTP/1.1"  # curl waits a second before it sends a photograph to an older one
    server_version, sys_version = "orchestrator", ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "GET /health, or POST an image to /"})

    def do_POST(self) -> None:
        try:
            with self.server.turn():
                asked = _asked(self.path)
                found = self.server.answer(self._body(), *asked)
            self._send(HTTPStatus.OK, {"predictions": [asdict(guess) for guess in found]})
        except RefusedError as error:
            self._send(error.status, {"error": str(error)})
        except TimeoutError:
            self._send(HTTPStatus.REQUEST_TIMEOUT, {"error": "the body did not come"})

    def _body(self) -> bytes:
        kind = self.headers.get_content_type()
        if kind not in TYPES:
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"{kind} is refused: send {' or '.join(TYPES)}")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        if int(length) > MAX_BODY_BYTES:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes is refused: at most {MAX_BODY_BYTES}"
            )
        return self._read(int(length))

    def _read(self, length: int) -> bytes:
        body, deadline = bytearray(), time.monotonic() + BODY_SECONDS
        while len(body) < length:
            piece = self.rfile.read1(min(length - len(body), 2**16))
            if not piece:
                raise RefusedError(HTTPStatus.BAD_REQUEST, f"the body ended after {len(body)} of {length} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError
            body += piece
        return bytes(body)

    def _send(self, status: HTTPStatus, told: dict[str, object]) -> None:
        body = json.dumps(told).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        # A body that was refused unread must not be taken for the next request.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _asked(path: str) -> tuple[int | None, int | None, list[int]]:
    """Crops, top and members that a request asks for. Raises RefusedError."""
    parts = urlsplit(path)
    if parts.path != "/":
        raise RefusedError(HTTPStatus.NOT_FOUND, "POST an image to /")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := query.keys() - {"crops", "top", "members"}:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"{sorted(unknown)[0]!r} is unknown: crops, top and members are not")
    numbers = {name: text.split(",") for name, text in query.items()}
    for name, texts in numbers.items():
        if not all(text.isdecimal() and len(text) <= 9 and int(text) for text in texts):
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{name}: {query[name]!r} is refused: whole numbers from 1 on")
        if name != "members" and len(texts) > 1:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{name}: {query[name]!r} is refused: one number")
    crops, top = (int(numbers[name][0]) if name in numbers else None for name in ("crops", "top"))
    return crops, top, [int(text) for text in numbers.get("members", ())]
