"""`#SBATCH` lines of scripts: that sbatch knows their options.

sbatch itself says so only where a controller answers, and a job with a line that it refuses is never queued.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

OPTIONS = Path(__file__).resolve().parent.parent / "schemas" / "sbatch.txt"
LETTERS = frozenset("AabBcCdDeFGhHiJkLmMnNoOpqQsStvVwWx")
LINE = re.compile(r"#SBATCH(?P<words>\s.*|$)")
WORD = re.compile(r"(?<!\S)--?(?P<name>[A-Za-z][\w-]*)")


def options(tree: Tree) -> Report:
    """Scripts with such lines, by a list of what sbatch knows."""
    files, problems = 0, []
    for name in tree.scripts:
        lines = (tree.text(name) or "").splitlines()
        if any(LINE.match(line) for line in lines):
            files += 1
            problems += [Problem(name, number, what) for number, what in _of(lines)]
    return Report("sbatch", files, tuple(problems))


@cache
def known() -> frozenset[str]:
    """The long options of sbatch."""
    return frozenset(OPTIONS.read_text(encoding="utf-8").split())


def _of(lines: list[str]) -> Iterator[tuple[int, str]]:
    over = False
    for number, line in enumerate(lines, 1):
        over = over or bool(line.strip() and not line.startswith("#"))
        if (found := LINE.match(line)) is None:
            if re.match(r"\s*#\s*SBATCH\s+-", line):
                yield number, "sbatch reads only lines that begin with #SBATCH"
            continue
        if over:
            yield number, "sbatch does not read it: it stands behind the first command"
        # What stands behind a # is a remark.
        words = re.sub(r"\s#.*|\"[^\"]*\"|'[^']*'", "", found["words"])
        if WORD.search(words) is None:
            yield number, "no option: #SBATCH --name=value"
        for word in WORD.finditer(words):
            yield from ((number, what) for what in _of_option(word[0].strip(), word["name"]))


def _of_option(given: str, name: str) -> Iterator[str]:
    # Slurm takes what is short for an option, too, until a version has another one that begins so.
    if given.startswith("--") and name not in known():
        near = difflib.get_close_matches(name, known(), n=1, cutoff=0.6)
        yield f"{given} is no option of sbatch" + (f": did you mean --{near[0]}?" if near else "")
    elif not given.startswith("--") and name[0] not in LETTERS:
        yield f"-{name[0]} is no option of sbatch"
