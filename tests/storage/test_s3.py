"""Ranged reads from a real S3 server through a proxy that injects faults."""

import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader, ReadRetryPolicy
from tests.support.faulty import DENIED, INTERNAL, NO_KEY, SLOW_DOWN, Fault, Proxy, Request, delayed, sequence
from tests.support.s3 import S3Server, environment, forget_clients, lead

pytestmark = pytest.mark.process

QUICK = ReadRetryPolicy(
    tries=4, first_wait_seconds=0.001, longest_wait_seconds=0.01, connect_seconds=2, read_seconds=0.5
)
# More than a socket's buffers hold, so that faults in its middle are met in its middle.
DATA = random.Random(3).randbytes(12 * 2**20)
MIB = 2**20


@pytest.fixture
def url(bucket: str, s3_server: S3Server) -> str:
    url = file_io.join(bucket, "folder", "object")
    s3_server.put(url.removeprefix("s3://"), DATA)
    return url


def gets(proxy: Proxy) -> list[str]:
    """The ranges that were asked for."""
    return [request.headers["range"] for request in proxy.requests if request.method == "GET"]


def test_ranges_are_exact(url: str, proxy: Proxy) -> None:
    ranges = RangeReader(retry_policy=QUICK)
    for start, length in ((0, len(DATA)), (0, 1), (12345, 5 * MIB), (len(DATA) - 1, 1)):
        assert ranges.read(url, start, length) == DATA[start : start + length]
    assert ranges.transfer.requests == len(proxy.requests) == 4, "one request each"
    assert ranges.transfer.retries == 0
    ranges.close()


def test_many_threads_share_the_connections(url: str, proxy: Proxy) -> None:
    ranges, step = RangeReader(streams=4, retry_policy=QUICK), MIB // 2
    with ThreadPoolExecutor(8) as pool:
        starts = range(0, len(DATA), step)
        assert b"".join(pool.map(lambda start: ranges.read(url, start, step), starts)) == DATA
    assert len(proxy.requests) == len(starts)


# ------------------------------------------------------------------ faults that are mended
@pytest.mark.parametrize(
    "fault",
    [Fault(reset_after=3 * MIB), Fault(cut_after=3 * MIB), Fault(stall_after=3 * MIB)],
    ids=["reset", "cut", "stalled"],
)
def test_a_broken_body_resumes_at_the_last_good_byte(url: str, proxy: Proxy, fault: Fault) -> None:
    proxy.plan = sequence(fault, None, fault)
    ranges = RangeReader(retry_policy=QUICK)
    for start in (100, 7):
        assert ranges.read(url, start, 10 * MIB) == DATA[start : start + 10 * MIB]
    first, second, third, fourth = gets(proxy)
    assert (first, third) == (f"bytes=100-{100 + 10 * MIB - 1}", f"bytes=7-{7 + 10 * MIB - 1}")
    for again, start in ((second, 100), (fourth, 7)):
        resumed = int(again.removeprefix("bytes=").split("-")[0])
        # A reset may throw away what the client had not yet taken from its socket.
        assert start < resumed <= start + 3 * MIB
        if fault.reset_after is None:
            assert resumed == start + 3 * MIB, "what came is not asked for again"
    assert ranges.transfer.retries == 2
    assert ranges.transfer.bytes == 20 * MIB


@pytest.mark.parametrize(
    "fault", [SLOW_DOWN, INTERNAL, Fault(503, "ServiceUnavailable"), Fault(429, "TooManyRequests")]
)
def test_transient_answers_are_retried(url: str, proxy: Proxy, fault: Fault) -> None:
    proxy.plan = sequence(fault, fault, fault)
    ranges = RangeReader(retry_policy=QUICK)
    assert ranges.read(url, 9, MIB) == DATA[9 : 9 + MIB]
    assert len(gets(proxy)) == 4, "neither s3fs nor botocore tries by itself"
    assert ranges.transfer.retries == 3


def test_progress_resets_the_tries(url: str, proxy: Proxy) -> None:
    proxy.plan = sequence(*[Fault(cut_after=MIB)] * 9)
    assert RangeReader(retry_policy=QUICK).read(url, 0, 10 * MIB) == DATA[: 10 * MIB]
    assert len(gets(proxy)) == 10


