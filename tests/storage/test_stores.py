"""Stores that keep to S3's protocol in part, as many of those that call themselves compatible do."""

from collections.abc import Callable

import fsspec
import pytest

from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from tests.support.faulty import Fault, Proxy, Request
from tests.support.s3 import S3Server, forget_clients, lead


@pytest.mark.process
def test_remove_deletes_a_folder_object_by_object(bucket: str, proxy: Proxy) -> None:
    """Some stores reject a bulk delete, which is a POST."""
    for name in ("a", "deep/b", "deep/c"):
        file_io.write_bytes(file_io.join(bucket, "folder", name), b"1")
    file_io.write_bytes(file_io.join(bucket, "folder-2"), b"1")
    proxy.requests.clear()
    file_io.remove(file_io.join(bucket, "folder"))
    paths = [request.path.partition("?")[0] for request in proxy.requests if request.method == "DELETE"]
    deleted = {path.partition("/folder")[2] for path in paths}
    assert deleted == {"", "/a", "/deep/b", "/deep/c"}, "one of them for an object of the folder's own name"
    assert "POST" not in {request.method for request in proxy.requests}
    assert file_io.list_names(bucket) == ["folder-2"]


@pytest.mark.process
def test_a_denied_delete_is_an_error(bucket: str, proxy: Proxy) -> None:
    for name in ("a", "b"):
        file_io.write_bytes(file_io.join(bucket, "folder", name), b"1")
    proxy.plan = lambda request: Fault(403, "AccessDenied") if request.method in ("POST", "DELETE") else None
    with pytest.raises(StorageError, match=r"cannot remove .*folder: permission denied"):
        file_io.remove(file_io.join(bucket, "folder"))


@pytest.mark.process
@pytest.mark.parametrize("call", [lambda url: file_io.write_bytes(url, b"1"), file_io.read_bytes])
def test_rejected_checksum_headers_are_reported_with_the_fix(
    bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], object]
) -> None:
    url = file_io.join(bucket, "object")
    file_io.write_bytes(url, b"1")
    checksums = ("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer")

    def plan(request: Request) -> Fault | None:
        return Fault(501, "NotImplemented") if any(name.startswith(checksums) for name in request.headers) else None

    proxy.plan = plan
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.setenv(name, "when_supported")
    forget_clients()
    proxy.requests.clear()
    with pytest.raises(StorageError, match=r"AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM"):
        call(url)
    assert len(proxy.requests) <= 2, "trying again is of no use"
    lead(monkeypatch, proxy.endpoint)
    call(url)


@pytest.mark.process
def test_a_bucket_whose_requesters_pay(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    url = file_io.join(bucket, "object")
    file_io.write_bytes(url, b"1")

    def plan(request: Request) -> Fault | None:
        return None if request.headers.get("x-amz-request-payer") == "requester" else Fault(403, "AccessDenied")

    proxy.plan = plan
    with pytest.raises(StorageError, match=r"requesters pay needs FSSPEC_S3_REQUESTER_PAYS=true"):
        file_io.read_bytes(url)
    # What fsspec makes of that variable when it is imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": "true"})
    forget_clients()
    assert file_io.read_bytes(url) == b"1"
    assert file_io.list_names(bucket) == ["object"]
    file_io.write_bytes(url, b"2")
    file_io.remove(url)
    assert not file_io.exists(url)


@pytest.mark.process
def test_an_endpoint_with_a_path(s3_server: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.bucket("storage")
    lead(monkeypatch, f"{proxy.endpoint}/storage/v1/s3")
    proxy.requests.clear()
    file_io.write_bytes("s3://bucket/object", b"1")
    assert file_io.read_bytes("s3://bucket/object") == b"1"
    assert {each.path.partition("?")[0] for each in proxy.requests} == {"/storage/v1/s3/bucket/object"}
