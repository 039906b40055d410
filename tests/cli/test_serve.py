import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.cli import serve
from orchestrator.cli.serve import PredictionServer
from orchestrator.config.errors import ConfigError
from orchestrator.ensemble.config import ServeConfig
from orchestrator.evaluation.classifier import Classifier, Prediction
from tests.support import ensembles, tiny_shards

JPEG = {"Content-Type": "image/jpeg"}
IMAGE = tiny_shards.jpeg(1, 40, 31)
SECONDS = 60.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with ensembles.one_thread():
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    runs = ensembles.members(tmp_path_factory.mktemp("runs"))
    return Classifier([f"{run}/final" for run in runs])


@contextmanager
def running(classifier: Classifier) -> Iterator[PredictionServer]:
    made = PredictionServer(classifier, ServeConfig(port=0, top=2))
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join()


@pytest.fixture
def endpoint(known: Classifier) -> Iterator[PredictionServer]:
    with running(known) as made:
        yield made


class Slow:
    """A classifier that answers when it is let."""

    def __init__(self) -> None:
        self.began, self.let = threading.Semaphore(0), threading.Event()

    def classify(self, images: list[bytes], *_: object) -> list[list[Prediction]]:
        self.began.release()
        assert self.let.wait(SECONDS)
        return [[Prediction(0, "cat", 1.0)] for _ in images]


@pytest.fixture
def slow() -> Iterator[tuple[PredictionServer, Slow]]:
    classifier = Slow()
    with running(cast("Classifier", classifier)) as made:
        yield made, classifier
        classifier.let.set()


def ask(
    endpoint: PredictionServer,
    path: str = "/",
    body: bytes = IMAGE,
    headers: dict[str, str] = JPEG,
    method: str = "POST",
) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", endpoint.port, timeout=SECONDS)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text.startswith(b"{") else text
    finally:
        connection.close()


def health(endpoint: PredictionServer) -> tuple[int, Any]:
    return ask(endpoint, "/health", b"", {}, "GET")


@contextmanager
def sent(endpoint: PredictionServer, text: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", endpoint.port), SECONDS) as client:
        client.sendall(text)
        yield client


def rest(client: socket.socket) -> bytes:
    """All that still comes; a connection that is reset counts as ended."""
    answer = b""
    try:
        while piece := client.recv(4096):
            answer += piece
    except ConnectionResetError:
        pass
    return answer


def raw(endpoint: PredictionServer, text: bytes) -> bytes:
    """All that is answered to these bytes."""
    with sent(endpoint, text) as client:
        return rest(client)


def head(length: int | str = 50, kind: str = "image/jpeg") -> bytes:
    return f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


def get_labels(answer: Any) -> list[int]:
    return [one["label"] for one in answer["predictions"]]


def test_an_image_gets_its_likeliest_classes(endpoint: PredictionServer, known: Classifier) -> None:
    status, answer = ask(endpoint)
    (guesses,) = known.classify([IMAGE], 10, 2)
    assert isinstance(guesses, list)
    assert status == 200
    assert get_labels(answer) == [guess.label for guess in guesses]
    assert answer["predictions"][0] == {
        "label": guesses[0].label,
        "class_name": tiny_shards.CLASSES[guesses[0].label],
        "probability": guesses[0].probability,
    }


def test_a_request_chooses_crops_members_and_how_many(endpoint: PredictionServer, known: Classifier) -> None:
    png = tiny_shards.encoded("RGB", "PNG", 3)
    status, answer = ask(endpoint, "/?crops=144&top=3&members=3,1", png, {"Content-Type": "image/png"})
    (guesses,) = known.classify([png], 144, 3, [3, 1])
    assert isinstance(guesses, list)
    assert (status, get_labels(answer)) == (200, [guess.label for guess in guesses])
    assert answer["predictions"][0]["probability"] == guesses[0].probability


def test_health_reports_an_idle_server(endpoint: PredictionServer) -> None:
    assert health(endpoint) == (200, {"status": "ok", "waiting": 0, "answering_seconds": None})
    assert ask(endpoint, "/health", b"", {}, "HEAD") == (200, b"")


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/", b"no image", JPEG, 422, "no JPEG or PNG"),
        ("/", IMAGE[:-60], JPEG, 422, "broken JPEG"),
        ("/", b"", JPEG, 422, "no JPEG or PNG"),
        ("/", b"{}", {"Content-Type": "application/json"}, 415, ", got application/json"),
        ("/", IMAGE, {}, 415, "must be image/jpeg or image/png, got none"),
        ("/?crops=7", IMAGE, JPEG, 400, "must be one of 1, 10, 144"),
        ("/?crops=0", IMAGE, JPEG, 400, "crops must be a whole number from 1, got '0'"),
        ("/?crops=%D9%A3", IMAGE, JPEG, 400, "must be a whole number"),
        ("/?crops=1,10", IMAGE, JPEG, 400, "crops must be a whole number from 1, got '1,10'"),
        ("/?top=x", IMAGE, JPEG, 400, "top must be a whole number from 1, got 'x'"),
        ("/?top=" + "9" * 5000, IMAGE, JPEG, 400, "must be a whole number"),
        ("/?members=4", IMAGE, JPEG, 400, "members must"),
        ("/?members=1,", IMAGE, JPEG, 400, "members must be whole numbers from 1, such as 1,3, got '1,'"),
        ("/?crop=10", IMAGE, JPEG, 400, "'crop' is unknown"),
        ("/predict", IMAGE, JPEG, 404, "POST an image to /"),
    ],
)
def test_an_error_says_what_is_wrong(
    endpoint: PredictionServer, path: str, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    found, answer = ask(endpoint, path, body, headers)
    assert (found, message in answer["error"]) == (status, True), answer
    assert ask(endpoint)[0] == 200  # and the next one is answered


def test_other_pages_and_methods_are_rejected(endpoint: PredictionServer) -> None:
    assert ask(endpoint, "/else", b"", {}, "GET")[0] == 404
    status, answer = ask(endpoint, "/", b"", {}, "GET")
    assert (status, answer["error"]) == (405, "Method Not Allowed: GET /health, or POST an image to /")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"GET //[/health HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (head("9" * 5000), b"400"),
        (head("9" * 19), b"413"),
        (head("many"), b"400"),
        (head("-5"), b"400"),
        (b"\x00\xff nonsense\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10**6 + b"\r\n\r\n", b"400"),
    ],
)
def test_odd_requests_are_answered_without_a_traceback(
    endpoint: PredictionServer,
    text: bytes,
    status: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "LINGER_SECONDS", 0.1)
    answer = raw(endpoint, text)
    assert not answer or answer.split()[1] == status  # of a head without end only the connection's end is seen
    assert not [record for record in caplog.records if record.exc_info]
    assert health(endpoint)[0] == 200


