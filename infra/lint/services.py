"""Checks of services beside the cluster: systemd's units, Prometheus' files, Grafana's dashboards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infra.lint import documents, schema, tools
from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

# Says what this machine lacks, not what is wrong with a unit.
OF_THE_MACHINE = re.compile(r"is not executable|Failed to (locate|prepare|create|load|open)|not found\.$")
PROMETHEUS = Path(__file__).resolve().parent.parent / "schemas" / "prometheus.json"
PANEL_KEYS = ("id", "title", "type", "gridPos")


def units(tree: Tree) -> Report:
    """Units, by systemd-analyze verify."""
    files = tree.named("*.service", "*.timer", "*.socket", "*.path", "*.slice", "*.target")
    program = tools.find("systemd-analyze")
    if not files or program is None:
        return Report("systemd", len(files), skipped="" if not files else "systemd-analyze is not on PATH")
    done = tools.run([program, "verify", "--man=no", "--recursive-errors=no", *files], tree.root)
    found = [
        problem
        for problem in (*tools.lined(done.stderr, tree.root), *_unplaced(done.stderr, files))
        if problem.path in files and not OF_THE_MACHINE.search(problem.what)
    ]
    drop_ins = tree.named("*.service.d/*.conf")
    found += [problem for name in drop_ins for problem in _of_drop_in(tree, name, program)]
    return Report("systemd", len(files) + len(drop_ins), tuple(found))


def _of_drop_in(tree: Tree, name: str, program: str) -> Iterator[Problem]:
    """Yield what is wrong with a drop-in of a unit that is not ours: a stand-in takes its place."""
    with TemporaryDirectory() as folder:
        unit = Path(folder) / Path(name).parent.name.removesuffix(".d")
        unit.write_text("[Service]\nExecStart=/bin/true\n", encoding="utf-8")
        copy = Path(folder) / Path(name).parent.name / Path(name).name
        copy.parent.mkdir()
        copy.write_text(tree.text(name) or "", encoding="utf-8")
        # The colon at its end: systemd's own folders, too.
        path = f"SYSTEMD_UNIT_PATH={folder}:"
        done = tools.run(["env", path, program, "verify", "--man=no", "--recursive-errors=no", str(unit)], tree.root)
        for problem in tools.lined(done.stderr, tree.root):
            if problem.path == str(copy):
                yield replace(problem, path=name)


def _unplaced(text: str, files: list[str]) -> Iterator[Problem]:
    """Lines of the form `unit: what`, without a number."""
    names = {name.rpartition("/")[2]: name for name in files}
    for unit, what in re.findall(r"^([\w@.-]+\.\w+): (.+)$", text, re.MULTILINE):
        if unit in names:
            yield Problem(names[unit], 1, what)


def prometheus(tree: Tree) -> Report:
    """Configurations and rules, known by their top keys: their keys by our list, expressions by promtool."""
    found = [(kind, document) for document in documents.of(tree) if (kind := _of_prometheus(document.data)) is not None]
    schemas = json.loads(PROMETHEUS.read_text(encoding="utf-8"))
    problems: list[Problem] = []
    for kind, document in found:
        problems += schema.problems(document, schema.closed(schemas[kind]))
    promtool = tools.find("promtool")
    if not found or promtool is None:
        why = "promtool is not on PATH (Debian: prometheus): expressions were not checked"
        return Report("prometheus", len(found), tuple(problems), skipped=why if found else "")
    for kind, document in found:
        # Files that a configuration names lie on the server, not here.
        flags = ["--syntax-only"] if kind == "config" else []
        done = tools.run([promtool, "check", kind, *flags, document.name], tree.root)
        if done.returncode:
            problems.append(Problem(document.name, 1, (done.stderr or done.stdout).strip()[-600:]))
    return Report("prometheus", len(found), tuple(problems))


def _of_prometheus(data: Any) -> str | None:
    """Return which kind of file of Prometheus it is; one misspelt key does not hide it."""
    if not isinstance(data, dict) or "apiVersion" in data:
        return None
    if {"scrape_configs", "rule_files"} & set(data):
        return "config"
    return "rules" if isinstance(data.get("groups"), list) else None


def dashboards(tree: Tree) -> Report:
    """Grafana's dashboards: JSON files with panels, each of which asks something."""
    files, problems = 0, []
    for name in tree.named("*.json"):
        text = tree.text(name) or ""
        try:
            data: Any = json.loads(text)
        except ValueError as error:
            if "grafana" in name or "dashboards" in name:
                files += 1
                problems.append(Problem(name, getattr(error, "lineno", 1), f"no JSON: {error}"))
            continue
        if isinstance(data, dict) and ("panels" in data or "dashboards" in name.split("/")):
            files += 1
            problems += [Problem(name, 1, what) for what in _of_dashboard(data)]
    return Report("dashboards", files, tuple(problems))


def _of_dashboard(data: dict[str, Any]) -> Iterator[str]:
    for key, kind in (("title", str), ("uid", str), ("schemaVersion", int), ("panels", list)):
        if not isinstance(data.get(key), kind) or not data[key]:
            yield f"{key} is missing: a dashboard has one, of type {kind.__name__}"
    panels = [panel for panel in data.get("panels") or [] if isinstance(panel, dict)]
    panels += [inner for panel in panels for inner in panel.get("panels") or []]
    numbers = [panel.get("id") for panel in panels]
    if len(set(numbers)) != len(numbers):
        yield f"panels: two have the same id, of {numbers}"
    for panel in panels:
        named = panel.get("title") or panel.get("id")
        lacking = [key for key in PANEL_KEYS if key not in panel]
        if lacking:
            yield f"panel {named!r}: {', '.join(lacking)} is missing"
        if panel.get("type") not in ("row", "text") and not any(
            target.get("expr") or target.get("rawSql") for target in panel.get("targets") or []
        ):
            yield f"panel {named!r}: no target with an expr or rawSql: it would stay empty"
