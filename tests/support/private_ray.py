"""A Ray whose private modules cannot be imported by the package: what another version of Ray may be."""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "orchestrator."
DOOR = [
    Path(__file__).resolve().parents[2] / "orchestrator" / "ray_backend" / f"{name}.py"
    for name in ("ray_internals", "fast_start")
]
# Imported by Python itself when it starts, in each process whose PYTHONPATH has its folder first.
SITE = """
from tests.support.private_ray import block, list_private_modules
block(list_private_modules())
"""


def list_private_modules() -> list[str]:
    """The modules of Ray that the door imports from, but for the public ones."""
    return sorted({name for path in DOOR for name in _imported(path) if re.search(r"\._|generated|internal_kv", name)})


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray."):
            inside = node.module == "ray.core.generated"
            yield from [f"{node.module}.{alias.name}" for alias in node.names] if inside else [str(node.module)]


def block(modules: list[str]) -> Any:
    """Have the package's own imports of these modules fail, in this process; Ray's own work. Returns what undoes it."""
    original: Any = builtins.__import__

    def import_unless_blocked(name: str, *arguments: Any, **named: Any) -> Any:
        values = named.get("globals") or (arguments[0] if arguments else None) or {}
        if name.startswith("ray.") and str(values.get("__name__", "")).startswith(PACKAGE):
            names = named.get("fromlist") or (arguments[2] if len(arguments) > 2 else None) or ()
            for module in (name, *(f"{name}.{one}" for one in names)):
                if module in modules:
                    raise ImportError(f"{module} is blocked")
        return original(name, *arguments, **named)

    builtins.__import__ = import_unless_blocked

    def undo() -> None:
        builtins.__import__ = original

    return undo
