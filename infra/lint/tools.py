"""Programs that check a kind of file each, and how their answers become problems."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from infra.lint import documents
from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

BIN = Path(sys.executable).parent
EXTRA = "install the extra: pip install -c constraints.txt -e '.[lint]'"
PATIENCE_SECONDS = 120
LINE = re.compile(r"^(?P<path>.+?):(?P<line>\d+):(?:\d+:)? *(?P<what>.+)$")


def find(name: str) -> str | None:
    """Return the path of a program, that of the running environment first."""
    return shutil.which(name, path=os.pathsep.join([str(BIN), os.environ.get("PATH", "")]))


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    """A finished program."""
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


def lined(text: str, root: Path) -> Iterator[Problem]:
    """Problems out of lines of the form path:line:column: what."""
    for match in filter(None, map(LINE.match, text.splitlines())):
        path = Path(match["path"])
        name = path.relative_to(root).as_posix() if path.is_absolute() and path.is_relative_to(root) else str(path)
        yield Problem(name, int(match["line"]), match["what"])


def failed(kind: str, name: str, done: subprocess.CompletedProcess[str], found: list[Problem]) -> list[Problem]:
    """The problems, or that the program itself failed, which must never look like none."""
    if done.returncode and not found:
        return [
            Problem(
                name, 1, f"{kind} failed with status {done.returncode}: {(done.stderr or done.stdout).strip()[-400:]}"
            )
        ]
    return found


def shell(tree: Tree) -> Report:
    """Shell scripts, by shellcheck."""
    files = list(tree.scripts)
    return _by_lines("shellcheck", "shellcheck", ["--format=gcc", "--external-sources"], files, tree)


def yaml(tree: Tree) -> Report:
    """Every YAML file, by yamllint."""
    config = str(Path(__file__).resolve().parent.parent.parent / ".yamllint.yaml")
    report = _by_lines("yamllint", "yamllint", ["--format=parsable", f"--config-file={config}"], tree.yaml, tree)
    return replace(report, problems=(*report.problems, *documents.unreadable(tree)))


def _by_lines(kind: str, program: str, flags: list[str], files: list[str], tree: Tree) -> Report:
    if not files:
        return Report(kind, 0)
    found = find(program)
    if found is None:
        return Report(kind, len(files), skipped=f"{program} is not there: {EXTRA}")
    done = run([found, *flags, *files], tree.root)
    return Report(kind, len(files), tuple(failed(kind, files[0], done, list(lined(done.stdout, tree.root)))))


def images(tree: Tree) -> Report:
    """Dockerfiles, by hadolint."""
    files = tree.named("Dockerfile", "Dockerfile.*", "*.Dockerfile", "Containerfile")
    hadolint = find("hadolint")
    if not files or hadolint is None:
        return Report("hadolint", len(files), skipped="" if not files else f"hadolint is not there: {EXTRA}")
    done = run([hadolint, "--format=json", *files], tree.root)
    try:
        answers = json.loads(done.stdout or "[]")
    except ValueError:
        answers = []
    found = [
        Problem(answer["file"], int(answer["line"]), f"{answer['level']}: {answer['message']} [{answer['code']}]")
        for answer in answers
    ]
    return Report("hadolint", len(files), tuple(failed("hadolint", files[0], done, found)))


def compose(tree: Tree) -> Report:
    """Compose files, by docker-compose: each base file alone, and with each file that adds to it."""
    files = tree.named("compose.yaml", "compose.yml", "compose.*.yaml", "compose.*.yml", "docker-compose*.y*ml")
    program = find("docker-compose")
    if not files or program is None:
        return Report("compose", len(files), skipped="" if not files else f"docker-compose is not there: {EXTRA}")
    problems: list[Problem] = []
    for name in files:
        chain = [name]
        base = next(
            (
                other
                for other in files
                if PurePosixPath(other).parent == PurePosixPath(name).parent
                and PurePosixPath(other).name
                in ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
            ),
            name,
        )
        if base != name:
            chain = [base, name]
        flags = [word for file in chain for word in ("--file", file)]
        # Interpolated, a file would need the secrets of the user who runs it.
        done = run([program, *flags, "config", "--quiet", "--no-interpolate"], tree.root)
        if done.returncode:
            problems.append(Problem(name, 1, done.stderr.strip()[-600:]))
    return Report("compose", len(files), tuple(problems))


def terraform(tree: Tree) -> Report:
    """Terraform's files: that they parse, and have its format."""
    files = tree.named("*.tf", "*.tfvars")
    if not files:
        return Report("terraform", 0)
    program = find("terraform")
    if program is None:
        return Report("terraform", len(files), skipped="terraform is not on PATH")
    done = run([program, "fmt", "-check", "-write=false", "-list=true", "-no-color", *files], tree.root)
    found = [
        Problem(line, 1, "is not in terraform's format: run `terraform fmt` on it")
        for line in done.stdout.splitlines()
        if line in files
    ]
    for what, name, line in re.findall(r"Error: (.+)\n(?:.*\n)*?.*on (\S+) line (\d+)", done.stderr):
        found.append(Problem(name, int(line), what))
    return Report("terraform", len(files), tuple(failed("terraform", files[0], done, found)))