def test_random_faults_never_change_a_byte(url: str, proxy: Proxy) -> None:
    generator = random.Random(5)
    faults = [SLOW_DOWN, Fault(reset_after=700_000), Fault(cut_after=1), Fault(reset_after=0), INTERNAL, None, None]
    proxy.plan = sequence(*[generator.choice(faults) for _ in range(100)])
    ranges = RangeReader(
        streams=4, retry_policy=ReadRetryPolicy(tries=20, first_wait_seconds=0.001, longest_wait_seconds=0.01)
    )
    spans = [(generator.randrange(8 * MIB), generator.randrange(1, 3 * MIB)) for _ in range(24)]
    with ThreadPoolExecutor(4) as pool:
        for (start, length), data in zip(spans, pool.map(lambda span: ranges.read(url, *span), spans), strict=True):
            assert data == DATA[start : start + length]
    assert ranges.transfer.retries > 20


# ------------------------------------------------------------------ errors
def test_a_lasting_error_names_object_byte_and_cause(url: str, proxy: Proxy) -> None:
    proxy.plan = sequence(Fault(cut_after=MIB), *[SLOW_DOWN] * 99)
    with pytest.raises(StorageError, match=rf"folder/object at byte {MIB}: .*SlowDown.*gave up after 5 requests"):
        RangeReader(retry_policy=QUICK).read(url, 0, 10 * MIB)
    assert len(gets(proxy)) == 1 + QUICK.tries


def test_a_stalled_server_is_given_up_in_time(url: str, proxy: Proxy) -> None:
    proxy.plan = lambda request: Fault(stall_after=0)
    patience = ReadRetryPolicy(tries=2, first_wait_seconds=0.001, read_seconds=0.2)
    with pytest.raises(StorageError, match=r"object at byte 0: .*[Tt]ime"):
        RangeReader(retry_policy=patience).read(url, 0, MIB)


def test_a_server_that_trickles_is_given_up_in_time(url: str, proxy: Proxy) -> None:
    # Bytes come before the read time-out of the socket every time, and would for hours.
    proxy.latency_seconds = 0.05
    proxy.plan = lambda request: Fault(cut_after=1)
    # On a busy machine the first connection alone takes a second.
    patience = ReadRetryPolicy(requests=10**6, first_wait_seconds=0.0, total_seconds=3.0, slowest_bytes_per_second=1e9)
    with pytest.raises(StorageError, match="gave up after"):
        RangeReader(retry_policy=patience).read(url, 0, MIB)


def test_nothing_is_written_after_a_read_was_given_up(url: str, proxy: Proxy) -> None:
    proxy.latency_seconds = 0.4
    buffer = bytearray(MIB)
    patience = ReadRetryPolicy(tries=1, total_seconds=0.1, slowest_bytes_per_second=1e9, read_seconds=10)
    with pytest.raises(StorageError, match="object at byte 0"):
        RangeReader(retry_policy=patience).read_into(url, 0, memoryview(buffer))
    buffer.extend(b"grown")  # refused while anybody holds the memory
    time.sleep(0.6)
    assert not any(buffer[:MIB])


@pytest.mark.parametrize("answer", [None, NO_KEY], ids=["server", "proxy"])
def test_a_missing_object_is_file_not_found_without_a_retry(bucket: str, proxy: Proxy, answer: Fault | None) -> None:
    proxy.plan = lambda request: answer
    url = file_io.join(bucket, "nowhere")
    ranges = RangeReader(retry_policy=QUICK)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ranges.read(url, 0, 10)
    assert len(proxy.requests) == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        file_io.get_size(url)


def test_a_denial_says_where_credentials_come_from(url: str, proxy: Proxy) -> None:
    proxy.plan = lambda request: DENIED
    ranges = RangeReader(retry_policy=QUICK)
    for call in (lambda: ranges.read(url, 5, 10), lambda: file_io.read_bytes(url)):
        with pytest.raises(StorageError, match=r"folder/object.*permission denied \(403.*AWS_ACCESS_KEY_ID"):
            call()
    assert len(proxy.requests) == 2, "trying again is of no use"


