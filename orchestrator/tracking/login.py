"""Login for a user's own MLflow server, and the app that requires it.

MLflow's server reads and writes files as the user who started it, wherever an experiment's artifact location points, so
every request needs the login, also on this machine. MLflow's own login (basic-auth) answers some routes without one and
lets its users choose artifact locations.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.config.errors import ConfigError

APP_NAME = "orchestrator"  # of `mlflow server --app-name`, declared in pyproject.toml
USER_NAME = "orchestrator"
_PASSWORD_PATH_VARIABLE = "ORCHESTRATOR_MLFLOW_PASSWORD_PATH"  # noqa: S105


def get_password_path() -> Path:
    """Return the file of the password. Raises ConfigError without a home folder."""
    if path := os.environ.get(_PASSWORD_PATH_VARIABLE):
        return Path(path)
    try:
        return Path.home() / ".orchestrator" / "mlflow_password"
    except RuntimeError:
        raise ConfigError(
            f"HOME must be set, since this user has no home folder; or set {_PASSWORD_PATH_VARIABLE} to "
            "the file for MLflow's password"
        ) from None


def load_password() -> str:
    """Return this user's password, made on first use; no other user can read its file. Raises ConfigError."""
    path = get_password_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            number, temp = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
            with os.fdopen(number, "w") as file:
                file.write(secrets.token_urlsafe(24))
            with suppress(FileExistsError):  # of two first starts one wins, and no reader sees an empty file
                os.link(temp, path)
            os.unlink(temp)
        with path.open(encoding="utf-8") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid == os.geteuid() and stat.S_IMODE(facts.st_mode) & 0o077:
                os.fchmod(file.fileno(), 0o600)
            password = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"MLflow's password cannot be stored in {path}: {error}; set {_PASSWORD_PATH_VARIABLE} to another file"
        ) from None
    if facts.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} must belong to this user, got user {facts.st_uid}; set {_PASSWORD_PATH_VARIABLE} to another file"
        )
    if len(password) < 12:
        raise ConfigError(f"{path} must hold at least 12 characters, got {len(password)}; remove it to have one made")
    return password


class RequireLogin:
    """ASGI middleware that rejects every request without the login: HTTP Basic, or the password as a bearer token."""

    def __init__(self, app: Any, password: str) -> None:
        self._app = app
        basic = base64.b64encode(f"{USER_NAME}:{password}".encode())
        self._accepted = (b"basic " + basic, b"bearer " + password.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on requests with the login, and the start and end of the process."""
        if scope["type"] == "lifespan" or self._has_login(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"www-authenticate", b'Basic realm="MLflow"'), (b"content-type", b"text/plain")]
            text = f"Log in as {USER_NAME}; the password is in a file of the user who started this server.\n"
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})

    def _has_login(self, scope: Any) -> bool:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, word = headers[0].partition(b" ") if len(headers) == 1 else (b"", b"", b"")
        given = scheme.lower() + b" " + word.strip()
        return any([hmac.compare_digest(given, accepted) for accepted in self._accepted])


def create_app() -> Any:
    """Return MLflow's app behind the login; `mlflow server --app-name orchestrator` calls this."""
    try:
        from mlflow.server.fastapi_app import app  # opens the store that the server was started with
    except ImportError as error:  # no documented name of MLflow: a newer one may have moved it
        raise ConfigError(
            f"mlflow {metadata.version('mlflow')} has no server that this login can protect: {error}; install another "
            "version, or run `mlflow server` with a login of its own (--app-name basic-auth)"
        ) from None
    # The middleware that is added last sees a request first.
    app.add_middleware(RequireLogin, password=load_password())
    return app
