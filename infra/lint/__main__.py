"""Checks every manifest, script and configuration of the repository: `python -m infra.lint`.

It finds the files by itself. What a check needs and this machine lacks is said aloud and skipped; --strict makes that a
failure. Exit status 1 when anything is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro

from infra.lint import credentials, kubernetes, launcher, phrases, services, slurm, terraform, tools
from infra.lint.report import Report
from infra.lint.tree import Tree

ROOT = Path(__file__).resolve().parent.parent.parent
# In one process each, or a moment of Python.
CHECKS: tuple[Callable[[Tree], Report], ...] = (
    kubernetes.kuberay,
    kubernetes.kubernetes,
    kubernetes.rendered,
    launcher.launcher,
    tools.shell,
    tools.yaml,
    tools.images,
    tools.compose,
    tools.terraform,
    terraform.names,
    slurm.options,
    services.units,
    services.prometheus,
    services.dashboards,
    credentials.credentials,
    phrases.check_phrases,
)


@dataclass(frozen=True)
class Lint:
    """Check every manifest, script and configuration of the repository."""

    root: Path = ROOT
    """the repository"""
    strict: bool = False
    """whether a check that could not be made counts as failed"""


def main() -> int:
    """The exit status."""
    lint = tyro.cli(Lint, description=__doc__)
    if find_spec("kubernetes_validate") is None:
        print(f"infra.lint: error: the packages that it needs are not installed: {tools.EXTRA}", file=sys.stderr)
        return 1
    try:
        reports = checked(Tree(lint.root))
    except ValueError as error:
        print(f"infra.lint: error: {error}", file=sys.stderr)
        return 1
    for report in reports:
        print(report.line)
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems:
        print(problem)
    return 1 if problems or (lint.strict and any(report.skipped for report in reports)) else 0


def checked(tree: Tree) -> list[Report]:
    """Run all checks and return their reports."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda check: check(tree), CHECKS))


if __name__ == "__main__":
    raise SystemExit(main())
