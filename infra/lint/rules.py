"""Rules that no schema has: what KubeRay's operator refuses, what a restricted namespace refuses, what we promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from infra.lint.documents import Document, Place, format_place
from infra.lint.report import Problem
from infra.lint.tree import Tree

Found = Iterator[tuple[Place, str]]


def problems(tree: Tree, document: Document) -> Iterator[Problem]:
    """Yield the rules that a whole object breaks."""
    for place, what in (*_of_ray(document, pinned_ray(tree)), *_of_pods(document.data, ())):
        yield Problem(document.name, document.line(place), f"{document.origin}{format_place(place)}: {what}")


def pinned_ray(tree: Tree) -> str:
    """The version of Ray in constraints.txt; empty where there is no such file."""
    text = tree.text("constraints.txt") if "constraints.txt" in tree.files else None
    found = re.search(r"^ray==(\S+)$", text or "", re.MULTILINE)
    return found[1] if found else ""


def _of_ray(document: Document, pinned: str) -> Found:
    api, kind = document.kind
    if not api.startswith("ray.io/"):
        return
    spec = document.data.get("spec") or {}
    place: Place = ("spec",)
    if kind == "RayJob":
        yield from _of_job(spec)
        place, spec = ("spec", "rayClusterSpec"), spec.get("rayClusterSpec")
        if spec is None:
            return  # copied into it by kustomize: the rendered one is checked, too
    if (spec.get("authOptions") or {}).get("mode") != "token":
        yield (*place, "authOptions", "mode"), "must be token: without it everybody who reaches Ray runs code on it"
    if pinned and str(spec.get("rayVersion")) != pinned:
        yield (*place, "rayVersion"), f"{spec.get('rayVersion')} is another version: constraints.txt has {pinned}"


def _of_job(spec: dict[str, Any]) -> Found:
    finishes = bool(spec.get("shutdownAfterJobFinishes"))
    if spec.get("ttlSecondsAfterFinished") and not finishes:
        yield ("spec", "ttlSecondsAfterFinished"), "the operator refuses it without shutdownAfterJobFinishes: true"
    if finishes and (spec.get("deletionStrategy") or {}).get("deletionRules"):
        yield (
            ("spec", "deletionStrategy"),
            "the operator refuses deletionRules beside shutdownAfterJobFinishes: choose one",
        )


def _of_pods(data: Any, place: tuple[str | int, ...]) -> Found:
    """Every pod template in an object, wherever it is."""
    if isinstance(data, list):
        for index, part in enumerate(data):
            yield from _of_pods(part, (*place, index))
    if not isinstance(data, dict):
        return
    if isinstance(data.get("containers"), list):
        yield from _of_pod(data, place)
    for key, part in data.items():
        yield from _of_pods(part, (*place, key))


def _of_pod(pod: dict[str, Any], place: tuple[str | int, ...]) -> Found:
    security = pod.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield (*place, "securityContext"), "runAsNonRoot: true is missing: a restricted namespace refuses the pod"
    if (security.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield (
            (*place, "securityContext"),
            "seccompProfile: {type: RuntimeDefault} is missing: a restricted namespace refuses the pod",
        )
    for index, container in enumerate(pod["containers"]):
        yield from _of_container(container, (*place, "containers", index))


def _of_container(container: dict[str, Any], place: tuple[str | int, ...]) -> Found:
    security = container.get("securityContext") or {}
    if security.get("allowPrivilegeEscalation") is not False:
        yield (
            (*place, "securityContext"),
            "allowPrivilegeEscalation: false is missing: a restricted namespace refuses the pod",
        )
    if "ALL" not in ((security.get("capabilities") or {}).get("drop") or []):
        yield (
            (*place, "securityContext"),
            "capabilities: {drop: [ALL]} is missing: a restricted namespace refuses the pod",
        )
    image = str(container.get("image", ""))
    if image.endswith(":latest") or ":" not in image.rpartition("/")[2]:
        yield (*place, "image"), f"{image!r} has no version: name one, so that every node runs the same one"
    resources = container.get("resources") or {}
    if not resources.get("limits") or resources.get("requests") != resources.get("limits"):
        yield (
            (*place, "resources"),
            "requests and limits must be given, and equal: Ray takes the limits for what the node has",
        )