def test_wrong_keys_are_denied_by_the_server(url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-key")
    forget_clients()
    for call in (lambda: RangeReader(retry_policy=QUICK).read(url, 5, 10), lambda: file_io.read_bytes(url)):
        with pytest.raises(StorageError, match=r"folder/object.*permission denied \(403.*AWS_PROFILE") as caught:
            call()
        assert "not-the-secret-key" not in str(caught.value)


def test_missing_credentials_are_named_without_a_request(
    url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_clients()
    for call in (lambda: RangeReader(retry_policy=QUICK).read(url, 5, 10), lambda: file_io.read_bytes(url)):
        with pytest.raises(StorageError, match=r"folder/object.*no credentials.*AWS_ACCESS_KEY_ID"):
            call()
    assert not proxy.requests


def test_a_dead_server_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    lead(monkeypatch, f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://b/object at byte 0: .*Connect.*gave up after 4 requests"):
        RangeReader(retry_policy=QUICK).read("s3://b/object", 0, 10)
    with pytest.raises(StorageError, match=r"s3://b/object"):
        file_io.read_bytes("s3://b/object")
    forget_clients()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("start", "length"), [(len(DATA) - 5, 6), (len(DATA), 1), (2 * len(DATA), 7)])
def test_truncation_names_the_object(url: str, proxy: Proxy, start: int, length: int) -> None:
    with pytest.raises(StorageError, match="folder/object: truncated"):
        RangeReader(retry_policy=QUICK).read(url, start, length)
    assert len(gets(proxy)) == 1, "trying again is of no use"


@pytest.mark.parametrize("size", [len(DATA), len(DATA) + 1])
def test_an_object_replaced_during_a_read_is_noticed(url: str, proxy: Proxy, s3_server: S3Server, size: int) -> None:
    def plan(request: Request) -> Fault | None:
        if request.number == 0:
            return Fault(cut_after=MIB)
        s3_server.put(url.removeprefix("s3://"), bytes(size))
        return None

    proxy.plan = plan
    with pytest.raises(StorageError, match=rf"folder/object at byte {MIB}: .*replaced while it was read"):
        RangeReader(retry_policy=QUICK).read(url, 0, 10 * MIB)


def conditionally(proxy: Proxy, first: Fault) -> None:
    """Break the first PUT that the conditions let through."""
    conditions, broken = proxy.plan, sequence(first, method="PUT")
    assert conditions is not None
    proxy.plan = lambda request: conditions(request) or broken(request)


@pytest.mark.parametrize("first", [Fault(lost=True), SLOW_DOWN], ids=["lost", "refused"])
def test_a_create_knows_its_own_object_after_a_lost_answer(bucket: str, proxy: Proxy, first: Fault) -> None:
    url = file_io.join(bucket, "lease")
    conditionally(proxy, first)
    assert file_io.create_bytes(url, b"same")
    assert not file_io.create_bytes(url, b"same"), "another's object, whatever it holds"
    conditionally(proxy, first)
    assert not file_io.create_bytes(url, b"other")
    assert file_io.read_bytes(url) == b"same"


def test_a_create_that_never_comes_through_is_an_error(bucket: str, proxy: Proxy) -> None:
    proxy.plan = lambda request: INTERNAL
    with pytest.raises(StorageError, match=r"cannot create .*lease"):
        file_io.create_bytes(file_io.join(bucket, "lease"), b"mine")


def test_a_write_whose_answer_is_lost_is_repeated(bucket: str, proxy: Proxy) -> None:
    proxy.plan = sequence(SLOW_DOWN, Fault(lost=True), method="PUT")
    file_io.write_bytes(file_io.join(bucket, "object"), b"mine")
    assert {request.method for request in proxy.requests} == {"PUT"}
    assert len(proxy.requests) == 3
    assert file_io.read_bytes(file_io.join(bucket, "object")) == b"mine"


def test_reads_work_without_the_private_methods_of_s3fs(url: str) -> None:
    ranges = RangeReader(retry_policy=QUICK)
    ranges.read(url, 0, 1)
    filesystem = ranges._sources["s3"]._filesystem  # type: ignore[union-attr]
    with patch.object(type(filesystem), "_get_s3_method_kwargs", None):
        assert ranges.read(url, 20, 10) == DATA[20:30]
    creator, filesystem._s3creator = filesystem._s3creator, None
    ranges.close()
    filesystem.close_session(filesystem.loop, creator)


# ------------------------------------------------------------------ processes
def test_a_forked_child_makes_connections_of_its_own(url: str) -> None:
    ranges = RangeReader(retry_policy=QUICK)
    assert ranges.read(url, 0, 10) == DATA[:10]
    child = os.fork()
    if child == 0:
        os._exit(0 if ranges.read(url, 20, MIB) == DATA[20 : 20 + MIB] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ranges.read(url, 30, 10) == DATA[30:40], "the parent's still work"


def test_the_proxy_as_a_process_delays_requests(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with delayed(s3_server.endpoint, 0.2, cpus=os.sched_getaffinity(0)) as endpoint:
        lead(monkeypatch, endpoint)
        url = file_io.join(s3_server.bucket("delayed"), "object")
        s3_server.put("delayed/object", DATA)
        ranges = RangeReader(retry_policy=ReadRetryPolicy(first_wait_seconds=0.001))
        began = time.monotonic()
        assert ranges.read(url, 0, len(DATA)) == DATA
        assert time.monotonic() - began >= 0.2
    forget_clients()


def test_the_environment_holds_all_that_a_client_needs(s3_server: S3Server) -> None:
    assert s3_server.environment == environment(s3_server.endpoint)
    assert Path(s3_server.environment["AWS_CONFIG_FILE"]) == Path(os.devnull)
