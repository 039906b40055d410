"""Objects of Kubernetes and KubeRay, as they stand in files and as kustomize renders them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from infra.lint import documents, rules, schema, tools
from infra.lint.documents import Document
from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"
KUBERAY = "kuberay-v1.7.0-{kind}.v1.json"
RAY_API = "ray.io/v1"
# The definitions leave metadata open, since the API server checks it itself.
METADATA = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in ("name", "generateName", "namespace")},
        **{name: {"type": "object", "additionalProperties": {"type": "string"}} for name in ("labels", "annotations")},
        "finalizers": {"type": "array", "items": {"type": "string"}},
    },
}


def kuberay(tree: Tree) -> Report:
    """KubeRay's kinds in files, against the schemas of its definitions."""
    partial = documents.patches(tree)
    found = [document for document in documents.of(tree) if document.kind[0].startswith("ray.io/")]
    problems: list[Problem] = []
    for document in found:
        whole = document.name not in partial
        problems += of_kuberay(document, whole)
        problems += rules.problems(tree, document) if whole else ()
    return Report("kuberay", len({document.name for document in found}), tuple(problems))


def kubernetes(tree: Tree) -> Report:
    """Kubernetes' own kinds in files, against its published schemas; unknown fields are errors."""
    partial = documents.patches(tree)
    found = [
        document
        for document in documents.of(tree)
        if all(document.kind)
        and not document.kind[0].startswith("ray.io/")
        and not documents.is_kustomization(document)
    ]
    problems: list[Problem] = []
    for document in found:
        problems += of_kubernetes(document)
        problems += rules.problems(tree, document) if document.name not in partial else ()
    return Report("kubernetes", len({document.name for document in found}), tuple(problems))


def rendered(tree: Tree) -> Report:
    """Check what every kustomization makes, as a whole."""
    bases = [
        document.name
        for document in documents.of(tree)
        if documents.is_kustomization(document) and document.kind[1] == "Kustomization"
    ]
    kubectl = tools.find("kubectl")
    if kubectl is None:
        return Report(
            "kustomize", len(bases), skipped="kubectl is not on PATH: what kustomizations render was not checked"
        )
    problems: list[Problem] = []
    for name in bases:
        done = tools.run([kubectl, "kustomize", str(tree.root / PurePosixPath(name).parent)], tree.root)
        if done.returncode:
            problems.append(Problem(name, 1, f"does not render: {done.stderr.strip()[-600:]}"))
            continue
        for document in documents.parsed(name, done.stdout):
            problems += of_rendered(tree, name, document)
    return Report("kustomize", len(bases), tuple(problems))


def of_rendered(tree: Tree, name: str, document: Document) -> Iterator[Problem]:
    """Yield what is wrong with one object that a kustomization made."""
    title = f"rendered {document.kind[1]} {(document.data.get('metadata') or {}).get('name')}: "
    # Lines are those of what was rendered, which is in no file: the kustomization's first one stands for all.
    made = Document(name, document.data, None, title)
    yield from of_kuberay(made) if made.kind[0].startswith("ray.io/") else of_kubernetes(made)
    yield from rules.problems(tree, made)
    if made.kind[1] == "RayJob" and not made.data["spec"].get("rayClusterSpec"):
        yield Problem(name, 1, f"{title}spec.rayClusterSpec is missing: what was to copy the RayCluster's spec did not")


def of_kuberay(document: Document, whole: bool = True) -> Iterator[Problem]:
    """Yield what is wrong with an object of KubeRay; a part of one need not be `whole`."""
    api, kind = document.kind
    path = SCHEMAS / KUBERAY.format(kind=kind)
    if api != RAY_API or not path.is_file():
        yield Problem(
            document.name,
            document.line(["kind"]),
            f"{api} {kind}: no schema: infra/schemas has RayCluster and RayJob of {RAY_API}",
        )
        return
    yield from schema.problems(document, _of_kind(kind, whole))


@cache
def _of_kind(kind: str, whole: bool) -> dict[str, Any]:
    read = json.loads((SCHEMAS / KUBERAY.format(kind=kind)).read_text(encoding="utf-8"))
    made = schema.closed({**read, "properties": {**read["properties"], "metadata": METADATA}}, whole)
    return made if not whole else {**made, "required": ["apiVersion", "kind", "metadata", "spec"]}


def of_kubernetes(document: Document) -> Iterator[Problem]:
    """Yield what is wrong with an object of Kubernetes itself."""
    library: Any = importlib.import_module("kubernetes_validate")
    try:
        library.validate(document.data, library.latest_version(), strict=True)
    except library.ValidationError as error:
        place = list(error.path)
        yield Problem(
            document.name, document.line(place), f"{document.origin}{documents.format_place(place)}: {error.message}"
        )
    except (library.SchemaNotFoundError, library.InvalidSchemaError) as error:
        yield Problem(
            document.name, document.line(["kind"]), f"{document.origin}{' '.join(document.kind)}: no schema: {error}"
        )
