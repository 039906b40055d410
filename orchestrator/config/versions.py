"""Check of the installed versions of Ray, torch and MLflow, before anything imports them."""

import re
from importlib import metadata

from orchestrator.config.errors import ConfigError

# The oldest tested version, and the first one whose interfaces may differ: `make newest` tests between.
SUPPORTED_VERSIONS = {"ray": ("2.60", "3"), "torch": ("2.10", "3"), "mlflow": ("3.11", "4")}


def check_versions() -> None:
    """Raise ConfigError, one line, when a package is missing, too old, or of a major version that is not supported."""
    for package, (oldest, excluded) in SUPPORTED_VERSIONS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = ""
        if not _parse_version(oldest) <= _parse_version(version) < _parse_version(excluded):
            raise ConfigError(
                f"{package} must be of version {oldest} or newer and below {excluded}, got {version or 'none'}; run: "
                f"pip install '{package}>={oldest},<{excluded}'"
            )


def _parse_version(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version: (2, 13, 0) for 2.13.0+cu128 and (3, 0, 0) for 3.0.0rc1."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
