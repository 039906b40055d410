"""Names in Terraform's files, which `terraform fmt` does not look at and `validate` only with its providers at hand."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from infra.lint import hcl
from infra.lint.hcl import Block
from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

NAMES = Path(__file__).resolve().parent.parent / "schemas" / "terraform.toml"
TYPED = ("resource", "data", "provider")
# Known, path of a block -> its arguments.
Known = Mapping[str, list[str]]
Found = Iterator[tuple[int, str]]
REFERENCE = re.compile(r"(?<![\w.])(?:(var|local)\.([\w-]+)|(data\.)?(aws_\w+)\.([\w-]+))")


def names(tree: Tree) -> Report:
    """Arguments, blocks and references, by lists of what there is."""
    files = tree.named("*.tf", "*.tfvars")
    problems: list[Problem] = []
    folders: dict[PurePosixPath, dict[str, Block]] = defaultdict(dict)
    for name in files:
        try:
            folders[PurePosixPath(name).parent][name] = hcl.parsed(tree.text(name) or "")
        except ValueError as error:
            line, what = error.args
            problems.append(Problem(name, line, f"cannot be read: {what}"))
    for read in folders.values():
        declared = set(_declared(block for name, block in read.items() if name.endswith(".tf")))
        for name, block in read.items():
            text = tree.text(name) or ""
            found = _of_file(block, text, declared) if name.endswith(".tf") else _of_values(block, declared)
            problems += [Problem(name, line, what) for line, what in found]
    return Report("tf names", len(files), tuple(problems))


@cache
def _known() -> dict[str, dict[str, dict[str, list[str]]]]:
    read: dict[str, Any] = tomllib.loads(NAMES.read_text(encoding="utf-8"))
    for kind in ("resource", "data"):
        for paths in read[kind].values():
            for path, arguments in read["core"]["meta"].items():
                paths[path] = [*paths.get(path, []), *arguments]
    return read


def _declared(files: Iterator[Block]) -> Iterator[str]:
    """Return what may be referred to, as it is written."""
    for file in files:
        for block in file.blocks:
            if block.kind == "variable":
                yield f"var.{'.'.join(block.labels)}"
            elif block.kind == "locals":
                yield from (f"local.{name}" for name in block.arguments)
            elif block.kind in ("resource", "data"):
                yield ("data." if block.kind == "data" else "") + ".".join(block.labels)


def _of_values(values: Block, declared: set[str]) -> Found:
    for name, line in values.arguments.items():
        if f"var.{name}" not in declared:
            yield line, f"{name} is no variable of this folder{_near(f'var.{name}', declared)}"


def _of_file(file: Block, text: str, declared: set[str]) -> Found:
    for name, line in file.arguments.items():
        yield line, f"{name}: an argument stands in a block"
    for block in file.blocks:
        known = _of_block(block)
        if known is None:
            named = " ".join((block.kind, *block.labels[:1]))
            yield (
                block.line,
                f"{named}: infra/schemas/terraform.toml has no such thing: correct it, or list its names there",
            )
        else:
            yield from _inside(block, known, "")
    # In strings, too; a comment that names what is not there is wrong as well.
    for number, words in enumerate(text.splitlines(), 1):
        for found in REFERENCE.finditer(words):
            if found[0] not in declared:
                yield number, f"{found[0]} is declared nowhere in this folder{_near(found[0], declared)}"


def _of_block(block: Block) -> Known | None:
    if block.kind in TYPED:
        return _known()[block.kind].get(block.labels[0] if block.labels else "")
    return _known()["core"].get(block.kind) if block.kind != "meta" else None


def _inside(block: Block, known: Known, path: str) -> Found:
    """Yield what is unknown in a block, and in those in it."""
    arguments = known[path or "."]
    for name, line in block.arguments.items():
        if name not in arguments and "*" not in arguments:
            yield (
                line,
                f"{name} is no argument of {path or ' '.join((block.kind, *block.labels[:1]))}{_near(name, arguments)}",
            )
    here = [key.rpartition("/")[2] for key in known if key != "." and key.rpartition("/")[0] == path]
    for inner in block.blocks:
        name = inner.labels[0] if inner.kind == "dynamic" and inner.labels else inner.kind
        if name not in here:
            yield inner.line, f"{name} is no block of {path or block.kind}{_near(name, here)}"
        elif inner.kind == "dynamic":
            yield from _of_dynamic(inner, known, f"{path}/{name}".lstrip("/"))
        else:
            yield from _inside(inner, known, f"{path}/{name}".lstrip("/"))


def _of_dynamic(block: Block, known: Known, path: str) -> Found:
    for name, line in block.arguments.items():
        if name not in (given := ("for_each", "iterator", "labels")):
            yield line, f"{name} is no argument of a dynamic block{_near(name, given)}"
    for inner in block.blocks:
        if inner.kind == "content":
            yield from _inside(inner, known, path)
        else:
            yield inner.line, f"{inner.kind} is no block of a dynamic block: only content is"


def _near(name: str, allowed: Any) -> str:
    """Return what was probably meant."""
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f": did you mean {near[0]!r}?" if near else ""
