"""Buckets in another region, before a server that answers as S3 does."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader, ReadRetryPolicy
from tests.support.s3 import forget_clients, lead

pytestmark = pytest.mark.process

QUICK = ReadRetryPolicy(tries=4, first_wait_seconds=0.001, longest_wait_seconds=0.01, connect_seconds=2, read_seconds=5)
MOVED = "<Error><Code>PermanentRedirect</Code><Message>must be addressed using the specified endpoint</Message></Error>"
WRONG = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>wrong</Message><Region>eu-west-1</Region></Error>"


@pytest.mark.parametrize(
    ("answer", "body", "header", "message"),
    [
        (301, MOVED, True, r"the bucket is in another region \(.*\): set AWS_DEFAULT_REGION to its region"),
        (301, MOVED, False, "the bucket is in another region: set AWS_DEFAULT_REGION to its region"),
        (400, WRONG, True, r"the bucket is in (another region \(|eu-west-1).* set AWS_DEFAULT_REGION to its region"),
    ],
    ids=["moved", "moved-without-region", "signed-for-another"],
)
def test_a_bucket_in_another_region_is_reported_with_the_fix(
    answer: int, body: str, header: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        """Answers as S3 does at the endpoint of a region that a bucket is not in."""

        def do_GET(self) -> None:
            self.send_response(answer)
            if header:
                self.send_header("x-amz-bucket-region", "eu-west-1")
            data = b"" if self.command == "HEAD" else body.encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lead(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
        for call in (
            lambda: file_io.read_bytes("s3://b/object"),
            lambda: file_io.list_names("s3://b/folder"),
            lambda: RangeReader(retry_policy=QUICK).read("s3://b/object", 0, 10),
        ):
            with pytest.raises(StorageError, match=message):
                call()
        server.shutdown()
    forget_clients()
