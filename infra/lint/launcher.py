"""Files of Ray's cluster launcher: its schema, the machines as EC2 takes them, and what we promise of every cluster."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from infra.lint import documents, schema
from infra.lint.documents import Document, Place, format_place
from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

# Read by node providers and by the launcher, but not in its schema, which leaves `provider` open.
PROVIDER_KEYS = ("coordinator_address", "external_head_ip", "use_external_head_ip", "disable_launch_config_check")
# Ray's own words among those of RunInstances.
RAYS = ("SubnetIds",)


def launcher(tree: Tree) -> Report:
    """Launcher files, known by cluster_name and provider at their top."""
    found = [
        document
        for document in documents.of(tree)
        if isinstance(document.data, dict) and isinstance(document.data.get("provider"), dict)
        if "cluster_name" in document.data
    ]
    if not found:
        return Report("launcher", 0)
    checker = _schema()
    if checker is None:
        return Report("launcher", len(found), skipped="ray is not installed, whose wheel has the schema")
    return Report("launcher", len(found), tuple(problem for document in found for problem in _of(document, checker)))


@cache
def _schema() -> dict[str, Any] | None:
    """The schema in Ray's wheel, closed; found without importing Ray, which takes a second."""
    spec = importlib.util.find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json"
    made = schema.closed(json.loads(path.read_text(encoding="utf-8")))
    provider = made["properties"]["provider"]
    provider["additionalProperties"] = False
    provider["properties"] = {**provider["properties"], **{key: {} for key in PROVIDER_KEYS}}
    return made


def _of(document: Document, checker: dict[str, Any]) -> Iterator[Problem]:
    yield from schema.problems(document, checker)
    for place, what in (*_provider(document.data), *_machines(document.data), *_commands(document.data)):
        yield Problem(document.name, document.line(place), f"{format_place(place)}: {what}")


def _provider(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    provider = data["provider"]
    if provider.get("type") == "local" and "coordinator_address" not in provider:
        for key in ("head_ip", "worker_ips"):
            if key not in provider:
                yield ("provider",), f"{key} is missing, which provider type local needs"


def _machines(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    types = data.get("available_node_types")
    if not isinstance(types, dict):
        return
    if data.get("head_node_type") not in types:
        yield ("head_node_type",), f"{data.get('head_node_type')!r} is unknown: must be one of {', '.join(types)}"
    least = sum(int(machine.get("min_workers", 0)) for machine in types.values())
    if least > int(data.get("max_workers", 0)):
        yield ("max_workers",), f"{data.get('max_workers', 0)} is too small: the types' min_workers add up to {least}"
    if data["provider"].get("type") == "aws":
        for name, machine in types.items():
            yield from _of_ec2(machine.get("node_config") or {}, ("available_node_types", name, "node_config"))


def _of_ec2(config: dict[str, Any], place: tuple[str, ...]) -> Iterator[tuple[Place, str]]:
    """Yield what EC2's own description of RunInstances rejects in a machine, and promises that it breaks."""
    validate: Any = importlib.import_module("botocore.validate")
    given = {key: value for key, value in config.items() if key not in RAYS}
    errors = validate.ParamValidator().validate({**given, "MinCount": 1, "MaxCount": 1}, _run_instances())
    for line in errors.generate_report().splitlines():
        yield place, f"{line}"
    if (config.get("MetadataOptions") or {}).get("HttpTokens") != "required":
        yield (*place, "MetadataOptions"), "HttpTokens: required is missing (IMDSv2)"
    for index, disk in enumerate(config.get("BlockDeviceMappings") or [{}]):
        if (disk.get("Ebs") or {}).get("Encrypted") is not True:
            yield (*place, "BlockDeviceMappings", index), "Ebs: {Encrypted: true} is missing"
    for key, otherwise in (
        ("IamInstanceProfile", "Ray would make a role with full access"),
        ("SecurityGroupIds", "Ray would make a group that opens ssh to the internet"),
    ):
        if not config.get(key):
            yield place, f"{key} is missing: {otherwise}"


@cache
def _run_instances() -> Any:
    session: Any = importlib.import_module("botocore.session")
    return session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _commands(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = data.get(key)
        if not commands:
            yield (
                (key,),
                "is missing: Ray's default starts without a token, after a `ray stop` that ends everybody's Ray",
            )
            continue
        for index, command in enumerate(map(str, commands)):
            if "ray stop" in command:
                yield (key, index), "`ray stop` ends every Ray process of the machine: node.sh stops what is ours"
            if "ray start" in command and "node.sh start" not in command and "RAY_AUTH_MODE=token" not in command:
                yield (key, index), "starts Ray without a token: use cluster/ssh/node.sh, or export RAY_AUTH_MODE=token"
            if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
                yield (key, index), "--dashboard-host=127.0.0.1 is missing: the job server must not be exposed"
