"""Serve a classifier over HTTP; a request body is an image, which `mlflow models serve` does not accept.

    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'

Starlette and uvicorn, which MLflow needs anyway, speak HTTP. This module adds the limits that they lack: how long a
client may take over head and body, how many connections and predictions wait, and how a client gets the answer to a
rejected body. There is no login and no TLS, so every user of the machine can send requests. Put a proxy that has both
in front to reach the server from elsewhere, or to keep out other users of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http import HTTPStatus
from ipaddress import ip_address
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from orchestrator.cli import predict
from orchestrator.cli.exit_status import make_console
from orchestrator.config.errors import ConfigError
from orchestrator.data.data_errors import BadSampleError
from orchestrator.ensemble.config import ServeConfig
from orchestrator.evaluation.classifier import Classifier, Prediction
from orchestrator.ray_backend import signals

CONTENT_TYPES = ("image/jpeg", "image/png")
MAX_BODY_BYTES = 16 * 2**20
# Limits for the head of a request, between bytes of its body, for the whole body, and for the rest of a rejected body
# or for reading the answer. A silent or very slow client must not keep others out.
HEAD_SECONDS, SILENCE_SECONDS, BODY_SECONDS, LINGER_SECONDS = 10.0, 10.0, 60.0, 10.0
# Requests that wait for the networks, which answer one at a time.
MAX_WAITING = 16
# Bodies in memory, and connections: a new one replaces the oldest whose request is incomplete.
MAX_HELD_BYTES, MAX_CONNECTIONS = 32 * MAX_BODY_BYTES, 512
STOP_SECONDS = 90  # to answer what is in flight when the server is stopped
USAGE = "GET /health, or POST an image to /"

ClientAddress = tuple[str, int]  # host and port
_log = logging.getLogger(__name__)


class RequestError(Exception):
    """A request that cannot be answered: HTTP status and reason."""

    def __init__(self, status: HTTPStatus, why: str, retry_seconds: int | None = None) -> None:
        super().__init__(why)
        self.status, self.retry_seconds = status, retry_seconds


class ConnectionRegistry:
    """All open connections, oldest first; when there are too many, the oldest with an incomplete request is closed."""

    def __init__(self) -> None:
        self._idle: dict[ClientAddress, TimedConnection] = {}  # the head is incomplete, or the request is answered
        self._sending: dict[ClientAddress, TimedConnection] = {}  # a body
        self._answering: dict[ClientAddress, TimedConnection] = {}  # waiting for the answer
        self._body_bytes: dict[ClientAddress, int] = {}

    def add(self, address: ClientAddress, connection: TimedConnection) -> None:
        """Add a new connection; close the oldest replaceable one when there are too many."""
        if len(self._idle) + len(self._sending) + len(self._answering) >= MAX_CONNECTIONS:
            self._drop(next(iter(self._idle or self._sending), address))
        self._idle[address] = connection

    def remove(self, address: ClientAddress) -> None:
        """Remove a closed connection."""
        for known in (self._idle, self._sending, self._answering):
            known.pop(address, None)
        self._body_bytes.pop(address, None)

    def start_body(self, address: ClientAddress) -> None:
        """Stop the timer of a request's head, which is complete."""
        if (connection := self._idle.pop(address, None)) is not None:
            self._sending[address] = connection
            connection.set_deadline(None)

    def count_body_bytes(self, address: ClientAddress, size: int) -> None:
        """Count bytes of a body; close the oldest connections that still send when all bodies take too much memory."""
        self._body_bytes[address] = self._body_bytes.get(address, 0) + size
        while sum(self._body_bytes.values()) > MAX_HELD_BYTES and self._sending:
            self._drop(next(iter(self._sending)))

    def finish_body(self, address: ClientAddress) -> None:
        """Keep a connection, whose body is complete, until it is answered."""
        if (connection := self._sending.pop(address, None)) is not None:
            self._answering[address] = connection

    def finish_response(self, address: ClientAddress) -> None:
        """Make an answered connection replaceable again; close it later if the client does not read the answer."""
        self._body_bytes.pop(address, None)
        connection = self._answering.pop(address, None) or self._sending.pop(address, None)
        if connection is not None:
            self._idle[address] = connection
            connection.set_deadline(LINGER_SECONDS)

    def _drop(self, address: ClientAddress) -> None:
        connection = self._idle.get(address) or self._sending.get(address)
        self.remove(address)
        if connection is not None:
            connection.abort()


