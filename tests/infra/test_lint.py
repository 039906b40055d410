"""python -m infra.lint: a mistake planted in each kind of file is found, and the repository as it is has none."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.launched import ROOT

if find_spec("kubernetes_validate") is None:
    pytest.skip("the extra `lint` is not installed: `make check` installs it", allow_module_level=True)

from infra.lint import kubernetes, launcher, tools
from infra.lint.__main__ import checked
from infra.lint.tree import Tree
from tests.infra.planting import copied, line_of, planted, written

BASE = "cluster/kubernetes/base"
CLUSTER = f"{BASE}/raycluster.yaml"
JOB = "cluster/kubernetes/components/job/embed/rayjob.yaml"
WORKERS = "cluster/kubernetes/overlays/large/workers.yaml"
SSH = "cluster/ssh/cluster.yaml"
AWS = "cluster/aws/cluster.yaml"


@pytest.fixture(scope="module")
def repository() -> Tree:
    return Tree(ROOT)


# ------------------------------------------------------------------ the repository as it is
@pytest.mark.process
def test_the_repository_passes(repository: Tree) -> None:
    reports = checked(repository)
    assert [str(problem) for report in reports for problem in report.problems] == []
    seen = {report.kind: report.files for report in reports}
    # A check that found nothing to look at would pass, too.
    assert all(seen[kind] for kind in ("kuberay", "kubernetes", "kustomize", "launcher", "shellcheck", "yamllint")), (
        seen
    )
    assert seen["hadolint"] and seen["compose"] and seen["terraform"] and seen["systemd"] and seen["credentials"], seen
    assert seen["tf names"] and seen["sbatch"] and seen["prometheus"], seen


# ------------------------------------------------------------------ KubeRay
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (CLUSTER, "minReplicas: 2", "minReplica: 2", "did you mean 'minReplicas'?"),
        (CLUSTER, 'num-cpus: "0"', "num-cpus: 0", "must be of type string; quote it"),
        (CLUSTER, "serviceType: ClusterIP", "servicetype: ClusterIP", "did you mean 'serviceType'?"),
        (CLUSTER, "mode: token", "mode: tokens", "'tokens' is not one of"),
        (CLUSTER, "mode: token", "mode: disabled", "must be token"),
        (CLUSTER, "runAsNonRoot: true", "runAsNonroot: true", "did you mean 'runAsNonRoot'?"),
        (CLUSTER, "rayVersion: ", "rayVersion: 1.", "constraints.txt has"),
        (CLUSTER, "labels:", "lables:", "did you mean 'labels'?"),
        (CLUSTER, "ray.io/v1", "ray.io/v1alpha1", "no schema"),
        (CLUSTER, ":0.1.0", ":latest", "name one"),
        (CLUSTER, "limits: {cpu: \"2\"", "limits: {cpu: \"3\"", "must be given, and equal"),
        (JOB, "backoffLimit: 5", 'backoffLimit: "5"', "must be of type integer"),
        (JOB, "submitterConfig:", "submitterConf:", "did you mean 'submitterConfig'?"),
        (JOB, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "the operator refuses it"),
        (WORKERS, "maxReplicas: 14", "maxReplica: 14", "did you mean 'maxReplicas'?"),
    ],
)  # fmt: skip
def test_a_mistake_in_kuberays_kinds_is_found(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    others = ["constraints.txt"]
    if name == WORKERS:  # a patch, which its kustomization names
        others.append("cluster/kubernetes/overlays/large/kustomization.yaml")
    tree = planted(tmp_path, name, old, new, *others)
    problems = kubernetes.kuberay(tree).problems
    assert any(problem.path == name and message in problem.what for problem in problems), problems


def test_a_problem_names_the_line(tmp_path: Path) -> None:
    tree = planted(tmp_path, CLUSTER, "minReplicas: 2", "minReplica: 2")
    problems = [problem for problem in kubernetes.kuberay(tree).problems if "did you mean" in problem.what]
    assert [problem.line for problem in problems] == [line_of(tree, CLUSTER, "minReplica: 2")]


def test_a_patch_need_not_be_whole(tmp_path: Path) -> None:
    kustomization = "cluster/kubernetes/overlays/large/kustomization.yaml"
    assert kubernetes.kuberay(Tree(copied(tmp_path, WORKERS, kustomization))).problems == ()
    (tmp_path / kustomization).unlink()
    assert kubernetes.kuberay(Tree(tmp_path)).problems != ()


# ------------------------------------------------------------------ Kubernetes
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (f"{BASE}/networkpolicy.yaml", "podSelector:", "podSelectors:", "podSelectors"),
        (f"{BASE}/disruption.yaml", "minAvailable", "minAvailabel", "minAvailabel"),
        ("cluster/kubernetes/components/redis/redis.yaml", "replicas: 1", "replica: 1", "replica"),
        ("cluster/kubernetes/components/redis/redis.yaml", "drop: [ALL]", "drop: []", "capabilities: {drop: [ALL]}"),
        ("cluster/kubernetes/components/redis/redis.yaml", "redis:7.2-alpine", "redis", "name one"),
    ],
)
def test_a_mistake_in_kubernetes_kinds_is_found(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    problems = kubernetes.kubernetes(planted(tmp_path, name, old, new)).problems
    assert any(problem.path == name and message in problem.what for problem in problems), problems


def test_an_unknown_field_of_a_deployment_is_found(tmp_path: Path) -> None:
    text = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: it}
spec:
  replicaz: 1
  selector: {matchLabels: {it: is}}
  template:
    metadata: {labels: {it: is}}
    spec: {containers: []}
"""
    problems = kubernetes.kubernetes(written(tmp_path, "it.yaml", text)).problems
    assert any("replicaz" in problem.what for problem in problems), problems


