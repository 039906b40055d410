"""YAML documents that know on which line each value stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from infra.lint.report import Problem
from infra.lint.tree import Tree

Place = Sequence[str | int]


@dataclass(frozen=True)
class Document:
    """One document of a file."""

    name: str
    data: Any
    node: yaml.Node | None = None
    origin: str = ""
    """what made the document, when the file does not hold it itself"""

    def line(self, place: Place) -> int:
        """The line of a value, or of what holds it when there is none."""
        node = self.node
        line = 1 if node is None else node.start_mark.line + 1
        for part in place:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
                if found is None:
                    return line
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                return line
        return line

    @property
    def kind(self) -> tuple[str, str]:
        """(apiVersion, kind) of a Kubernetes object; empty words for anything else."""
        if not isinstance(self.data, dict):
            return "", ""
        return str(self.data.get("apiVersion", "")), str(self.data.get("kind", ""))


def format_place(place: Place) -> str:
    """A place in a document, as a person writes it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".") or "the document"


def parsed(name: str, text: str, origin: str = "") -> list[Document]:
    """The documents of a text; none when it is no YAML, which yamllint tells."""
    loader = yaml.SafeLoader(text)
    documents = []
    try:
        while loader.check_node():
            node = loader.get_node()
            documents.append(Document(name, loader.construct_document(node), node, origin))
    except yaml.YAMLError:
        return []
    finally:
        loader.dispose()
    return [document for document in documents if document.data is not None]


def unreadable(tree: Tree) -> Iterator[Problem]:
    """Files that no check of their content can have looked at, for their tags; yamllint tells of bad syntax."""
    for name in tree.yaml:
        try:
            list(yaml.safe_load_all(tree.text(name) or ""))
        except yaml.constructor.ConstructorError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            yield Problem(name, line, f"cannot be read: {error.problem}")
        except yaml.YAMLError:
            continue


def of(tree: Tree) -> Iterator[Document]:
    """Every YAML document of the repository."""
    for name in tree.yaml:
        yield from parsed(name, tree.text(name) or "")


def patches(tree: Tree) -> set[str]:
    """Files that kustomizations name as patches: parts of objects, which need not be whole."""
    found = set()
    for document in of(tree):
        if not is_kustomization(document):
            continue
        for patch in document.data.get("patches") or []:
            if isinstance(patch, dict) and "path" in patch:
                found.add(str(PurePosixPath(document.name).parent / str(patch["path"])))
    return found


def is_kustomization(document: Document) -> bool:
    """Return whether it is kustomize's own."""
    return document.kind[0].startswith("kustomize.config.k8s.io/")
