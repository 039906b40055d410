"""The check of phrases: problems, exempt files, and stale names in its lists."""

import tomllib
from pathlib import Path

import pytest

from infra.lint import phrases
from infra.lint.tree import Tree

LIST = tomllib.loads(phrases.LIST.read_text(encoding="utf-8")) | {"exempt": [], "pending": []}


def problems(folder: Path, name: str, text: str) -> list[str]:
    (folder / name).write_text(text, encoding="utf-8")
    return [str(problem) for problem in phrases.check_phrases(Tree(folder), LIST).problems]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.py", '    """What is left of a run."""'),
        ("a.py", 'raise ValueError("width: 3 is refused")'),
        ("a.py", "# The driver is told."),
        ("a.md", "The same command goes on where it was."),
        ("a.sh", "# Nobody listens there."),
        ("Makefile", "# removed for good"),
        ("a.yaml", "# both start AT ONCE"),
    ],
)
def test_a_phrase_to_avoid_is_found_with_its_line_and_replacement(tmp_path: Path, name: str, line: str) -> None:
    (problem,) = problems(tmp_path, name, f"first\n{line}\n")
    assert problem.startswith(f"{name}:2: ")
    assert ": write " in problem


@pytest.mark.parametrize(
    "text",
    [
        '"""Return what is left of a run."""',
        'raise ValueError("width must be at least 4, got 3; set --width")',
        "The driver resumes the run.",
        "a forgotten token, sent on time",
    ],
)
def test_plain_english_passes(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, "a.md", text) == []


def test_exempt_files_are_left_alone_and_stale_names_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrases, "LIST", tmp_path / "phrases.toml")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.md").write_text("Nobody was told.")
    assert phrases.check_phrases(Tree(tmp_path), LIST | {"pending": ["old/"]}).problems == ()
    with pytest.raises(ValueError, match=r"gone/ names no file"):
        phrases.check_phrases(Tree(tmp_path), LIST | {"pending": ["gone/"]})