@pytest.mark.parametrize(("size", "kind", "status"), [(3_000_000, "image/gif", 415), (20_000_000, "image/jpeg", 413)])
def test_a_client_that_sends_a_large_rejected_body_gets_the_answer(
    endpoint: PredictionServer, size: int, kind: str, status: int
) -> None:
    assert [ask(endpoint, "/", b"x" * size, {"Content-Type": kind})[0] for _ in range(3)] == [status] * 3


def test_a_rejected_body_is_not_requested(endpoint: PredictionServer) -> None:
    asking = head(20_000_000).replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    assert raw(endpoint, asking).startswith(b"HTTP/1.1 413 ")  # and not 100 first


def test_a_body_in_chunks_is_taken_up_to_the_limit(endpoint: PredictionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(times: int) -> list[bytes]:
        return [IMAGE[:100], IMAGE[100:], *[b"x" * 2**16] * times]

    def asked(times: int) -> int:
        connection = HTTPConnection("127.0.0.1", endpoint.port, timeout=SECONDS)
        connection.request("POST", "/", iter(pieces(times)), JPEG, encode_chunked=True)
        found = connection.getresponse().status
        connection.close()
        return found

    assert asked(0) == 200
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 2**20)
    assert asked(20) == 413


def test_a_body_that_ends_early_is_dropped(endpoint: PredictionServer) -> None:
    with sent(endpoint, head() + b"abc") as client:
        client.shutdown(socket.SHUT_WR)
        rest(client)
    assert ask(endpoint)[0] == 200


