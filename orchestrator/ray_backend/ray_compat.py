"""The guard of the fast start: decides whether this Ray's private parts are used, or its public API alone.

Ray's private parts are reached through `ray_internals` and `fast_start` only, and those only through this module.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

from orchestrator.config.errors import ConfigError

TESTED_RAY_VERSIONS = ("2.60.0",)  # those that the tests ran with
FAST_START_VARIABLE = "ORCHESTRATOR_FAST_START"

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_loaded: dict[str, ModuleType | None] = {}


def load_ray_internals() -> ModuleType | None:
    """Return the module `ray_internals`; None when this process uses Ray's public API alone."""

    def import_module() -> ModuleType:
        from orchestrator.ray_backend import ray_internals  # only a tested version of Ray has what it imports

        return ray_internals

    return _load("ray_internals", import_module)


def load_fast_start() -> ModuleType | None:
    """Return the module `fast_start`, which imports Ray Train; None when runs go through Ray Train's public API."""

    def import_module() -> ModuleType:
        from orchestrator.ray_backend import fast_start  # only a tested version of Ray has what it imports

        return fast_start

    return _load("fast_start", import_module)


def check_fast_start_variable() -> None:
    """Raise ConfigError for a value of ORCHESTRATOR_FAST_START that means nothing."""
    value = os.environ.get(FAST_START_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{FAST_START_VARIABLE} must be 0 or 1, got {value!r}; set 0 to use Ray's public API alone")


def _load(name: str, import_module: Callable[[], ModuleType]) -> ModuleType | None:
    """Import a module unless something speaks against it; warn about that once in a process."""
    with _lock:
        if name not in _loaded:
            module, obstacle = None, _find_obstacle()
            if obstacle is None:
                try:
                    module = import_module()
                except Exception as error:  # a module that changed may fail in any way while it is imported
                    obstacle = f"Ray {version('ray')} lacks what it needs ({type(error).__name__}: {error})"
            if obstacle is not None and None not in _loaded.values():
                _log.warning(
                    "the fast start is off: %s; runs start through Ray's public API, which takes some seconds longer",
                    obstacle,
                )
            _loaded[name] = module
        return _loaded[name]


def _find_obstacle() -> str | None:
    if os.environ.get(FAST_START_VARIABLE) == "0":
        return f"{FAST_START_VARIABLE} is 0"
    if (found := version("ray")) not in TESTED_RAY_VERSIONS:
        return f"Ray {found} is not a version that it was tested with ({', '.join(TESTED_RAY_VERSIONS)})"
    return None
