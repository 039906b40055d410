"""Stores that keep to S3's protocol in part, as many of those that call themselves compatible do."""

from collections.abc import Callable
from typing import Any

import fsspec
import pytest

from orchestrator.storage import file_io, s3, storage_errors
from orchestrator.storage.file_io import StorageError
from tests.support.faulty import Fault, Proxy, Request
from tests.support.s3 import S3Server, forget_clients, lead


def sent(proxy: Proxy) -> list[str]:
    """The methods of the requests that delete."""
    return [
        each.method for each in proxy.requests if each.method == "DELETE" or each.path.partition("?")[2] == "delete"
    ]


@pytest.mark.process
@pytest.mark.parametrize("fault", [Fault(400, "MissingContentMD5"), Fault(501, "NotImplemented")], ids=["md5", "none"])
def test_a_refused_bulk_delete_becomes_single_ones_from_then_on(bucket: str, proxy: Proxy, fault: Fault) -> None:
    def plan(request: Request) -> Fault | None:
        bulk = request.method == "POST" and "content-md5" not in request.headers
        return fault if bulk else None

    proxy.plan = plan
    s3._bulk_unsupported.clear()
    for expected in (["POST", "DELETE", "DELETE", "DELETE"], ["DELETE", "DELETE", "DELETE"]):
        for name in ("a", "deep/b", "deep/c"):
            file_io.write_bytes(file_io.join(bucket, "folder", name), b"1")
        file_io.write_bytes(file_io.join(bucket, "folder-2"), b"1")
        proxy.requests.clear()
        file_io.remove(file_io.join(bucket, "folder"))
        assert sent(proxy) == expected
        assert file_io.list_names(bucket) == ["folder-2"]


@pytest.mark.process
def test_a_denied_delete_is_an_error(bucket: str, proxy: Proxy) -> None:
    for name in ("a", "b"):
        file_io.write_bytes(file_io.join(bucket, "folder", name), b"1")
    proxy.plan = lambda request: Fault(403, "AccessDenied") if request.method in ("POST", "DELETE") else None
    with pytest.raises(StorageError, match=r"cannot remove .*folder: permission denied"):
        file_io.remove(file_io.join(bucket, "folder"))


def test_an_object_that_a_bulk_delete_kept_is_an_error() -> None:
    class Kept:
        """Answers a bulk delete with status 200 and an error in the body."""

        def call_s3(self, method: str, **arguments: Any) -> dict[str, Any]:
            return {"Errors": [{"Key": "a", "Code": code, "Message": "no"}]}

    for code, final in (("AccessDenied", True), ("InternalError", False)):
        with pytest.raises(s3.DeleteError, match=f"a: {code}") as caught:
            s3._delete_bulk(Kept(), "bucket", ["a"])
        assert storage_errors.is_permanent(caught.value) == final
    code = "NoSuchKey"
    s3._delete_bulk(Kept(), "bucket", ["a"])


@pytest.mark.process
@pytest.mark.parametrize("call", [lambda url: file_io.write_bytes(url, b"1"), file_io.read_bytes])
def test_refused_checksum_headers_are_told_with_the_fix(
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
