"""Every block of the documentation that is marked as runnable runs as printed, in an environment of its own.

The line before a block marks it: `<!-- runnable -->`, or `<!-- runnable: cluster -->` for one that starts Ray. Blocks
of a page run in order and share a folder and a storage.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.installed import make_environment, run_in
from tests.support.launched import ROOT

PAGES = ("README.md", "docs/api.md", "docs/extending.md")
SECONDS = 600
_BLOCK = re.compile(r"^<!-- runnable(?P<cluster>: cluster)? -->\n```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_MARK = re.compile(r"^<!-- runnable", re.M)


class Block(NamedTuple):
    """A runnable block of a page."""

    line: int
    language: str
    text: str
    needs_cluster: bool


def list_blocks(page: str) -> list[Block]:
    """Return the runnable blocks of a page, none of one that is not there."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [
        Block(text.count("\n", 0, match.start()) + 3, match["language"], match["text"], match["cluster"] is not None)
        for match in _BLOCK.finditer(text)
    ]


def run_blocks(page: str, blocks: list[Block], folder: Path) -> None:
    """Run blocks in order; each must exit with status 0."""
    programs = make_environment(folder / "venv")
    place = folder / "empty"
    place.mkdir()
    for block in blocks:
        words = {"python": ["python", "-c", block.text], "sh": ["sh", "-euc", block.text]}[block.language]
        done = run_in(programs, words, place, SECONDS, {"ORCHESTRATOR_RUNS": str(folder / "runs")})
        assert done.returncode == 0, f"{page}:{block.line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), f"{page}:{block.line}: printed nothing"


@pytest.mark.parametrize("page", PAGES)
def test_every_mark_belongs_to_a_block_of_python_or_shell(page: str) -> None:
    path = ROOT / page
    marks = _MARK.findall(path.read_text(encoding="utf-8")) if path.exists() else []
    blocks = list_blocks(page)
    assert len(marks) == len(blocks)
    assert {block.language for block in blocks} <= {"python", "sh"}


def test_the_page_of_the_api_has_blocks_of_each_sort() -> None:
    blocks = list_blocks("docs/api.md")
    assert {(block.language, block.needs_cluster) for block in blocks} >= {
        ("python", False), ("python", True), ("sh", False),
    }  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES)
def test_cheap_blocks_run_as_printed(page: str, tmp_path: Path) -> None:
    run_blocks(page, [block for block in list_blocks(page) if not block.needs_cluster], tmp_path)


@pytest.mark.cluster
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.needs_cluster for block in list_blocks(page))])
def test_blocks_that_start_ray_run_as_printed(page: str, tmp_path: Path) -> None:
    run_blocks(page, [block for block in list_blocks(page) if block.needs_cluster], tmp_path)
