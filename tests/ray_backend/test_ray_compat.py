"""The guard of the fast start. Both paths, with real runs: tests/cluster/test_public_path.py."""

import builtins
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import ray_compat
from orchestrator.ray_backend.ray_compat import FAST_START_VARIABLE, load_fast_start, load_ray_internals


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded nothing yet."""
    monkeypatch.setattr(ray_compat, "_loaded", {})
    monkeypatch.delenv(FAST_START_VARIABLE, raising=False)
    yield


def block(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    original: Any = builtins.__import__

    def import_unless_blocked(name: str, values: Any = None, local: Any = None, names: Any = (), level: int = 0) -> Any:
        if (values or {}).get("__name__") == ray_compat.__name__ and module in (names or ()):
            raise ImportError(f"no {module}")
        return original(name, values, local, names, level)

    monkeypatch.setattr(builtins, "__import__", import_unless_blocked)


def test_a_tested_version_starts_fast_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    internals, fast_start = load_ray_internals(), load_fast_start()
    assert internals is not None and fast_start is not None
    assert load_fast_start() is fast_start
    assert caplog.text == ""


@pytest.mark.parametrize("reason", ["version", "switch", "import"])
def test_anything_else_uses_the_public_api_and_warns_once(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "version":
        monkeypatch.setattr(ray_compat, "version", lambda _: "9.1.0")
    elif reason == "switch":
        monkeypatch.setenv(FAST_START_VARIABLE, "0")
    else:
        block(monkeypatch, "ray_internals")
        block(monkeypatch, "fast_start")
    assert [load_ray_internals(), load_fast_start(), load_ray_internals(), load_fast_start()] == [None] * 4
    [warning] = caplog.messages
    cause = {
        "version": "Ray 9.1.0 is not a version that it was tested with (2.60.0)",
        "switch": "ORCHESTRATOR_FAST_START is 0",
        "import": "lacks what it needs (ImportError: no ray_internals)",
    }
    assert cause[reason] in warning and "public API" in warning


def test_what_one_part_lacks_leaves_the_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    block(monkeypatch, "fast_start")
    assert load_fast_start() is None
    assert load_ray_internals() is not None
    assert len(caplog.messages) == 1


def test_the_installed_version_is_one_that_the_tests_run_with() -> None:
    assert version("ray") in ray_compat.TESTED_RAY_VERSIONS


@pytest.mark.parametrize("value", ["off", "2", " "])
def test_another_value_of_the_switch_is_an_error_that_names_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAST_START_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"ORCHESTRATOR_FAST_START must be 0 or 1, got '{value}'"):
        ray_compat.check_fast_start_variable()


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_zero_and_one_are_values_of_the_switch(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAST_START_VARIABLE, value)
    ray_compat.check_fast_start_variable()
    assert (ray_compat.load_ray_internals() is None) == (value == "0")
