"""Another user of this machine, who tries actions that must be denied."""

import os
import subprocess
import sys

import pytest

NOBODY_ID = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
# Imports come first: the other user may not be able to read this interpreter's library.
_BECOME = f"""
import base64, encodings.idna, http.client, json, os, pathlib, socket, sys, urllib.error, urllib.request
os.setgroups([]); os.setresgid(*[{NOBODY_ID}] * 3); os.setresuid(*[{NOBODY_ID}] * 3)
"""


def run_as_nobody(code: str, *arguments: str, seconds: float = 60) -> str:
    """Run Python code as a user without any rights; return its output."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _BECOME + code, *arguments],
        cwd="/", env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
