import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ensemble import predicting_http
from orchestrator.ensemble.predicting_config import Serve
from orchestrator.ensemble.predicting_http import Endpoint
from orchestrator.evaluation.classifier import Classifier
from tests.support import ensembles, shards

JPEG = {"Content-Type": "image/jpeg"}
IMAGE = shards.jpeg(1, 40, 31)
SECONDS = 60.0


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with ensembles.one_thread():
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    runs = ensembles.members(tmp_path_factory.mktemp("runs"))
    return Classifier.load([f"{run}/final" for run in runs])


@pytest.fixture
def endpoint(known: Classifier) -> Iterator[Endpoint]:
    with Endpoint(known, Serve(port=0, top=2)) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    endpoint: Endpoint, path: str = "/", body: bytes = IMAGE, headers: dict[str, str] = JPEG, method: str = "POST"
) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", endpoint.server_port, timeout=SECONDS)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def labels(told: Any) -> list[int]:
    return [one["label"] for one in told["predictions"]]


def test_an_image_gets_its_likeliest_classes(endpoint: Endpoint, known: Classifier) -> None:
    status, told = ask(endpoint)
    (guesses,) = known.classify([IMAGE], 10, 2)
    assert isinstance(guesses, list)
    assert status == 200
    assert labels(told) == [guess.label for guess in guesses]
    assert told["predictions"][0] == {
        "label": guesses[0].label,
        "class_name": shards.CLASSES[guesses[0].label],
        "probability": guesses[0].probability,
    }


def test_a_request_chooses_crops_members_and_how_many(endpoint: Endpoint, known: Classifier) -> None:
    png = shards.encoded("RGB", "PNG", 3)
    status, told = ask(endpoint, "/?crops=144&top=3&members=3,1", png, {"Content-Type": "image/png"})
    (guesses,) = known.classify([png], 144, 3, [3, 1])
    assert isinstance(guesses, list)
    assert (status, labels(told)) == (200, [guess.label for guess in guesses])
    assert told["predictions"][0]["probability"] == guesses[0].probability


def test_it_says_that_it_is_well(endpoint: Endpoint) -> None:
    assert ask(endpoint, "/health", b"", {}, "GET") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "told"),
    [
        ("/", b"no image", JPEG, 422, "no JPEG or PNG"),
        ("/", IMAGE[:-60], JPEG, 422, "broken JPEG"),
        ("/", b"", JPEG, 422, "no JPEG or PNG"),
        ("/", b"{}", {"Content-Type": "application/json"}, 415, "application/json is refused"),
        ("/", IMAGE, {}, 415, "send image/jpeg or image/png"),
        ("/", IMAGE, {**JPEG, "Content-Length": "many"}, 411, "send a Content-Length"),
        ("/", IMAGE, {**JPEG, "Content-Length": "-5"}, 411, "send a Content-Length"),
        ("/?crops=7", IMAGE, JPEG, 400, "crops: 7 is refused: must be one of 1, 10, 144"),
        ("/?crops=0", IMAGE, JPEG, 400, "crops: '0' is refused"),
        ("/?crops=1,10", IMAGE, JPEG, 400, "crops: '1,10' is refused: one number"),
        ("/?top=x", IMAGE, JPEG, 400, "top: 'x' is refused"),
        ("/?top=" + "9" * 5000, IMAGE, JPEG, 400, "is refused"),
        ("/?members=4", IMAGE, JPEG, 400, "members: 4 is refused: numbers from 1 to 3"),
        ("/?crop=10", IMAGE, JPEG, 400, "'crop' is unknown"),
        ("/predict", IMAGE, JPEG, 404, "POST an image to /"),
    ],
)
def test_what_is_wrong_is_said(
    endpoint: Endpoint, path: str, body: bytes, headers: dict[str, str], status: int, told: str
) -> None:
    found, answer = ask(endpoint, path, body, headers)
    assert (found, told in answer["error"]) == (status, True), answer
    assert ask(endpoint)[0] == 200  # and the next one is answered


def test_other_pages_are_not_there(endpoint: Endpoint) -> None:
    assert ask(endpoint, "/", b"", {}, "GET")[0] == 404


def raw(endpoint: Endpoint, text: bytes, end: bool = False) -> bytes:
    """All that is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", endpoint.server_port), SECONDS) as client:
        client.sendall(text)
        if end:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
        return answer


def test_a_large_body_is_refused_unread(endpoint: Endpoint) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 99999999999\r\n\r\n"
    assert b" 413 " in raw(endpoint, head).splitlines()[0]


def test_a_body_that_ends_early(endpoint: Endpoint) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 50\r\n\r\nabc"
    assert b"the body ended after 3 of 50 bytes" in raw(endpoint, head, end=True)


def test_a_client_that_says_nothing_is_left(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting_http._Handler, "timeout", 0.2)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: 50\r\n\r\n"
    assert b" 408 " in raw(endpoint, head).splitlines()[0]
    assert raw(endpoint, b"") == b""


def test_more_than_can_wait_are_sent_away(endpoint: Endpoint) -> None:
    taken = 0
    while endpoint._waiting.acquire(blocking=False):
        taken += 1
    assert ask(endpoint)[0] == 503
    assert ask(endpoint, "/health", b"", {}, "GET")[0] == 200
    for _ in range(taken):
        endpoint._waiting.release()
    assert ask(endpoint)[0] == 200
    assert taken == predicting_http.MAX_WAITING


def test_a_port_in_use_is_refused(endpoint: Endpoint, known: Classifier) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{endpoint.server_port}: cannot listen there"):
        Endpoint(known, Serve(port=endpoint.server_port))


def test_it_listens_on_this_machine_only(endpoint: Endpoint, tmp_path: Path) -> None:
    assert Serve().host == "127.0.0.1"
    assert endpoint.server_address[0] == "127.0.0.1"
