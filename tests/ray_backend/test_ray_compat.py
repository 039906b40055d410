"""The guard of the fast start. Both paths, with real runs: tests/ray_backend/test_public_path.py."""

import builtins
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import ray_compat
from orchestrator.ray_backend.ray_compat import FAST_START_VARIABLE, load_fast_start, load_ray_internals
from tests.support import private_ray
from tests.support.private_ray import list_private_modules


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has loaded nothing yet."""
    monkeypatch.setattr(ray_compat, "_loaded", {})
    monkeypatch.delenv(FAST_START_VARIABLE, raising=False)
    yield


def forget_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next load import the two modules anew."""
    for name in ("fast_start", "ray_internals"):
        monkeypatch.delitem(sys.modules, f"orchestrator.ray_backend.{name}", raising=False)
        monkeypatch.delattr(f"orchestrator.ray_backend.{name}", raising=False)


def block(monkeypatch: pytest.MonkeyPatch, modules: list[str]) -> None:
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)  # put back afterwards
    private_ray.block(modules)


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
        forget_door(monkeypatch)
        block(monkeypatch, ["ray._private.state"])
    assert [load_ray_internals(), load_fast_start(), load_ray_internals(), load_fast_start()] == [None] * 4
    [warning] = caplog.messages
    cause = {
        "version": "Ray 9.1.0 is not a version that it was tested with (2.60.0)",
        "switch": "ORCHESTRATOR_FAST_START is 0",
        "import": "lacks what it needs (ImportError: ray._private.state is blocked)",
    }
    assert cause[reason] in warning and "public API" in warning


@pytest.mark.parametrize("module", list_private_modules())
def test_whichever_private_module_is_missing_runs_start_through_the_public_api(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_door(monkeypatch)
    block(monkeypatch, [module])
    assert load_fast_start() is None
    assert (load_ray_internals() is None) == (".train." not in module and ".data." not in module)
    assert len(caplog.messages) == 1 and f"{module} is blocked" in caplog.text


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
