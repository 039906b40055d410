"""The files of the repository. Every check finds its own among them, so none can be forgotten in a list."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

# Of a folder that is no clone, such as a test's.
NOT_OURS = {".git", ".venv", "runs", "mlruns", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
SHELLS = re.compile(r"#!.*\b(ba|da|k)?sh\b")
SHELL_NAMES = (".sh", ".bash", ".sbatch", ".slurm")
MOST_BYTES = 2_000_000


class Tree:
    """A folder's files, by their path in it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._texts: dict[str, str | None] = {}

    @cached_property
    def files(self) -> list[str]:
        """All files that are committed, or would be: what git ignores is left out."""
        if (self.root / ".git").exists():
            done = subprocess.run(
                ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                cwd=self.root,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise ValueError(f"git ls-files in {self.root}: {done.stderr.strip()}")
            return sorted(name for name in set(done.stdout.split("\0")) if name and (self.root / name).is_file())
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.is_file() and not NOT_OURS & set(path.relative_to(self.root).parts)
        )

    def text(self, name: str) -> str | None:
        """A file's text; None when it is none, or too long to be somebody's work."""
        if name not in self._texts:
            path = self.root / name
            try:
                self._texts[name] = path.read_text(encoding="utf-8") if path.stat().st_size < MOST_BYTES else None
            except UnicodeDecodeError:
                self._texts[name] = None
        return self._texts[name]

    def named(self, *patterns: str) -> list[str]:
        """Files whose last name is like one of the patterns."""
        return [name for name in self.files if any(Path(name).match(pattern) for pattern in patterns)]

    @property
    def yaml(self) -> list[str]:
        """YAML files."""
        return self.named("*.yaml", "*.yml")

    @property
    def scripts(self) -> Iterator[str]:
        """Shell scripts, those of Slurm too, by name or first line."""
        for name in self.files:
            if name.endswith(SHELL_NAMES) or ("." not in Path(name).name and self._is_script(name)):
                yield name

    def _is_script(self, name: str) -> bool:
        return SHELLS.match(self.text(name) or "") is not None
