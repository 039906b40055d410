"""Create what a new MLflow server lacks: buckets, a user for the jobs, a reader for dashboards.

    prepare.py --buckets runs mlflow --user jobs --reader grafana

Each is made if it is not there, so it may run at every start. MLFLOW_TRACKING_URI says where the server is, the usual
AWS_* and PG* variables where storage and database are; SECRETS_DIRECTORY has admin_password, database_password,
s3_credentials, and the new user's password as USER_password.
"""

import argparse
import base64
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SECRETS = Path(os.environ.get("SECRETS_DIRECTORY") or os.environ.get("CREDENTIALS_DIRECTORY") or "/run/secrets")
# What curves are made of. Not the tables beside them, some of which hold credentials of gateways.
READABLE = ("experiments", "runs", "metrics", "latest_metrics", "params", "tags")


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--user", metavar="NAME", help="who may record runs, without being an administrator")
    parser.add_argument("--reader", metavar="ROLE", help="role of PostgreSQL that may read runs and curves")
    asked = parser.parse_args()
    for name in asked.buckets:
        print(f"bucket {name}: {bucket(name)}", flush=True)
    if asked.user:
        print(f"user {asked.user}: {user(asked.user)}", flush=True)
    if asked.reader:
        print(f"reader {asked.reader}: {reader(asked.reader)}", flush=True)
    return 0


def bucket(name: str) -> str:
    """Make a bucket; what was done."""
    # A second, which the other parts need not wait for.
    import boto3  # type: ignore[import-untyped]
    from botocore.exceptions import ClientError  # type: ignore[import-untyped]

    if (SECRETS / "s3_credentials").exists():
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(SECRETS / "s3_credentials")
    client = boto3.client("s3")
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise SystemExit(f"prepare.py: error: bucket {name}: {error}") from None
        client.create_bucket(Bucket=name)
        return "made"
    return "there already"


def user(name: str) -> str:
    """Make a user of MLflow; what was done."""
    try:
        ask("users/create", {"username": name, "password": secret(f"{name}_password")})
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        if "RESOURCE_ALREADY_EXISTS" not in answer:
            raise SystemExit(f"prepare.py: error: user {name}: {error.code}: {answer[:300]}") from None
        return "there already"
    return "made"


def reader(role: str) -> str:
    """Let a role read what the curves are made of; what was done."""
    # Not where only buckets are asked for.
    import psycopg2  # type: ignore[import-untyped]
    from psycopg2 import sql

    password = secret("database_password") if (SECRETS / "database_password").exists() else None
    connection = psycopg2.connect(dbname="mlflow", password=password)
    try:
        with connection, connection.cursor() as cursor:
            tables = sql.SQL(", ").join(map(sql.Identifier, READABLE))
            cursor.execute(sql.SQL("GRANT SELECT ON {} TO {}").format(tables, sql.Identifier(role)))
    finally:
        connection.close()
    return f"may read {', '.join(READABLE)}"


def ask(path: str, body: dict[str, str]) -> None:
    """A request of the administrator's."""
    login = base64.b64encode(f"admin:{secret('admin_password')}".encode()).decode()
    uri = os.environ["MLFLOW_TRACKING_URI"].rstrip("/")
    if not uri.startswith(("http://", "https://")):
        raise SystemExit("prepare.py: error: MLFLOW_TRACKING_URI: give the http(s) address of the server")
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Basic {login}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


def secret(name: str) -> str:
    """Return the contents of a file of secrets."""
    try:
        return (SECRETS / name).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SystemExit(f"prepare.py: error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