class TimedConnection(asyncio.Protocol):
    """Mix-in for uvicorn's connection: time limits for the head of a request and for reading the answer."""

    registry: ConnectionRegistry  # set in the subclass that a server makes
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timer of the first head."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._client_address: ClientAddress = transport.get_extra_info("peername")[:2]
        self._client_transport = transport
        self.set_deadline(HEAD_SECONDS)
        self.registry.add(self._client_address, self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self.set_deadline(None)
        self.registry.remove(self._client_address)
        super().connection_lost(exc)

    def set_deadline(self, seconds: float | None) -> None:
        """Close the connection after so many seconds; never for None."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self.abort)

    def abort(self) -> None:
        """Close the connection immediately, without sending what is left."""
        self._client_transport.abort()


def _load_connection_class() -> type[asyncio.Protocol] | None:
    """Return uvicorn's HTTP connection; None if this version of uvicorn keeps it elsewhere."""
    try:
        from uvicorn.protocols.http.h11_impl import H11Protocol  # not documented by uvicorn, so it may move
    except ImportError:
        return None
    return H11Protocol


def _choose_connection_options(registry: ConnectionRegistry) -> dict[str, Any]:
    """Return uvicorn's options for timed connections, or else those that bound how many there are."""
    base = _load_connection_class()
    if base is not None:
        return {"http": type("Connection", (TimedConnection, base), {"registry": registry})}
    _log.warning(
        "uvicorn %s has no H11Protocol: clients that send a request head slowly are not disconnected; install the "
        "version of constraints.txt, or put a proxy in front",
        uvicorn.__version__,
    )
    return {"http": "auto", "limit_concurrency": MAX_HELD_BYTES // MAX_BODY_BYTES}


class ErrorResponse(JSONResponse):
    """An answer to a request whose body may be unread.

    A client that sends a large body before it reads would never see an answer that is followed by a closed connection.
    So the answer is sent first; then the rest of the body is read and dropped for a while before the connection closes.
    """

    def __init__(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        super().__init__({"error": why}, status, {"Connection": "close", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, drop the body, close."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        # A client that asked for permission to send the body does not send it after an error.
        if not any(name == b"expect" for name, _ in scope["headers"]):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_discard_body(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard_body(receive: Receive) -> None:
    message: Message = {"type": "http.request", "more_body": True}
    while message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()


class InferenceQueue:
    """Queue in front of the classifier: one thread predicts, at most MAX_WAITING requests wait."""

    def __init__(self, classifier: Classifier, config: ServeConfig) -> None:
        self._classifier, self._config = classifier, config
        self._lock = asyncio.Lock()  # first come, first served
        self._thread = ThreadPoolExecutor(1, "networks")
        self.waiting_count = 0  # includes the one being answered
        self.started: float | None = None  # monotonic seconds; None when idle
        self._last_seconds = 1.0  # seconds that the last prediction took

    @property
    def is_full(self) -> bool:
        """True when another request would be rejected."""
        return self.waiting_count >= MAX_WAITING

    def check_capacity(self) -> None:
        """Raise RequestError when too many requests wait already."""
        if self.is_full:
            seconds = min(60, max(1, math.ceil(self.waiting_count * self._last_seconds)))
            why = f"{self.waiting_count} requests wait already; try again in {seconds} s"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, why, seconds)

    async def classify(self, request: Request, image: bytes) -> list[Prediction] | None:
        """Return the most likely classes; None when the client has disconnected. Raises RequestError."""
        self.check_capacity()
        crops, top, members = _parse_query(request)
        self.waiting_count += 1
        try:
            async with self._lock:
                if await request.is_disconnected():
                    return None
                self.started = time.monotonic()
                call = (
                    [image],
                    self._config.crops if crops is None else crops,
                    self._config.top if top is None else top,
                    members,
                )
                try:
                    running = asyncio.get_running_loop().run_in_executor(self._thread, self._classifier.classify, *call)
                    (predictions,) = await running
                finally:
                    self._last_seconds, self.started = time.monotonic() - self.started, None
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from None
        finally:
            self.waiting_count -= 1
        if isinstance(predictions, BadSampleError):
            raise RequestError(HTTPStatus.UNPROCESSABLE_ENTITY, str(predictions))
        return predictions

    def close(self) -> None:
        """Accept no more predictions."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class PredictionServer:
    """An HTTP server that listens once it is made; `run` answers until `stop`, and then the requests in flight."""

    def __init__(self, classifier: Classifier, config: ServeConfig) -> None:
        """Listen on the address. Raises ConfigError when that fails."""
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            self._socket = socket.create_server((config.host, config.port), family=family)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"host, port: {config.host}:{config.port}: cannot listen there: {error}") from None
        self.host, self.port = self._socket.getsockname()[:2]
        self._queue, self._connections = InferenceQueue(classifier, config), ConnectionRegistry()
        self._app = Starlette(
            routes=[Route("/health", self._handle_health), Route("/", self._handle_predict, methods=["POST"])],
            exception_handlers={
                RequestError: _handle_request_error,
                HTTPException: _handle_http_exception,
                Exception: _handle_internal_error,
            },
        )
        self._app.router.redirect_slashes = False
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._handle_request,
                **_choose_connection_options(self._connections),
                ws="none",
                lifespan="off",
                loop="asyncio",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                # Clients could claim any address in a proxy's headers.
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    def run(self) -> None:
        """Answer until `stop`, SIGINT or SIGTERM, and then until the requests in flight are answered."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._queue.close()
            self._socket.close()

    def stop(self) -> None:
        """End `run`; callable from any thread and from a signal handler."""
        self._server.should_exit = True

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Update the connection's timers while the application answers."""
        address: ClientAddress = tuple(scope["client"])
        self._connections.start_body(address)
        try:
            await self._app(scope, receive, send)
        finally:
            self._connections.finish_response(address)

    async def _handle_health(self, _: Request) -> Response:
        """Report whether another image would be accepted: 200, or 503 when too many wait or the server is stopping."""
        networks = self._queue
        state = "stopping" if self._server.should_exit else "busy" if networks.is_full else "ok"
        seconds = None if networks.started is None else round(time.monotonic() - networks.started, 1)
        report = {"status": state, "waiting": networks.waiting_count, "answering_seconds": seconds}
        return JSONResponse(report, 200 if state == "ok" else 503, {"Connection": "close"})

    async def _handle_predict(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in CONTENT_TYPES:
            why = f"Content-Type must be {' or '.join(CONTENT_TYPES)}, got {kind or 'none'}"
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, why)
        _parse_query(request)
        self._queue.check_capacity()
        try:
            body = await self._read_body(request)
        except TimeoutError:
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time") from None
        predictions = None if body is None else await self._queue.classify(request, body)
        if predictions is None:  # the client has disconnected
            return Response(status_code=HTTPStatus.BAD_REQUEST, headers={"Connection": "close"})
        return JSONResponse({"predictions": [asdict(each) for each in predictions]}, headers={"Connection": "close"})

    async def _read_body(self, request: Request) -> bytes | None:
        """Return the body; None when the client has disconnected. Raises RequestError, or TimeoutError."""
        length = request.headers.get("content-length", "0")
        if len(length) > 20 or int(length) > MAX_BODY_BYTES:
            why = f"the body must have at most {MAX_BODY_BYTES} bytes, got {length[:20]}"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        address: ClientAddress = tuple(request.scope["client"])
        body, deadline, more = bytearray(), time.monotonic() + BODY_SECONDS, True
        while more:
            left = min(SILENCE_SECONDS, deadline - time.monotonic())
            message = await asyncio.wait_for(request.receive(), left)
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:  # sent in chunks, without a length
                why = f"the body must have at most {MAX_BODY_BYTES} bytes, got more"
                raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
            self._connections.count_body_bytes(address, len(message.get("body", b"")))
        self._connections.finish_body(address)
        return bytes(body)


def run_serve(config: ServeConfig, console: Console | None = None) -> int:
    """Serve until Ctrl-C, SIGTERM or SIGHUP; return the exit status.

    Requests in flight are answered first; a second Ctrl-C ends the server immediately. Raises ConfigError, DataError or
    StorageError before it listens.
    """
    stopping = signals.get_stop_signals()
    for number in stopping:
        signal.signal(number, _raise_keyboard_interrupt)

    screen = console or make_console()

    def note(text: str) -> None:
        screen.print(text, highlight=False, markup=False, soft_wrap=True)

    endpoint = PredictionServer(predict.load_classifier(config.chosen, note), config)
    for number in stopping:
        signal.signal(number, lambda _, __: endpoint.stop())
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    note(f"listening on http://{host}:{endpoint.port}")
    if not ip_address(endpoint.host).is_loopback:
        note(
            f"{endpoint.host} can be reached from other machines, and there is no login; put a proxy with one in front"
        )
    endpoint.run()
    return 0


def _raise_keyboard_interrupt(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


async def _handle_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_seconds is None else {"Retry-After": str(error.retry_seconds)}
    return ErrorResponse(error.status, str(error), headers)


async def _handle_http_exception(_: Request, error: Exception) -> Response:
    """Answer a path or method that Starlette rejects."""
    assert isinstance(error, HTTPException)
    return ErrorResponse(error.status_code, f"{error.detail}: {USAGE}", dict(error.headers or {}))


async def _handle_internal_error(_: Request, error: Exception) -> Response:
    """Answer an internal error, which Starlette also logs."""
    return ErrorResponse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}; the server's log has more")


def _parse_query(request: Request) -> tuple[int | None, int | None, Sequence[int]]:
    """Return crops, top and members of a request. Raises RequestError."""
    text = request.scope["query_string"].decode("latin-1")
    query = dict(parse_qsl(text, keep_blank_values=True))
    if unknown := query.keys() - {"crops", "top", "members"}:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"{sorted(unknown)[0]!r} is unknown; use crops, top and members")
    numbers = {name: text.split(",") for name, text in query.items()}
    for name, texts in numbers.items():
        # isdecimal alone accepts digits of other scripts as well.
        if not all(text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) for text in texts):
            raise RequestError(HTTPStatus.BAD_REQUEST, f"{name}: must be whole numbers from 1, got {query[name]!r}")
        if name != "members" and len(texts) > 1:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"{name}: must be one number, got {query[name]!r}")
    crops, top = (int(numbers[name][0]) if name in numbers else None for name in ("crops", "top"))
    return crops, top, [int(text) for text in numbers.get("members", ())]
