"""Versions of Ray, torch and MLflow that a command accepts."""

from importlib import metadata

import pytest

from orchestrator.config.arg_parser import check_versions, parse_args
from orchestrator.config.errors import ConfigError
from tests.config.test_arg_parser import PRESETS


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    """Make `package` appear to be installed with this version, or not at all."""
    real = metadata.version

    def fake(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)


def test_the_installed_versions_are_supported() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("package", "version"), [("ray", "2.99.1"), ("torch", "2.30.0+cu140"), ("torch", "2.10"), ("mlflow", "3.99.0rc1")]
)
def test_newer_minor_versions_are_accepted(package: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, package, version)
    check_versions()


@pytest.mark.parametrize(
    ("package", "version", "shown"),
    [("ray", "3.0.0", "3.0.0"), ("torch", "2.9.1", "2.9.1"), ("mlflow", "4.0.0rc1", "4.0.0rc1"), ("ray", None, "none")],
)
def test_other_versions_are_one_line_with_the_fix(
    package: str, version: str | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, package, version)
    with pytest.raises(
        ConfigError, match=rf"^{package} must be of version .*, got {shown}; run: pip install '{package}"
    ):
        check_versions()


def test_a_command_with_an_unsupported_version_stops_but_shows_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "ray", "9.0")
    for arguments, status in (["digits", "--help"], 0), (["digits"], 2):
        with pytest.raises(SystemExit) as caught:
            parse_args("train", "", PRESETS, "digits", arguments)
        assert caught.value.code == status
    assert capsys.readouterr().err.startswith("train: error: ray must be of version 2.60 or newer and below 3, got 9.0")
