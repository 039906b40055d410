"""The folder of Ray's files on this machine, closed to all other users.

Ray gives its temp and session folders mode 0777 whatever the umask is, and a user who can write there can replace the
code of the next job, so they lie below a parent of mode 0700. `python -m orchestrator.ray_backend.temp_dir` prints the
path.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from orchestrator.config.errors import ConfigError

# What Ray appends to its temp dir for the longest socket, in front of the kernel's limit (sun_path).
_LONGEST_SOCKET_SUFFIX = "/session_2026-11-29_06-38-34_700863_4194304/sockets/plasma_store"
_MAX_SOCKET_PATH_BYTES = 107


def make_temp_dir() -> str:
    """Return the path for Ray's --temp-dir, below a folder that this user alone can enter; make that folder.

    It lies below RAY_TMPDIR, else TMPDIR, else /tmp: in that folder itself when it is closed to others, else in a
    folder of this user's there. Raises ConfigError for a folder that others control, and for a path that is too long.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    base = Path(os.environ[name] if name else "/tmp").absolute()  # noqa: S108  a folder of mode 0700 is made in it
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = base if _is_private(base.stat()) else _make_private_folder(base / f"orchestrator-{os.geteuid()}")
    except OSError as error:
        raise ConfigError(
            f"{name or 'temp dir'}: {base} must be a folder in which this user can make another, got "
            f"{error.strerror}; set RAY_TMPDIR to one"
        ) from None
    temp_dir = str(parent / "ray")
    longest = _MAX_SOCKET_PATH_BYTES - len(_LONGEST_SOCKET_SUFFIX)
    if len(os.fsencode(temp_dir)) > longest:
        raise ConfigError(
            f"{name}: the path of Ray's files must have at most {longest} bytes, since sockets lie below it, got "
            f"{len(os.fsencode(temp_dir))} ({temp_dir}); set RAY_TMPDIR to a shorter folder, such as /tmp"
        )
    return temp_dir


def _make_private_folder(folder: Path) -> Path:
    above = folder.parent.stat()
    if above.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not above.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"{folder.parent} must be closed to others or have the sticky bit, got mode "
            f"{stat.S_IMODE(above.st_mode):o}: others could replace Ray's files there; set RAY_TMPDIR to another folder"
        )
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        # Another user may have made it first, or a link to elsewhere.
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(
                f"{folder} must be a folder that belongs to user {os.geteuid()}, got one that user {status.st_uid} "
                "made; have it removed, or set RAY_TMPDIR to another folder"
            ) from None
        folder.chmod(0o700)
    return folder


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


if __name__ == "__main__":
    try:
        print(make_temp_dir())  # noqa: T201  for scripts
    except ConfigError as error:
        sys.exit(str(error))
