"""The classifier over HTTP for bodies that are images, which `mlflow models serve` does not take.

    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'

Starlette and uvicorn, which MLflow brings, speak HTTP. What they leave open is bounded here: how long a client may take
over its head and body, how many connections and predictions wait, and what a client gets that sends a refused body. It
has no login and no TLS: every user of the machine can ask it. To reach it from elsewhere, or to keep others of the same
machine out, put a proxy in front that has both.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from typing import NoReturn
from urllib.parse import parse_qsl

import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator.cli import predict
from orchestrator.cli.exit_status import make_console
from orchestrator.config.errors import ConfigError
from orchestrator.data.data_errors import BadSampleError
from orchestrator.ensemble.config import ServeConfig
from orchestrator.evaluation.classifier import Classifier, Prediction
from orchestrator.ray_backend import signals

CONTENT_TYPES = ("image/jpeg", "image/png")
MAX_BODY_BYTES = 16 * 2**20
# For the head of a request; without a byte of its body; for the whole body; for the rest of a body that is refused, and
# for taking an answer. A client that is silent, or very slow, must not keep others out.
HEAD_SECONDS, SILENCE_SECONDS, BODY_SECONDS, LINGER_SECONDS = 10.0, 10.0, 60.0, 10.0
# Requests that wait for the networks, which answer one at a time.
MAX_WAITING = 16
# Bodies in memory, and connections: a newcomer takes the place of the oldest one whose request is not whole yet.
MAX_HELD_BYTES, MAX_CONNECTIONS = 32 * MAX_BODY_BYTES, 512
STOP_SECONDS = 90  # to answer what is in flight when the server is stopped
USAGE = "GET /health, or POST an image to /"

ClientAddress = tuple[str, int]  # of a client: host and port


class RequestError(Exception):
    """A request that cannot be answered, and why."""

    def __init__(self, status: HTTPStatus, why: str, retry_seconds: int | None = None) -> None:
        super().__init__(why)
        self.status, self.retry_seconds = status, retry_seconds


class ConnectionRegistry:
    """All open connections, oldest first; those whose request is not whole give way when there are too many."""

    def __init__(self) -> None:
        self._idle: dict[ClientAddress, TimedConnection] = {}  # no whole head yet, or answered
        self._sending: dict[ClientAddress, TimedConnection] = {}  # a body
        self._answering: dict[ClientAddress, TimedConnection] = {}  # waits for its answer
        self._body_bytes: dict[ClientAddress, int] = {}

    def add(self, address: ClientAddress, connection: TimedConnection) -> None:
        """Take a new connection in; end the oldest one that can give way where there are too many."""
        if len(self._idle) + len(self._sending) + len(self._answering) >= MAX_CONNECTIONS:
            self._drop(next(iter(self._idle or self._sending), address))
        self._idle[address] = connection

    def remove(self, address: ClientAddress) -> None:
        """Forget a connection that has ended."""
        for known in (self._idle, self._sending, self._answering):
            known.pop(address, None)
        self._body_bytes.pop(address, None)

    def start_body(self, address: ClientAddress) -> None:
        """Stop the clock of a request's head, which is whole."""
        if (connection := self._idle.pop(address, None)) is not None:
            self._sending[address] = connection
            connection.set_deadline(None)

    def count_body_bytes(self, address: ClientAddress, size: int) -> None:
        """Count bytes of a body; end the oldest connections that still send where all bodies take too much memory."""
        self._body_bytes[address] = self._body_bytes.get(address, 0) + size
        while sum(self._body_bytes.values()) > MAX_HELD_BYTES and self._sending:
            self._drop(next(iter(self._sending)))

    def finish_body(self, address: ClientAddress) -> None:
        """Keep a connection, whose body is whole, until it is answered."""
        if (connection := self._sending.pop(address, None)) is not None:
            self._answering[address] = connection

    def finish_response(self, address: ClientAddress) -> None:
        """Let an answered connection give way again, and end it when its client does not take the answer."""
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


class TimedConnection(H11Protocol):
    """uvicorn's connection with what it lacks: a time limit for the head of a request and for taking the answer."""

    registry: ConnectionRegistry  # set by the class that an endpoint makes of this one
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first head."""
        super().connection_made(transport)
        self._client_address: ClientAddress = transport.get_extra_info("peername")[:2]
        self._client_transport = transport
        self.set_deadline(HEAD_SECONDS)
        self.registry.add(self._client_address, self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self.set_deadline(None)
        self.registry.remove(self._client_address)
        super().connection_lost(exc)

    def set_deadline(self, seconds: float | None) -> None:
        """End the connection after so many seconds; never for None."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self.abort)

    def abort(self) -> None:
        """End the connection now, whatever is unsent."""
        self._client_transport.abort()


