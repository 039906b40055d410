#!/usr/bin/env bash
# Dumps the databases of the MLflow server and removes the oldest dumps.
#
#   BACKUPS               folder of the dumps; systemd's state folder by default
#   BACKUPS_KEPT          of each database; 14
#   BACKUP_DATABASES      mlflow mlflow_auth
#   SECRETS_DIRECTORY     folder with database_password, as for serve.sh
#   PGHOST, PGPORT, PGUSER  where PostgreSQL is
#
# Restore: pg_restore --clean --if-exists --no-owner --dbname mlflow mlflow-TIME.dump, with the server stopped.
set -euo pipefail
umask 077

secrets=${SECRETS_DIRECTORY:-${CREDENTIALS_DIRECTORY:-/run/secrets}}
folder=${BACKUPS:-${STATE_DIRECTORY:?set BACKUPS to the folder of the dumps}}
kept=${BACKUPS_KEPT:-14}
read -ra databases <<<"${BACKUP_DATABASES:-mlflow mlflow_auth}"

if ! [[ $kept =~ ^[1-9][0-9]*$ ]]; then
    echo "backup.sh: error: BACKUPS_KEPT=$kept: must be a number of at least 1" >&2
    exit 2
fi
if [ -e "$secrets/database_password" ]; then
    PGPASSWORD=$(<"$secrets/database_password")
    export PGPASSWORD
fi

now=$(date --utc +%Y%m%dT%H%M%SZ)
for database in "${databases[@]}"; do
    # The final name stands for a whole dump: one that broke off keeps the other.
    unfinished=$folder/.$database-$now.part
    trap 'rm -f "$unfinished"' EXIT
    pg_dump --format=custom --no-owner --file="$unfinished" "$database"
    mv "$unfinished" "$folder/$database-$now.dump"
    echo "wrote $folder/$database-$now.dump ($(stat --format=%s "$folder/$database-$now.dump") bytes)"
    # Times in names sort as text. Only after a new dump is there, an old one goes.
    mapfile -t dumps < <(printf '%s\n' "$folder/$database"-[0-9]*T[0-9]*Z.dump | LC_ALL=C sort --reverse)
    for old in "${dumps[@]:kept}"; do
        rm -- "$old"
        echo "removed $old"
    done
done