def test_a_client_that_sends_no_body_is_answered(endpoint: PredictionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BODY_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(serve, name, 0.2)
    assert raw(endpoint, head()).startswith(b"HTTP/1.1 408 ")


def test_a_body_sent_byte_by_byte_times_out(endpoint: PredictionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(serve, "LINGER_SECONDS", 0.1)
    with sent(endpoint, head(10**6)) as client:
        dropping = True
        while dropping:
            try:
                client.sendall(b"x")
                client.settimeout(0.05)
                dropping = not client.recv(4096).startswith(b"HTTP/1.1 408 ")
            except TimeoutError:
                continue
    assert health(endpoint)[0] == 200


def test_unsent_bodies_do_not_block_other_clients(endpoint: PredictionServer) -> None:
    with ExitStack() as open_ones:
        for _ in range(3 * serve.MAX_WAITING):
            open_ones.enter_context(sent(endpoint, head(10**6) + b"x"))
        assert ask(endpoint)[0] == 200
        assert health(endpoint)[0] == 200


def test_too_many_connections_are_turned_away(known: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 4)
    with running(known) as endpoint:
        with ExitStack() as open_ones:
            for _ in range(2):
                open_ones.enter_context(sent(endpoint, b"POST /"))
            assert health(endpoint)[0] == 200
            open_ones.enter_context(sent(endpoint, b"POST /"))
            assert ask(endpoint)[0] == 503
        while health(endpoint)[0] == 503:
            pass


def test_a_client_that_sends_no_head_is_disconnected(
    endpoint: PredictionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.2)
    with sent(endpoint, b"POST /") as client, contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    with sent(endpoint, head(len(IMAGE))) as client:  # its head is complete
        time.sleep(0.4)
        client.sendall(IMAGE)
        assert rest(client).startswith(b"HTTP/1.1 200 ")


def test_bodies_together_take_a_bounded_memory(endpoint: PredictionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MAX_HELD_BYTES", 2**20)
    monkeypatch.setattr(serve, "LINGER_SECONDS", 0.1)
    with ExitStack() as open_ones:
        clients = [open_ones.enter_context(sent(endpoint, head(10**6) + b"x" * 400_000)) for _ in range(3)]
        select.select(clients, [], [], SECONDS)  # the last body of the three is rejected
        (rejected,) = select.select(clients, [], [], 0)[0]
        assert rest(rejected).startswith(b"HTTP/1.1 503 ")
        assert ask(endpoint)[0] == 200


def test_requests_beyond_the_queue_are_rejected(slow: tuple[PredictionServer, Slow]) -> None:
    endpoint, classifier = slow
    with ThreadPoolExecutor(serve.MAX_WAITING) as clients:
        asked = [clients.submit(ask, endpoint) for _ in range(serve.MAX_WAITING)]
        assert classifier.began.acquire(timeout=SECONDS)
        while (answer := health(endpoint))[1]["waiting"] < serve.MAX_WAITING:
            assert (answer[0], answer[1]["status"]) == (200, "ok")
        status, answer = health(endpoint)  # answered while the networks are busy
        assert (status, answer["status"]) == (503, "busy")
        assert answer["answering_seconds"] >= 0
        connection = HTTPConnection("127.0.0.1", endpoint.port, timeout=SECONDS)
        connection.request("POST", "/", IMAGE, JPEG)
        refused = connection.getresponse()
        assert (refused.status, int(refused.headers["Retry-After"]) >= 1) == (503, True)
        connection.close()
        classifier.let.set()
        assert [each.result()[0] for each in asked] == [200] * len(asked)
    assert health(endpoint)[0] == 200


def test_a_disconnected_client_is_not_answered(slow: tuple[PredictionServer, Slow]) -> None:
    endpoint, classifier = slow
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, endpoint)
        assert classifier.began.acquire(timeout=SECONDS)
        with sent(endpoint, head(len(IMAGE)) + IMAGE):
            while health(endpoint)[1]["waiting"] < 2:
                pass
        classifier.let.set()
        assert first.result()[0] == 200
        while health(endpoint)[1]["waiting"]:
            pass
    assert not classifier.began.acquire(blocking=False)


def wait_until_closed(port: int) -> None:
    """Return as soon as nothing listens there."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), SECONDS).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            continue
        time.sleep(0.01)  # as many connections as can be made would fill its table


def test_requests_in_flight_are_answered_before_the_end(known: Classifier) -> None:
    classifier = Slow()
    with running(cast("Classifier", classifier)) as endpoint, ThreadPoolExecutor(1) as clients:
        asked = clients.submit(ask, endpoint)
        assert classifier.began.acquire(timeout=SECONDS)
        endpoint.stop()
        wait_until_closed(endpoint.port)
        classifier.let.set()
        assert asked.result()[0] == 200


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # Under nohup this process ignores SIGHUP, and so would the server.
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))
    ensembles.members(tmp_path)
    command = ["jobs/serve.py", "--model", str(tmp_path / "models" / "m1"), "--port", "0"]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        line = next(line for line in job.stdout if "listening" in line)
        port = int(line.rpartition(":")[2])
        client = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        client.putrequest("POST", "/")
        client.putheader("Content-Type", "image/jpeg")
        client.putheader("Content-Length", str(len(IMAGE)))
        client.putheader("Expect", "100-continue")
        client.endheaders()
        assert client.sock.recv(100).startswith(b"HTTP/1.1 100 ")  # it is in flight now
        job.send_signal(number)
        wait_until_closed(port)
        client.send(IMAGE)
        answer = client.sock.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        client.close()
        assert (job.wait(SECONDS), job.stderr.read()) == (0, "")


def test_without_uvicorns_class_the_server_answers_and_warns(
    known: Classifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.h11_impl", None)
    assert serve.load_connection_class() == "auto"
    assert "clients that send a request head slowly are not disconnected" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(serve, "load_connection_class", lambda: "auto")
    with running(known) as endpoint:
        assert ask(endpoint)[0] == 200


def test_a_port_in_use_is_an_error(endpoint: PredictionServer, known: Classifier) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{endpoint.port}: cannot listen there"):
        PredictionServer(known, ServeConfig(port=endpoint.port))


def test_it_listens_on_this_machine_only(endpoint: PredictionServer, tmp_path: Path) -> None:
    assert ServeConfig().host == "127.0.0.1"
    assert endpoint.host == "127.0.0.1"