class ErrorResponse(JSONResponse):
    """An answer to a request whose body may not have been read.

    A client that first sends all of a large body would never see an answer that is followed by a closed connection. So
    the answer goes out at once, and the rest of the body is read and dropped, for a while, before the end.
    """

    def __init__(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        super().__init__({"error": why}, status, {"Connection": "close", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, drop the body, end."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        # A client that asked whether it should send the body has its answer.
        if not any(name == b"expect" for name, _ in scope["headers"]):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_discard_body(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard_body(receive: Receive) -> None:
    message: Message = {"type": "http.request", "more_body": True}
    while message["type"] == "http.request" and message.get("more_body", False):
        message = await receive()


class InferenceQueue:
    """The classifier behind a queue: one thread predicts, at most MAX_WAITING requests wait for it."""

    def __init__(self, classifier: Classifier, config: ServeConfig) -> None:
        self._classifier, self._config = classifier, config
        self._lock = asyncio.Lock()  # first come, first served
        self._thread = ThreadPoolExecutor(1, "networks")
        self.waiting_count = 0  # the one that is answered included
        self.started: float | None = None  # monotonic seconds, of the prediction under way
        self._last_seconds = 1.0  # seconds that the last prediction took

    @property
    def is_full(self) -> bool:
        """Whether another request would have to be sent away."""
        return self.waiting_count >= MAX_WAITING

    def check_capacity(self) -> None:
        """Raise RefusedError when too many requests wait already."""
        if self.is_full:
            seconds = min(60, max(1, math.ceil(self.waiting_count * self._last_seconds)))
            why = f"{self.waiting_count} requests wait already; try again in {seconds} s"
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, why, seconds)

    async def classify(self, request: Request, image: bytes) -> list[Prediction] | None:
        """Return the likeliest classes; None when the client has gone meanwhile. Raises RefusedError."""
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
                    (found,) = await running
                finally:
                    self._last_seconds, self.started = time.monotonic() - self.started, None
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from None
        finally:
            self.waiting_count -= 1
        if isinstance(found, BadSampleError):
            raise RequestError(HTTPStatus.UNPROCESSABLE_ENTITY, str(found))
        return found

    def close(self) -> None:
        """Take no more predictions."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class PredictionServer:
    """Listens from its making on; `run` answers until `stop`, then answers what is in flight."""

    def __init__(self, classifier: Classifier, config: ServeConfig) -> None:
        """Raises ConfigError when the address cannot be listened on."""
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
                http=type("Connection", (TimedConnection,), {"registry": self._connections}),
                ws="none",
                lifespan="off",
                loop="asyncio",
                interface="asgi3",
                log_config=None,
                log_level="error",
                access_log=False,
                # A client's own word of where it comes from is nothing to go by.
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )

    def run(self) -> None:
        """Answer until `stop`, SIGINT or SIGTERM, and until all that is in flight is answered."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._queue.close()
            self._socket.close()

    def stop(self) -> None:
        """Have `run` end; from any thread, or a signal's handler."""
        self._server.should_exit = True

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keep the connection's clock while the application answers."""
        address: ClientAddress = tuple(scope["client"])
        self._connections.start_body(address)
        try:
            await self._app(scope, receive, send)
        finally:
            self._connections.finish_response(address)

    async def _handle_health(self, _: Request) -> Response:
        """Say whether another image would be taken: 200, or 503 where too many wait or the server is stopping."""
        networks = self._queue
        state = "stopping" if self._server.should_exit else "busy" if networks.is_full else "ok"
        seconds = None if networks.started is None else round(time.monotonic() - networks.started, 1)
        told = {"status": state, "waiting": networks.waiting_count, "answering_seconds": seconds}
        return JSONResponse(told, 200 if state == "ok" else 503, {"Connection": "close"})

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
        found = None if body is None else await self._queue.classify(request, body)
        if found is None:  # the client has gone
            return Response(status_code=HTTPStatus.BAD_REQUEST, headers={"Connection": "close"})
        return JSONResponse({"predictions": [asdict(guess) for guess in found]}, headers={"Connection": "close"})

    async def _read_body(self, request: Request) -> bytes | None:
        """Return the body; None when its client has gone. Raises RefusedError, or TimeoutError when it is too slow."""
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
    """Serve until Ctrl-C, SIGTERM or SIGHUP; the exit status.

    What is in flight then is answered first; a second Ctrl-C ends it at once. Raises ConfigError, DataError or
    StorageError before it listens.
    """
    stopping = signals.get_stop_signals()
    for number in stopping:
        signal.signal(number, _raise_keyboard_interrupt)

    screen = console or make_console()

    def note(text: str) -> None:
        screen.print(text, highlight=False, markup=False, soft_wrap=True)

    known = predict.load_classifier(config.chosen, note)
    endpoint = PredictionServer(known, config)
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
    """Answer what Starlette itself refuses: another path or method."""
    assert isinstance(error, HTTPException)
    return ErrorResponse(error.status_code, f"{error.detail}: {USAGE}", dict(error.headers or {}))


async def _handle_internal_error(_: Request, error: Exception) -> Response:
    """Answer a fault of ours, which Starlette passes on to the log."""
    return ErrorResponse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}; the server's log has more")


def _parse_query(request: Request) -> tuple[int | None, int | None, Sequence[int]]:
    """Return the crops, top and members that a request asks for. Raises RefusedError."""
    text = request.scope["query_string"].decode("latin-1")
    query = dict(parse_qsl(text, keep_blank_values=True))
    if unknown := query.keys() - {"crops", "top", "members"}:
        raise RequestError(HTTPStatus.BAD_REQUEST, f"{sorted(unknown)[0]!r} is unknown: crops, top and members are not")
    numbers = {name: text.split(",") for name, text in query.items()}
    for name, texts in numbers.items():
        # isdecimal alone takes digits of other scripts, too, which are shown as something else.
        if not all(text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) for text in texts):
            raise RequestError(HTTPStatus.BAD_REQUEST, f"{name}: {query[name]!r} is refused: whole numbers from 1 on")
        if name != "members" and len(texts) > 1:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"{name}: {query[name]!r} is refused: one number")
    crops, top = (int(numbers[name][0]) if name in numbers else None for name in ("crops", "top"))
    return crops, top, [int(text) for text in numbers.get("members", ())]
