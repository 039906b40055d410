#!/usr/bin/env bash
# Makes the secrets that compose.yaml names, once: what is there stays. `secrets.sh [FOLDER]`, ./secrets by default.
set -euo pipefail
umask 077

# The user of the containers. A file of mode 0600 is of use to its owner alone.
readonly owner=1000
folder=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/secrets}

uid=$(id -u)
if [ "$uid" != 0 ] && [ "$uid" != "$owner" ]; then
    echo "secrets.sh: error: the containers run as user $owner and you are $uid: run it with sudo" >&2
    exit 1
fi

mkdir -p "$folder"
chmod 700 "$folder"
made=0

# Takes a secret from standard input, and keeps it unless there is one; nothing is left half written.
keep() {
    local file=$folder/$1
    if [ -s "$file" ]; then
        cat >/dev/null
        return
    fi
    cat >"$file.new"
    mv "$file.new" "$file"
    made=$((made + 1))
}

# 32 random bytes, in hexadecimal: no letter of it means anything to a shell, a URI or an ini file.
random() {
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

for name in admin_password database_password grafana_database_password grafana_password jobs_password \
    postgres_password ray_token session_key; do
    keep "$name" < <(random)
done

# For MLflow's client in jobs; made of jobs_password, so of one piece with it.
keep mlflow_credentials <<END
[mlflow]
mlflow_tracking_username = jobs
mlflow_tracking_password = $(<"$folder/jobs_password")
END

# Both sides of the object store's key.
if [ ! -s "$folder/s3_credentials" ] || [ ! -s "$folder/s3_identities" ]; then
    rm -f "$folder/s3_credentials" "$folder/s3_identities"
    id=$(random | head -c 20)
    key=$(random)
    keep s3_credentials <<END
[default]
aws_access_key_id = $id
aws_secret_access_key = $key
END
    keep s3_identities <<END
{
  "identities": [
    {
      "name": "orchestrator",
      "credentials": [{"accessKey": "$id", "secretKey": "$key"}],
      "actions": ["Admin", "Read", "List", "Tagging", "Write"]
    }
  ]
}
END
fi

if [ "$uid" = 0 ]; then
    chown -R "$owner:$owner" "$folder"
fi
echo "$folder: $made made, $(find "$folder" -type f | wc -l) there"
