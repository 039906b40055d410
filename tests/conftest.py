"""Rules for every test: a private environment, nothing left behind, and a summary of which layers ran.

The layers, cheapest first, by marker: pure (no marker), process, cluster, nodes. See CONTRIBUTING.md.
"""

import os
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

# Before anything imports ray: without a token in the environment a local cluster would write one to ~/.ray.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
# A test without credentials of its own must fail immediately, not ask the cloud's metadata server for some.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# Tests must not use the services that the developer's shell points at.
for _name in (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "ORCHESTRATOR_RUNS",
):
    os.environ.pop(_name, None)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

LAYERS = ("pure", "process", "cluster", "nodes")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed", "deselected")

# Variables that third parties set when they are imported, and pytest's own.
FOREIGN_VARIABLES = {
    "TORCHINDUCTOR_CACHE_DIR",  # torch, at the first step of an optimizer
    "LD_LIBRARY_PATH",  # cv2
    "PYTEST_CURRENT_TEST",
    "RAY_CLIENT_MODE",
    "_MLFLOW_TELEMETRY_SESSION_ID",
}
FOREIGN_VARIABLE_PREFIXES = ("KMP_",)  # sklearn
# Executors of event loops that live as long as the process, such as fsspec's.
FOREIGN_THREAD_PREFIXES = ("asyncio_",)
THREAD_GRACE_SECONDS = 5.0

# A shared machine makes single examples slow now and then; the time limit of the test is enough.
hypothesis.settings.register_profile("project", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("project")

_layer_of = pytest.StashKey[dict[str, str]]()


# ------------------------------------------------------------------ nothing is left behind
@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves environment variables or non-daemon threads; `leaks` marks the exempt."""
    variables, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = _changed_variables(variables)
    for name in changed:
        if name in variables:
            os.environ[name] = variables[name]
        else:
            del os.environ[name]
    if request.node.get_closest_marker("leaks") is not None:
        return
    started = _surviving_threads(threads)
    if changed or started:
        # Names only: a value may be a secret.
        pytest.fail(f"left behind: environment variables {changed}, threads {started}", pytrace=False)


def _changed_variables(before: dict[str, str]) -> list[str]:
    """Return the names of variables that were added, changed or removed since `before`."""
    names = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    return sorted(
        name for name in names if name not in FOREIGN_VARIABLES and not name.startswith(FOREIGN_VARIABLE_PREFIXES)
    )


def _surviving_threads(before: set[threading.Thread]) -> list[str]:
    """Return the names of non-daemon threads started since `before` that do not end by themselves."""
    started = [
        thread
        for thread in threading.enumerate()
        if thread not in before and not thread.daemon and not thread.name.startswith(FOREIGN_THREAD_PREFIXES)
    ]
    deadline = time.monotonic() + THREAD_GRACE_SECONDS
    for thread in started:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in started if thread.is_alive())


# ------------------------------------------------------------------ which layers ran
def pytest_configure(config: pytest.Config) -> None:
    """Make room for the layer of each test."""
    config.stash[_layer_of] = {}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note the layer of a test: its most expensive marker."""
    marked = [layer for layer in LAYERS if item.get_closest_marker(layer) is not None]
    item.config.stash[_layer_of][item.nodeid] = marked[-1] if marked else "pure"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print per layer what ran, what was skipped, and why."""
    layer_of = config.stash[_layer_of]
    counts: dict[str, Counter[str]] = {layer: Counter() for layer in LAYERS}
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in OUTCOMES:
        for entry in terminalreporter.stats.get(outcome, []):
            # Unknown is a whole file that was skipped or is broken.
            layer = layer_of.get(entry.nodeid, "pure")
            counts[layer][outcome] += 1
            if outcome == "skipped":
                reasons[layer][_reason(entry)] += 1
    terminalreporter.section("layers")
    for layer in LAYERS:
        for line in _layer_lines(layer, counts[layer], reasons[layer].items()):
            terminalreporter.write_line(line)


def _layer_lines(layer: str, counts: Counter[str], reasons: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Yield the line of a layer, and one for each reason to skip."""
    ran = sum(counts[outcome] for outcome in OUTCOMES if outcome not in ("skipped", "deselected"))
    outcomes = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    yield f"{layer:<8} {'ran' if ran else 'DID NOT RUN':<11}  {outcomes or 'no tests'}"
    for reason, count in reasons:
        yield f"{'':<8} skipped {count}: {reason}"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a test was skipped."""
    reason = report.longrepr
    return str(reason[2] if isinstance(reason, tuple) else reason).removeprefix("Skipped: ")
