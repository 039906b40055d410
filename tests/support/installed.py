"""A virtual environment in which the package is installed, for tests that use it as a stranger does."""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.launched import ROOT


def make_environment(folder: Path) -> Path:
    """Make a fresh virtual environment with the package and the command; return its folder of programs.

    Its packages are those of this process: nothing is downloaded.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "installed.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    programs = folder / "bin"
    command = programs / "orchestrator"
    command.write_text(f"#!{programs / 'python'}\nfrom orchestrator.cli.main import main\n\nraise SystemExit(main())\n")
    command.chmod(0o755)
    return programs


def run_in(
    programs: Path, words: Sequence[str], folder: Path, seconds: float, variables: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a program of the environment in a folder, with runs and home below it."""
    return subprocess.run(
        words,
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            **(variables or {}),
        },
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
