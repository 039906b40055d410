"""The spelling of commands: as `orchestrator train`, or as `python jobs/train.py` in a process started that way."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

PROGRAM = "orchestrator"
JOBS_FOLDER = "jobs"


def format_command(command: str, arguments: Sequence[str] = ()) -> str:
    """Return the shell line that runs a command such as "train-ensemble", with every argument quoted where needed.

    It is spelled as this process was started, so that it runs as printed in the same place.
    """
    folder, script = os.path.split(sys.argv[0]) if sys.argv else ("", "")
    if script.endswith(".py") and os.path.basename(os.path.abspath(folder)) == JOBS_FOLDER:
        name, _, subcommand = command.partition(" ")
        path = os.path.join(folder, f"{name.replace('-', '_')}.py")
        words = ["python", shlex.quote(path), subcommand]
    else:
        words = [PROGRAM, command]
    return " ".join(filter(None, (*words, shlex.join(arguments))))
