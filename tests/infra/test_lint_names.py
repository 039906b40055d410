"""python -m infra.lint without the programs themselves: misspelt names in Terraform, Prometheus and #SBATCH."""

from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("kubernetes_validate") is None:
    pytest.skip("the extra `lint` is not installed: `make check` installs it", allow_module_level=True)

from infra.lint import hcl, services, slurm, terraform, tools
from tests.infra.planting import line_of, planted, written
from tests.support.launched import ROOT

TERRAFORM = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "infra/terraform").glob("*.tf*"))
BUCKET, ROLES, COPY = (f"infra/terraform/{name}.tf" for name in ("bucket", "roles", "copy"))
CONFIG, RULES = "infra/monitoring/prometheus.yml", "infra/monitoring/alerts.yml"
SBATCH = "cluster/slurm/train.sbatch"


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda _name: None)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (BUCKET, "block_public_acls ", "block_public_acl ", "did you mean 'block_public_acls'?"),
        (BUCKET, "versioning_configuration {", "version_configuration {", "did you mean 'versioning_configuration'?"),
        (BUCKET, "noncurrent_days =", "non_current_days =", "did you mean 'noncurrent_days'?"),
        (BUCKET, '"aws_s3_bucket_policy"', '"aws_s3_bucket_polcy"', "has no such thing"),
        (BUCKET, "var.multipart_days", "var.multipart_day", "did you mean 'var.multipart_days'?"),
        (BUCKET, "storage_class =", "storageclass =", "did you mean 'storage_class'?"),
        (BUCKET, 'dynamic "rule"', 'dynamic "rules"', "did you mean 'rule'?"),
        (ROLES, "for_each = local.of_pods", "foreach = local.of_pods", "did you mean 'for_each'?"),
        (ROLES, "local.of_machines", "local.machines", "declared nowhere"),
        (COPY, "sse_kms_encrypted_objects {", "sse_kms_objects {", "is no block of rule/source_selection_criteria"),
        (COPY, "{var.bucket}", "{var.buckets}", "did you mean 'var.bucket'?"),
        ("infra/terraform/variables.tf", "error_message", "error_mesage", "did you mean 'error_message'?"),
        ("infra/terraform/versions.tf", "required_version", "require_version", "did you mean 'required_version'?"),
        ("infra/terraform/versions.tf", "region = var.region", "regions = var.region", "did you mean 'region'?"),
        ("infra/terraform/outputs.tf", "description", "descripton", "did you mean 'description'?"),
        ("infra/terraform/example.tfvars", "region =", "regon =", "did you mean 'var.region'?"),
        (BUCKET, "filter {}", "filter {", "cannot be read"),
    ],
)
def test_a_name_that_terraform_does_not_know_is_found(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    tree = planted(tmp_path, name, old, new, *(other for other in TERRAFORM if other != name))
    problems = terraform.names(tree).problems
    assert any(problem.path == name and message in problem.what for problem in problems), problems
    if "cannot be read" not in message:
        assert line_of(tree, name, new.strip()) in {problem.line for problem in problems}


def test_values_are_skipped() -> None:
    text = 'a = "x ${f("}", { b = 1 })} $${ \\" }" # {\nb = <<-EOT\n  c = {\nEOT\n'
    text += 'd "e" "f" {\n  g = {\n    h = [1]\n  }\n  i {}\n}\n'
    read = hcl.parsed(text)
    assert read.arguments == {"a": 1, "b": 2}
    (block,) = read.blocks
    assert (block.kind, block.labels, block.line, block.arguments) == ("d", ("e", "f"), 5, {"g": 6})
    assert [inner.kind for inner in block.blocks] == ["i"]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (CONFIG, "scrape_interval", "scrape_intervall", "did you mean 'scrape_interval'?"),
        (CONFIG, "scrape_configs:", "scrape_config:", "did you mean 'scrape_configs'?"),
        (CONFIG, "http_sd_configs:", "http_sd_config:", "did you mean 'http_sd_configs'?"),
        (CONFIG, "credentials_file:", "credential_file:", "did you mean 'credentials_file'?"),
        (CONFIG, "action: drop", "action: dorp", "'dorp' is not one of"),
        (CONFIG, "refresh_interval: 15s", "refresh_interval: 15", "must be of type string; quote it"),
        (RULES, "expr:", "expression:", "is no field here"),
        (RULES, "    rules:", "    rulse:", "did you mean 'rules'?"),
        (RULES, "annotations:", "anotations:", "did you mean 'annotations'?"),
        (RULES, "for: 1m", "for: 1min", "1min"),
        (RULES, "- alert: HeadDown", "- alarm: HeadDown", "is no field here"),
    ],
)
def test_a_key_that_prometheus_does_not_know_is_found(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    report = services.prometheus(planted(tmp_path, name, old, new))
    assert any(problem.path == name and message in problem.what for problem in report.problems), report.problems
    assert "expressions were not checked" in report.skipped


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("#SBATCH --job-nmae=googlenet", "did you mean --job-name?"),
        ("#SBATCH --job_name=googlenet", "did you mean --job-name?"),
        ("#SBATCH -J googlenet --exclusiv", "did you mean --exclusive?"),
        ("#SBATCH -Z googlenet", "-Z is no option"),
        ("#SBATCH", "no option"),
        ("# SBATCH --job-name=googlenet", "begin with #SBATCH"),
        ("true\n#SBATCH --job-name=googlenet", "behind the first command"),
    ],
)
def test_an_option_that_sbatch_does_not_know_is_found(tmp_path: Path, new: str, message: str) -> None:
    tree = planted(tmp_path, SBATCH, "#SBATCH --job-name=googlenet", new)
    problems = slurm.options(tree).problems
    assert any(message in problem.what for problem in problems), problems


def test_values_and_remarks_of_sbatch_lines_are_no_options(tmp_path: Path) -> None:
    text = '#!/bin/sh\n#SBATCH -N2 --comment="a --b" -t 1:00 --mem=0 # not --this\n'
    assert slurm.options(written(tmp_path, "it.sbatch", text)).problems == ()
