"""URLs: joined without losing their root, absolute or refused, shown without secrets."""

import os

import pytest

from orchestrator.config import redaction
from orchestrator.storage import urls


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("/runs", ("a", "b.json"), "/runs/a/b.json"),
        ("/runs/", ("a/",), "/runs/a"),
        ("/", ("a",), "/a"),
        ("s3://bucket", ("a", "b"), "s3://bucket/a/b"),
        ("s3://bucket/", ("a",), "s3://bucket/a"),
        ("memory://", ("a", "b"), "memory://a/b"),
        ("file:///", ("a",), "file:///a"),
        ("file:///runs", ("a/b",), "file:///runs/a/b"),
        ("/runs", (), "/runs"),
    ],
)
def test_join(url: str, parts: tuple[str, ...], joined: str) -> None:
    assert urls.join(url, *parts) == joined


@pytest.mark.parametrize("part", ["/etc/passwd", "s3://other/x", "file:///x"])
def test_joined_parts_must_be_relative(part: str) -> None:
    with pytest.raises(ValueError, match="must be relative"):
        urls.join("/runs", part)


@pytest.mark.parametrize(
    ("url", "scheme"), [("/a", "file"), ("a", "file"), ("FILE:///a", "file"), ("S3://b/a", "s3"), ("c:/x", "file")]
)
def test_scheme(url: str, scheme: str) -> None:
    assert urls.get_scheme(url) == scheme
    assert urls.is_local(url) == (scheme == "file")


def test_name_is_the_last_component() -> None:
    assert [urls.get_basename(url) for url in ("/a/b", "s3://x/y/", "b")] == ["b", "y", "b"]


def test_a_remote_url_has_no_local_path_and_its_secret_is_not_shown() -> None:
    with pytest.raises(ValueError, match="must be a local path") as caught:
        urls.to_local_path("s3://key:secret@host/x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("/a/../b/", "/b"),
        ("~/runs", os.path.join(os.path.expanduser("~"), "runs")),
        ("file:///a//b", "/a/b"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("memory://", "memory://"),
    ],
)
def test_absolute(url: str, absolute: str) -> None:
    assert urls.require_absolute(url, "storage") == absolute


@pytest.mark.parametrize("url", ["runs", "./runs", "file://runs"])
def test_relative_paths_are_errors_with_field_value_and_fix(url: str) -> None:
    with pytest.raises(ValueError, match=r"storage: .*relative") as caught:
        urls.require_absolute(url, "storage")
    assert repr(url) in str(caught.value)
    assert os.path.join(os.getcwd(), "runs") in str(caught.value)


def test_a_submitted_job_is_not_sent_into_its_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match="folder on the cluster's nodes") as caught:
        urls.require_absolute("runs", "ORCHESTRATOR_RUNS")
    assert os.getcwd() not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:se@cret@host:9000/bucket/x?token=secret#secret", "s3://host:9000/bucket/x"),
        ("https://token@host/x", "https://host/x"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("/a/b@c?d", "/a/b@c?d"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redaction.redact(url) == shown


@pytest.mark.parametrize("url", ["sqlite:////a/b.db", "file:///a/b", "memory:///x"])
def test_an_empty_host_keeps_its_slashes(url: str) -> None:
    assert redaction.redact(url) == url
    assert redaction.redact(url + "?password=secret") == url


# ------------------------------------------------------------------ names in URLs
@pytest.mark.parametrize("path", ["/a b", "/100%25", "/x#1", "/q?1", "/r&d=1", "/\u00fcber", "/[x]", "/bad\udcff"])
def test_a_path_survives_being_a_url(path: str) -> None:
    url = urls.to_file_url(path)
    assert url.isascii()
    assert urls.to_local_path(url) == path
    assert urls.to_local_path(urls.join(url, path[1:])) == path + path
    assert urls.get_basename(url) == path[1:]
    assert urls.require_absolute(url, "data") == path
    assert urls.to_local_path(path) == path, "a plain path is no URL"


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("FILE:///a/b", "/a/b"),
        ("file://localhost/a%20b", "/a b"),
        ("file:///100%", "/100%"),
        ("//x//y/", "/x/y"),
        ("S3://Bucket/Key/", "s3://Bucket/Key"),
        ("HTTPS://host/x", "https://host/x"),
    ],
)
def test_other_spellings_are_the_same_place(url: str, absolute: str) -> None:
    assert urls.require_absolute(url, "storage") == absolute


@pytest.mark.parametrize(
    ("url", "fixed"),
    [
        ("s3:/bucket/x", "s3://bucket/x"),
        ("s3:bucket/x", "s3://bucket/x"),
        ("S3//bucket/x", "s3://bucket/x"),
        ("s3:///bucket/x", "s3://bucket/x"),
        ("gs:/bucket", "gs://bucket"),
        ("file:/a", "file:///a"),
        ("file:a", "file:///a"),
        ("https:/h/x", "https://h/x"),
    ],
)
def test_a_misspelt_url_is_named_with_its_fix(url: str, fixed: str) -> None:
    with pytest.raises(ValueError, match=r"storage: .*must have two slashes") as caught:
        urls.require_absolute(url, "storage")
    assert repr(fixed) in str(caught.value)


def test_names_below_a_web_server_are_encoded() -> None:
    url = urls.join("https://host/data", "a b#1.tar")
    assert url == "https://host/data/a%20b%231.tar"
    assert urls.get_basename(url) == "a b#1.tar"
    assert urls.join("s3://bucket", "a b#1.tar") == "s3://bucket/a b#1.tar"
