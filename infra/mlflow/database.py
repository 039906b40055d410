"""Waits until the databases of an MLflow server answer, or says in a line why they do not.

    database.py URI [basic_auth.ini]

The exit status is 0 when all answer; 1 when one does not in DATABASE_WAIT_SECONDS, or will not however long one waits.
"""

import configparser
import os
import sys
import time

import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

WAIT_SECONDS = float(os.environ.get("DATABASE_WAIT_SECONDS", "60"))
PAUSE_SECONDS = 1.0
# What PostgreSQL says of mistakes that time does not mend.
FINAL = ("authentication failed", "no password supplied", "does not exist", "no pg_hba.conf entry", "permission denied")


def main(uris: list[str]) -> int:
    """The exit status."""
    deadline = time.monotonic() + WAIT_SECONDS
    for uri in uris:
        if (problem := unanswered(uri, deadline)) is not None:
            print(f"database.py: error: {problem}", file=sys.stderr, flush=True)
            return 1
    return 0


def databases(arguments: list[str]) -> list[str]:
    """The URIs of a command line: of the runs, and of the users where there is a login."""
    uris = arguments[:1]
    for path in arguments[1:]:
        config = configparser.ConfigParser()
        with open(path, encoding="utf-8") as file:
            config.read_file(file)
        uris.append(config["mlflow"]["database_uri"])
    return uris


def unanswered(uri: str, deadline: float) -> str | None:
    """Why a database does not answer; None once it does."""
    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 5} if uri.startswith("postgresql") else {})
    # A URI may hold a password; what is shown of it does not.
    shown = engine.url.render_as_string(hide_password=True)
    said = None
    while True:
        try:
            with engine.connect():
                return None
        except SQLAlchemyError as error:
            # The driver's own words, without the link to SQLAlchemy's manual.
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
        if any(sign in reason for sign in FINAL):
            return f"{shown}: {reason}"
        if time.monotonic() >= deadline:
            return f"{shown}: no answer in {WAIT_SECONDS:g} s: {reason}"
        if reason != said:
            print(f"database.py: waiting for {shown}: {reason}", file=sys.stderr, flush=True)
            said = reason
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main(databases(sys.argv[1:])))
