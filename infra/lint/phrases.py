"""Phrases that do not belong in the project's prose: `phrases.toml` lists them with what to write instead."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

LIST = Path(__file__).with_name("phrases.toml")
PATTERNS = ("*.py", "*.md", "*.sh", "*.toml", "*.yaml", "*.yml", "*.jinja", "Makefile")


@dataclass(frozen=True)
class Phrase:
    """A phrase to avoid."""

    pattern: re.Pattern[str]
    instead: str
    """what to write in its place"""


def check_phrases(tree: Tree, phrase_list: dict[str, Any] | None = None) -> Report:
    """Report each line that has a phrase to avoid. phrase_list: contents of `phrases.toml` by default.

    Raises ValueError for an entry of `exempt` or `pending` that names no file: it has to go from the list.
    """
    if phrase_list is None:
        phrase_list = tomllib.loads(LIST.read_text(encoding="utf-8"))
    phrases = [Phrase(re.compile(entry["match"], re.I), entry["instead"]) for entry in phrase_list["phrase"]]
    skipped = tuple([*phrase_list["exempt"], *phrase_list["pending"]])
    names = tree.named(*PATTERNS)
    stale = [prefix for prefix in skipped if not any(name.startswith(prefix) for name in names)]
    if stale and LIST.is_relative_to(tree.root):  # another tree, such as a test's, has other files
        raise ValueError(f"{LIST.name}: {', '.join(stale)} names no file; remove it from the list")
    checked = [name for name in names if not name.startswith(skipped)]
    problems = [
        Problem(name, number, f"{match[0]!r}: write {phrase.instead}")
        for name in checked
        for number, line in enumerate((tree.text(name) or "").splitlines(), start=1)
        for phrase in phrases
        if (match := phrase.pattern.search(line))
    ]
    return Report("phrases", len(checked), tuple(problems))
