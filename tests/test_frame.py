"""The shape of the code base: rooms on their floors, short files, short functions, no hidden imports."""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "orchestrator"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_JOB_LINES = 10
VAGUE_NAMES = {"utils", "util", "helpers", "misc", "common"}

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = sorted(PACKAGE.rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def functions(path: Path) -> Iterator[Function]:
    """Yield every function and method of a file, inner ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the top-level name of every absolute import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the names that the statements at the top of a file import; names of modules may be among them."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_blocks(function: Function) -> Iterator[list[ast.stmt]]:
    """Yield the runs of import statements that follow each other inside a function."""
    for node in ast.walk(function):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for is_import, block in groupby(body, lambda statement: isinstance(statement, ast.Import | ast.ImportFrom)):
                if is_import:
                    yield list(block)


def num_lines(path: Path) -> int:
    """Return the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_room_has_a_floor() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (floors,) = (contract for contract in contracts if contract["type"] == "layers")
    placed = {room for layer in floors["layers"] for room in re.findall(r"\w+", layer)}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms, f"no rooms under {PACKAGE}"
    assert rooms - placed == set(), "rooms without a floor: add them to the layers contract in pyproject.toml"
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "api.py"}, "modules belong in a room"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Circles of imports at the top; one inside a function is no circle, since it runs later."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {name: set(imported_modules(path)) & modules.keys() for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_imported_package_is_declared() -> None:
    declared = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in PYPROJECT["project"]["dependencies"]}
    ours = {"orchestrator", "jobs", "pydantic_core"}  # the last is pydantic's own other half
    wanted = {name for path in (*FILES, *JOBS) for name in imported_packages(path)}
    homes = packages_distributions()
    undeclared = {
        name
        for name in wanted - sys.stdlib_module_names - ours
        if not declared & {home.lower().replace("_", "-") for home in homes.get(name, [name])}
    }
    assert undeclared == set(), "name their packages in pyproject.toml and docs/dependencies.md"


def test_every_dependency_has_its_reason() -> None:
    project = PYPROJECT["project"]
    declared = {*project["dependencies"], *project["optional-dependencies"]["dev"]}
    document = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    silent = {name for name in (re.split(r"[<>=~!]", line)[0] for line in declared) if f"| {name} |" not in document}
    assert silent == set(), "say in docs/dependencies.md what they are for"


def test_every_folder_of_the_package_is_a_package() -> None:
    bare = {path.parent for path in FILES if not (path.parent / "__init__.py").is_file()}
    assert bare == set()


@each_file
def test_file_is_short(path: Path) -> None:
    assert num_lines(path) <= MAX_FILE_LINES


@each_file
def test_functions_are_short(path: Path) -> None:
    spans = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(path)}
    assert {name: span for name, span in spans.items() if span > MAX_FUNCTION_LINES} == {}


@each_file
def test_an_import_in_a_function_has_its_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    unexplained = {
        f"line {block[0].lineno}, in {function.name}"
        for function in functions(path)
        for block in import_blocks(function)
        if not any("#" in lines[number - 1] for number in range(block[0].lineno - 1, block[-1].lineno + 1))
    }
    assert unexplained == set(), "say in a comment beside the import why it does not stand at the top"


def test_no_base_name_occurs_twice() -> None:
    names = Counter(path.name for path in FILES if path.name not in ("config.py", "__init__.py"))
    assert [name for name, count in names.items() if count > 1] == []


@each_file
def test_name_says_something(path: Path) -> None:
    assert not VAGUE_NAMES & {path.stem, path.parent.name}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE],  # that one is the public API
    ids=lambda path: path.parent.name,
)
def test_init_holds_a_docstring_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "say in a line what the room is for"
    assert len(tree.body) == 1


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_job_is_an_entry_point_and_no_more(path: Path) -> None:
    assert num_lines(path) < MAX_JOB_LINES


def test_the_readme_has_no_placeholder() -> None:
    assert "@@" not in (ROOT / "README.md").read_text()
