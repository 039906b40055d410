"""Folders with files of the repository in which a mistake was planted."""

import shutil
from pathlib import Path

from infra.lint.tree import Tree
from tests.support.launched import ROOT


def copied(tmp_path: Path, *names: str) -> Path:
    """Copy some of the repository's files to their places in another folder."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def planted(tmp_path: Path, name: str, old: str, new: str, *others: str) -> Tree:
    """Return a folder with a copy of the file in which `old` is replaced."""
    path = copied(tmp_path, name, *others) / name
    text = path.read_text()
    assert old in text, f"{name} no longer has {old!r}"
    path.write_text(text.replace(old, new, 1))
    return Tree(tmp_path)


def line_of(tree: Tree, name: str, words: str) -> int:
    """Return the number of the first line that has the words."""
    return next(number for number, line in enumerate((tree.text(name) or "").splitlines(), 1) if words in line)


def written(tmp_path: Path, name: str, text: str) -> Tree:
    """Return a folder with one file."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return Tree(tmp_path)
