"""python -m infra.lint on the services beside the cluster, and Terraform: a planted mistake is found."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("kubernetes_validate") is None:
    pytest.skip("the extra `lint` is not installed: `make check` installs it", allow_module_level=True)

from infra.lint import services, tools
from tests.infra.planting import line_of, planted, written

DASHBOARD = {
    "title": "t",
    "uid": "u",
    "schemaVersion": 39,
    "panels": [{"id": 1, "title": "p", "type": "stat", "gridPos": {}}],
}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("region = var.region", "region=var.region", "terraform fmt"), ('provider "aws" {', 'provider "aws" {{', "")],
)
def test_a_mistake_in_terraform_is_found(tmp_path: Path, old: str, new: str, message: str) -> None:
    if tools.find("terraform") is None:
        pytest.skip("terraform is not on PATH")
    name = "infra/terraform/versions.tf"
    problems = tools.terraform(planted(tmp_path, name, old, new)).problems
    assert any(problem.path == name and message in problem.what for problem in problems), problems


def test_a_mistake_in_a_unit_is_found(tmp_path: Path) -> None:
    if tools.find("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on PATH")
    name = "infra/mlflow/mlflow.service"
    tree = planted(tmp_path, name, "ProtectSystem=", "ProtectSystems=")
    (problem,) = services.units(tree).problems
    assert problem.path == name and "ProtectSystems" in problem.what
    assert problem.line == line_of(tree, name, "ProtectSystems=")


def test_a_mistake_in_a_drop_in_of_a_unit_is_found(tmp_path: Path) -> None:
    if tools.find("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on PATH")
    name = "infra/monitoring/prometheus.service.d/token.conf"
    tree = planted(tmp_path, name, "LoadCredential=", "LoadCredentials=", "infra/mlflow/mlflow.service")
    (problem,) = services.units(tree).problems
    assert problem.path == name and "LoadCredentials" in problem.what
    assert problem.line == line_of(tree, name, "LoadCredentials=")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        (json.dumps(DASHBOARD | {"panels": []}), "panels is missing"),
        (json.dumps(DASHBOARD | {"uid": ""}), "uid is missing"),
        (json.dumps(DASHBOARD), "no target with an expr or rawSql"),
    ],
)
def test_a_dashboard_that_would_stay_empty_is_found(tmp_path: Path, text: str, message: str) -> None:
    problems = services.dashboards(written(tmp_path, "grafana/dashboards/it.json", text)).problems
    assert any(message in problem.what for problem in problems), problems
