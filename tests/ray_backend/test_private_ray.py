"""Ray's private parts are used in two modules alone, which the rest of the package reaches through their guard."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "orchestrator"
DOOR = [ROOT / "ray_backend" / name for name in ("fast_start.py", "ray_internals.py")]
PRIVATE_MODULE = re.compile(r"^ray(\.\w+)*\.(_\w+|generated|internal_kv)\b")
MAX_DOOR_LINES = 450


def find_private_uses(source: str) -> Iterator[str]:
    """Yield private modules of Ray that are imported or named in a string, and underscores of what is not ours."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    imported = [
        name
        for node in nodes
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    yield from (name for name in (*imported, *strings) if PRIVATE_MODULE.match(name))
    if not any(name == "ray" or name.startswith("ray.") for name in imported):
        return
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in defined:
            text = ast.unparse(node)
            if not text.startswith(("self.", "cls.")):
                yield text
        if isinstance(node, ast.keyword) and re.match(r"_[a-z]", node.arg or ""):
            yield f"{node.arg}="


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("from ray.train.v2._internal.callbacks import X", ["ray.train.v2._internal.callbacks.X"]),
        ("import ray._private.state", ["ray._private.state"]),
        ("from ray.core.generated import common_pb2", ["ray.core.generated.common_pb2"]),
        ("from ray.experimental import internal_kv", ["ray.experimental.internal_kv"]),
        ("import_module('ray.core.generated.gcs_pb2')", ["ray.core.generated.gcs_pb2"]),
        ("import ray\nray._raylet.x", ["ray._raylet"]),
        ("import ray\nray.init(_temp_dir='/x')", ["_temp_dir="]),
        ("import ray\nfrom ray.train import RunConfig\nself._mine = cls._also", []),
    ],
)
def test_each_kind_of_private_use_is_found(source: str, uses: list[str]) -> None:
    assert list(find_private_uses(source)) == uses


def test_only_the_door_uses_private_parts_of_ray() -> None:
    uses = {
        str(path.relative_to(ROOT)): found
        for path in ROOT.rglob("*.py")
        if path not in DOOR and (found := list(find_private_uses(path.read_text())))
    }
    assert uses == {}
    assert all(list(find_private_uses(path.read_text())) for path in DOOR)


def test_the_door_is_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in DOOR) < MAX_DOOR_LINES
