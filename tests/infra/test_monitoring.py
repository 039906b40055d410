"""infra/monitoring: dashboards and alerts use metrics that exist; the curves' queries work on MLflow's tables."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import MetricPoint, TrackedRun
from tests.support.launched import ROOT
from tests.support.mlflow_stack import Stack

FOLDER = ROOT / "infra" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana" / "dashboards" / "orchestrator.json").read_text())
# Of Prometheus itself.
OWN = {"up"}
METRIC = re.compile(r"\b(ray_[a-z_]+|autoscaler_[a-z_]+|up)\b(?=[{\s)/\[]|$)")


def known_metrics() -> set[str]:
    """Return the names of metrics that Ray exported in a trial."""
    lines = (FOLDER / "metrics.txt").read_text().splitlines()
    return {line.split()[0] for line in lines if line and not line.startswith("#")}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each query of Prometheus."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            if "expr" in target:
                yield panel["title"], target["expr"]
    for line in (FOLDER / "alerts.yml").read_text().splitlines():
        if (match := re.match(r"\s+expr: (.*)", line)) is not None:
            yield "alerts.yml", match[1]


def curves() -> Iterator[tuple[str, str]]:
    """Yield title and SQL of the panels that query MLflow's database."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            if "rawSql" in target:
                yield panel["title"], target["rawSql"]


@pytest.mark.parametrize(("where", "query"), list(expressions()))
def test_only_metrics_that_ray_exports_are_used(where: str, query: str) -> None:
    # Names in braces and in `by` are labels.
    bare = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", query)
    asked = set(METRIC.findall(bare)) - OWN
    assert asked or "up" in bare, f"{where}: {query}: no metric found in it"
    assert asked <= known_metrics(), f"{where}: {query}"


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_data_sources_are_those_that_are_provisioned() -> None:
    provisioned = (FOLDER / "grafana" / "provisioning" / "datasources" / "datasources.yml").read_text()
    uids = set(re.findall(r"uid: (\w+)", provisioned))
    asked = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())}
    assert asked == uids


def test_the_list_of_nodes_is_requested_with_the_token_of_the_drop_in() -> None:
    drop_in = (FOLDER / "prometheus.service.d" / "token.conf").read_text()
    (name,) = re.findall(r"^LoadCredential=(\w+):/", drop_in, re.MULTILINE)
    (ray, *_) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (asked,) = ray["http_sd_configs"]
    # Prometheus 2.42 does not say Bearer by itself here, whatever its manual says.
    path = f"/run/credentials/prometheus.service/{name}"
    assert asked["authorization"] == {"type": "Bearer", "credentials_file": path}


@pytest.fixture(scope="module")
def recorded(stack: Stack, prepared: "subprocess.CompletedProcess[str]") -> Stack:
    """Return a stack in which a run was recorded, as jobs record it."""
    assert prepared.returncode == 0, prepared.stderr
    names = {key for _, query in curves() for key in re.findall(r"'((?:train|validation)/\w+)'", query)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "jobs")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", stack.secret("jobs_password"))
        ours = MlflowTracker(stack.server.uri, "curves")
        run_id = ours.open_run(TrackedRun("curves", "the run"))
        ours.log_metrics(run_id, [MetricPoint(name, 0.5, 32, time.time()) for name in sorted(names)])
        ours.set_tags(run_id, {"orchestrator.incidents": "2"})
        ours.close_run(run_id, "FINISHED")
    return stack


@pytest.mark.process
@pytest.mark.parametrize(("title", "query"), list(curves()))
def test_curves_are_found_by_the_dashboards_reader(recorded: Stack, title: str, query: str) -> None:
    now = int(time.time())
    for macro, value in (
        ("$__unixEpochFrom()", str(now - 3600)),
        ("$__unixEpochTo()", str(now + 3600)),
        ("${experiment:sqlstring}", "'curves', 'others'"),
    ):
        query = query.replace(macro, value)
    assert "$" not in query, "a macro that this test does not know"
    login = {"PGUSER": "grafana", "PGPASSWORD": recorded.secret("grafana_database_password")}
    rows = recorded.database.psql("-d", "mlflow", sql=query, environment=login).splitlines()
    assert rows, title
    assert all("the run" in row for row in rows)


def test_the_list_of_metrics_is_not_empty() -> None:
    assert len(known_metrics()) > 50
    assert Path(FOLDER / "metrics.txt").read_text().startswith("#")