# ------------------------------------------------------------------ kustomize
@pytest.fixture
def kubectl() -> None:
    if tools.find("kubectl") is None:
        pytest.skip("kubectl is not on PATH")


@pytest.mark.process
@pytest.mark.usefixtures("kubectl")
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("overlays/small/volume.yaml", "mountPath: /runs", "mountpath: /runs", "did you mean 'mountPath'?"),
        ("overlays/small/volume.yaml", "workerGroupSpecs/0", "workerGroupSpecs/7", "does not render"),
        ("overlays/small/kustomization.yaml", "resources:", "resource:", "does not render"),
        ("components/job/embed/kustomization.yaml", "[spec.rayClusterSpec]", "[spec.rayCluster]", "'rayCluster' is no"),
    ],
)
def test_a_mistake_that_only_rendering_shows_is_found(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    shutil.copytree(ROOT / "cluster/kubernetes", tmp_path / "cluster/kubernetes")
    tree = planted(tmp_path, f"cluster/kubernetes/{name}", old, new, "constraints.txt")
    problems = kubernetes.rendered(tree).problems
    assert any(message in problem.what for problem in problems), problems


def test_without_kubectl_it_says_so(repository: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda _name: None)
    report = kubernetes.rendered(repository)
    assert report.files and "kubectl" in report.skipped and "SKIPPED" in report.line


# ------------------------------------------------------------------ launcher
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (SSH, "worker_ips:", "worker_ipz:", "did you mean 'worker_ips'?"),
        (SSH, "worker_ips:", "worker_ipz:", "worker_ips is missing"),
        (SSH, "setup_commands:", "set_up_commands:", "did you mean 'setup_commands'?"),
        (SSH, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "must not be exposed"),
        (SSH, "cluster/ssh/node.sh start\n    ray start --head", "ray start --head", "without a token"),
        (SSH, "ray start --block", "ray stop; ray start --block", "ends every Ray process"),
        (SSH, "worker_start_ray_commands:", "x: 1\nworker_setup_commands:", "is missing: Ray's default"),
        (AWS, "max_workers: 0", "max_worker: 0", "did you mean 'max_workers'?"),
        (AWS, "HttpTokens: required", "HttpToken: required", '"HttpToken"'),
        (AWS, "HttpTokens: required", "HttpTokens: optional", "IMDSv2"),
        (AWS, "Encrypted: true", "Encrypted: false", "Ebs: {Encrypted: true} is missing"),
        (AWS, "head_node_type: head", "head_node_type: heads", "must be one of head, gpu"),
        (AWS, "      SecurityGroupIds: [sg-YOURS]\n", "", "opens ssh to the internet"),
        (AWS, "resources: {CPU: 0}", "resources: {CPU: none}", "must be of type integer"),
    ],
)
def test_a_mistake_in_a_launcher_file_is_found(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    problems = launcher.launcher(planted(tmp_path, name, old, new)).problems
    assert any(problem.path == name and message in problem.what for problem in problems), problems


# ------------------------------------------------------------------ programs
def test_a_mistake_in_a_script_is_found(tmp_path: Path) -> None:
    name = "cluster/ssh/node.sh"
    tree = planted(tmp_path, name, "fail() {", "unsafe() {\n    rm -rf $1/cache\n}\n\nfail() {")
    (problem,) = tools.shell(tree).problems
    assert problem.path == name and "SC2086" in problem.what
    assert problem.line == line_of(tree, name, "rm -rf $1/cache")


@pytest.mark.parametrize("first", ["#!/bin/sh", "#!/usr/bin/env bash"])
def test_a_script_is_known_by_its_first_line(tmp_path: Path, first: str) -> None:
    tree = written(tmp_path, "bin/run", f"{first}\nrm $1\n")
    assert any("SC2086" in problem.what for problem in tools.shell(tree).problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: 1\na: 2\n", "duplication of key"), ("a:\n\t- b\n", "syntax error"), ("a: !thing 1\n", "cannot be read")],
)
def test_bad_yaml_is_found(tmp_path: Path, text: str, message: str) -> None:
    problems = tools.yaml(written(tmp_path, "it.yaml", text)).problems
    assert any(message in problem.what for problem in problems), problems


def test_a_mistake_in_a_dockerfile_is_found(tmp_path: Path) -> None:
    tree = planted(tmp_path, "infra/images/Dockerfile", '\nCMD ["bash"]\n', "\nCMD bash\n")
    problems = tools.images(tree).problems
    assert any("DL3025" in problem.what for problem in problems), problems


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n  head:\n", "\n  head:\n    imagee: x\n", "imagee"),
        ("condition: service_healthy", "condition: service_well", "condition"),
    ],
)
def test_a_mistake_in_a_compose_file_is_found(tmp_path: Path, old: str, new: str, message: str) -> None:
    shutil.copytree(ROOT / "infra/compose", tmp_path / "infra/compose")
    problems = tools.compose(planted(tmp_path, "infra/compose/compose.yaml", old, new)).problems
    assert any(message in problem.what for problem in problems), problems


def test_a_program_that_fails_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "shellcheck"
    broken.write_text("#!/bin/sh\necho 'cannot start' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(tools, "find", lambda _name: str(broken))
    (problem,) = tools.shell(written(tmp_path / "tree", "it.sh", "#!/bin/sh\n")).problems
    assert "status 3: cannot start" in problem.what
