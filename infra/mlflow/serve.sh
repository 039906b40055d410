#!/usr/bin/env bash
# Runs the MLflow server, under systemd, in a container or by hand. Settings come from the environment; secrets come from
# files and go to MLflow by its environment, since a command line is seen by every user of a machine.
#
#   SECRETS_DIRECTORY             folder of the files below; by default systemd's credentials, else /run/secrets
#     database_password           of PGUSER; not needed for a database that asks for none
#     admin_password              of the user `admin`, at least 12 letters; used when there is no such user yet
#     session_key                 any long random text: signs the sessions of the page
#     s3_credentials              an AWS credentials file; not needed where the machine has a role
#   PGHOST, PGPORT, PGUSER        where PostgreSQL is, as its own clients read them
#   MLFLOW_BACKEND_STORE_URI      postgresql+psycopg2:///mlflow
#   MLFLOW_ARTIFACTS_DESTINATION  s3://BUCKET/FOLDER: needed
#   MLFLOW_SERVER_ALLOWED_HOSTS   what may stand in a request's Host header, ports too: needed
#   MLFLOW_HOST, MLFLOW_PORT      127.0.0.1, 5000
#   MLFLOW_WORKERS                processes; 2
#   MLFLOW_LOGIN                  basic-auth, or none: only where something before the server asks for a login
#   MLFLOW_AUTH_CONFIG_PATH       basic_auth.ini beside this file
#   DATABASE_WAIT_SECONDS         how long to wait for PostgreSQL; 60
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
secrets=${SECRETS_DIRECTORY:-${CREDENTIALS_DIRECTORY:-/run/secrets}}
login=${MLFLOW_LOGIN:-basic-auth}

refuse() {
    echo "serve.sh: error: $1" >&2
    exit 2
}

# What a file of secrets says, without the line end.
secret() {
    [ -r "$secrets/$1" ] || refuse "$secrets/$1 is missing or not readable by $(id -un 2>/dev/null || id -u)"
    printf '%s' "$(<"$secrets/$1")"
}

[ -n "${MLFLOW_ARTIFACTS_DESTINATION:-}" ] || refuse "set MLFLOW_ARTIFACTS_DESTINATION, such as s3://BUCKET/FOLDER"
[ -n "${MLFLOW_SERVER_ALLOWED_HOSTS:-}" ] ||
    refuse "set MLFLOW_SERVER_ALLOWED_HOSTS to the names that clients use, such as mlflow:5000,localhost:5000"

export MLFLOW_BACKEND_STORE_URI=${MLFLOW_BACKEND_STORE_URI:-postgresql+psycopg2:///mlflow}
export MLFLOW_WORKERS=${MLFLOW_WORKERS:-2}
export MLFLOW_SERVE_ARTIFACTS=true
# MLflow's job runners are eight processes that nothing here uses.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}

if [ -e "$secrets/database_password" ]; then
    PGPASSWORD=$(secret database_password)
    export PGPASSWORD
fi
if [ -e "$secrets/s3_credentials" ]; then
    export AWS_SHARED_CREDENTIALS_FILE=$secrets/s3_credentials
fi

case $login in
    basic-auth)
        export MLFLOW_AUTH_CONFIG_PATH=${MLFLOW_AUTH_CONFIG_PATH:-$here/basic_auth.ini}
        MLFLOW_AUTH_ADMIN_PASSWORD=$(secret admin_password)
        MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret session_key)
        export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
        app=(--app-name basic-auth)
        ;;
    none)
        unset MLFLOW_AUTH_CONFIG_PATH
        app=()
        ;;
    *) refuse "MLFLOW_LOGIN=$login: must be basic-auth or none" ;;
esac

# MLflow itself would retry for a minute and a half before it says what is wrong.
python "$here/database.py" "$MLFLOW_BACKEND_STORE_URI" ${MLFLOW_AUTH_CONFIG_PATH:+"$MLFLOW_AUTH_CONFIG_PATH"}

exec mlflow server "${app[@]}"
