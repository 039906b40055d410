"""Serve a classifier over HTTP; a request body is an image, which `mlflow models serve` does not accept.

    curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'

Starlette and uvicorn, which MLflow needs anyway, speak HTTP. There is no login and no TLS, so every user of the machine
can send requests. Put a proxy that has both in front to reach the server from elsewhere, or to keep out other users.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

import uvicorn
from rich.console import Console
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from orchestrator.cli import predict
from orchestrator.config.errors import ConfigError
from orchestrator.data.data_errors import BadSampleError
from orchestrator.ensemble.config import ServeConfig
from orchestrator.evaluation.classifier import Classifier, Prediction
from orchestrator.monitor.formatting import print_line
from orchestrator.ray_backend import signals

CONTENT_TYPES = ("image/jpeg", "image/png")
MAX_BODY_BYTES = 16 * 2**20
MAX_HELD_BYTES = 32 * MAX_BODY_BYTES  # of bodies that are being received
MAX_CONNECTIONS = 512
MAX_WAITING = 16  # requests that wait for the networks, which answer one at a time
HEAD_SECONDS = 10.0  # for the head of a request: silent clients must not keep others out
BODY_SECONDS, LINGER_SECONDS = 60.0, 10.0  # for a body, and for the rest of a rejected one
STOP_SECONDS = 90  # to answer what is in flight when the server is stopped
USAGE = "GET /health, or POST an image to /"
_NUMBER = "[1-9][0-9]{0,8}"
_QUERY = {
    "crops": (_NUMBER, "a whole number from 1"),
    "top": (_NUMBER, "a whole number from 1"),
    "members": (f"{_NUMBER}(,{_NUMBER})*", "whole numbers from 1, such as 1,3"),
}
_log = logging.getLogger(__name__)


def load_connection_class() -> Any:
    """Return uvicorn's class of a connection, closed when the head of its request is not complete in time.

    Return "auto", uvicorn's choice without such a limit, where the class has moved.
    """
    try:
        from uvicorn.protocols.http.h11_impl import H11Protocol  # not documented by uvicorn, so it may move
    except ImportError:
        _log.warning(
            "uvicorn %s has no H11Protocol: clients that send a request head slowly are not disconnected; install the "
            "version of constraints.txt, or put a proxy in front",
            uvicorn.__version__,
        )
        return "auto"

    class TimedConnection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(HEAD_SECONDS, self._check_head)

        def _check_head(self) -> None:
            if not self.cycle:
                self.transport.abort()

    return TimedConnection


class ErrorResponse(JSONResponse):
    """An answer to a request whose body may be unread: the rest is dropped for a while before the connection closes.

    A client that sends a large body before it reads would never see an answer that is followed by a closed connection.
    """

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


async def _handle_error(_: Request, error: Exception) -> Response:
    """Answer a rejected request, or an internal error, which Starlette also logs."""
    if not isinstance(error, HTTPException):
        error = HTTPException(500, f"{type(error).__name__}; the server's log has more")
    usage = f": {USAGE}" if error.detail == HTTPStatus(error.status_code).phrase else ""  # of Starlette's own errors
    headers = {"Connection": "close", **(error.headers or {})}
    return ErrorResponse({"error": f"{error.detail}{usage}"}, error.status_code, headers)


class PredictionServer:
    """An HTTP server that listens once it is made; `run` answers until `stop`, and then the requests in flight.

    One thread predicts, at most MAX_WAITING requests wait for it.
    """

    def __init__(self, classifier: Classifier, config: ServeConfig) -> None:
        """Listen on the address. Raises ConfigError when that fails."""
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            self._socket = socket.create_server((config.host, config.port), family=family)
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"host, port: {config.host}:{config.port}: cannot listen there: {error}") from None
        self.host, self.port = self._socket.getsockname()[:2]
        self._classifier, self._config = classifier, config
        self._thread, self._turn = ThreadPoolExecutor(1, "networks"), asyncio.Lock()  # first come, first served
        self._waiting_count = 0  # includes the request being answered
        self._started: float | None = None  # monotonic seconds; None when idle
        self._last_seconds = 1.0  # seconds that the last prediction took
        self._held_bytes = 0
        app = Starlette(
            routes=[Route("/health", self._handle_health), Route("/", self._handle_predict, methods=["POST"])],
            exception_handlers={HTTPException: _handle_error, Exception: _handle_error},
        )
        app.router.redirect_slashes = False
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=load_connection_class(),
                limit_concurrency=MAX_CONNECTIONS,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="error",
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
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._socket.close()

    def stop(self) -> None:
        """End `run`; callable from any thread and from a signal handler."""
        self._server.should_exit = True

    async def _handle_health(self, _: Request) -> Response:
        """Report whether another image would be accepted: 200, or 503 when too many wait or the server is stopping."""
        full = self._waiting_count >= MAX_WAITING
        state = "stopping" if self._server.should_exit else "busy" if full else "ok"
        seconds = None if self._started is None else round(time.monotonic() - self._started, 1)
        report = {"status": state, "waiting": self._waiting_count, "answering_seconds": seconds}
        return JSONResponse(report, 200 if state == "ok" else 503, {"Connection": "close"})

    async def _handle_predict(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in CONTENT_TYPES:
            raise HTTPException(415, f"Content-Type must be {' or '.join(CONTENT_TYPES)}, got {kind or 'none'}")
        query = _parse_query(request, self._config)
        self._check_capacity()
        try:
            predictions = await self._classify(request, await self._read_body(request), query)
        except ClientDisconnect:
            return Response(status_code=400, headers={"Connection": "close"})
        return JSONResponse({"predictions": [asdict(each) for each in predictions]}, headers={"Connection": "close"})

    async def _read_body(self, request: Request) -> bytes:
        """Return the body. Raises HTTPException for one that is too large or too slow; ClientDisconnect."""
        length, body = request.headers.get("content-length", "0"), bytearray()
        if len(length) > 20 or int(length) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body must have at most {MAX_BODY_BYTES} bytes, got {length[:20]}")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    self._held_bytes += len(chunk)
                    if len(body) > MAX_BODY_BYTES:  # sent in chunks, without a length
                        raise HTTPException(413, f"the body must have at most {MAX_BODY_BYTES} bytes, got more")
                    if self._held_bytes > MAX_HELD_BYTES:
                        raise _make_busy_error("the bodies of other requests take all memory", 1)
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time") from None
        finally:
            self._held_bytes -= len(body)
        return bytes(body)

    def _check_capacity(self) -> None:
        if self._waiting_count >= MAX_WAITING:
            seconds = min(60, max(1, math.ceil(self._waiting_count * self._last_seconds)))
            raise _make_busy_error(f"{self._waiting_count} requests wait already", seconds)

    async def _classify(self, request: Request, image: bytes, query: tuple[int, int, list[int]]) -> list[Prediction]:
        self._check_capacity()
        self._waiting_count += 1
        try:
            async with self._turn:
                if await request.is_disconnected():
                    raise ClientDisconnect
                self._started = time.monotonic()
                try:
                    loop = asyncio.get_running_loop()
                    (answer,) = await loop.run_in_executor(self._thread, self._classifier.classify, [image], *query)
                finally:
                    self._last_seconds, self._started = time.monotonic() - self._started, None
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            self._waiting_count -= 1
        if isinstance(answer, BadSampleError):
            raise HTTPException(422, str(answer))
        return answer


def _make_busy_error(why: str, seconds: int) -> HTTPException:
    return HTTPException(503, f"{why}; try again in {seconds} s", {"Retry-After": str(seconds)})


def _parse_query(request: Request, config: ServeConfig) -> tuple[int, int, list[int]]:
    query = dict(request.query_params)
    for name, text in query.items():
        if name not in _QUERY:
            raise HTTPException(400, f"{name!r} is unknown; use {', '.join(_QUERY)}")
        pattern, wanted = _QUERY[name]
        if not re.fullmatch(pattern, text):
            raise HTTPException(400, f"{name} must be {wanted}, got {text!r}")
    members = [int(number) for number in query.get("members", "").split(",") if number]
    return int(query.get("crops", config.crops)), int(query.get("top", config.top)), members


def run_serve(config: ServeConfig, console: Console) -> int:
    """Serve until Ctrl-C, SIGTERM or SIGHUP; return the exit status.

    Requests in flight are answered first; a second Ctrl-C ends the server immediately. Raises ConfigError, DataError or
    StorageError before it listens.
    """
    stopping = signals.get_stop_signals()
    for number in stopping:
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt
    model, description = predict.load_classifier(config.chosen)
    print_line(console, f"model: {description}")
    endpoint = PredictionServer(model, config)
    for number in stopping:
        signal.signal(number, lambda _, __: endpoint.stop())
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    print_line(console, f"listening on http://{host}:{endpoint.port}")
    if not ip_address(endpoint.host).is_loopback:
        print_line(console, f"{host} can be reached from other machines, and there is no login; put a proxy in front")
    endpoint.run()
    return 0
