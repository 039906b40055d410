#!/usr/bin/env bash
# An authority and one certificate for all nodes of a cluster, for Ray's gRPC (see README.md in this folder).
#
#   certificates.sh FOLDER NAME-OR-ADDRESS...
#
# Writes ca.crt, node.crt and node.key; the authority's own key is gone afterwards, so no one can add a node to it.
set -euo pipefail

days=${ORCHESTRATOR_TLS_DAYS:-365}

fail() {
    printf 'certificates.sh: error: %s\n' "$1" >&2
    exit 1
}

[ $# -ge 2 ] || fail "usage: certificates.sh FOLDER NAME-OR-ADDRESS..., all the names and addresses that nodes go by"
command -v openssl >/dev/null || fail "openssl is not installed (package openssl)"
folder=$1
shift
[ ! -e "$folder/node.key" ] || fail "$folder/node.key is there already: remove it to make new certificates"

# Loopback is what a head's own processes use.
names="IP:127.0.0.1,DNS:localhost"
for name in "$@"; do
    if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then
        names+=",IP:$name"
    else
        names+=",DNS:$name"
    fi
done

umask 077
mkdir -p "$folder"
scratch=$(mktemp -d "$folder/.making.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$days" -subj "/CN=orchestrator ray" \
    -keyout "$scratch/ca.key" -out "$scratch/ca.crt" 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=orchestrator ray node" \
    -keyout "$scratch/node.key" -out "$scratch/node.csr" 2>/dev/null
# Each node is a server to the others and a client of them.
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n' "$names" >"$scratch/extensions"
openssl x509 -req -in "$scratch/node.csr" -CA "$scratch/ca.crt" -CAkey "$scratch/ca.key" -CAcreateserial \
    -days "$days" -extfile "$scratch/extensions" -out "$scratch/node.crt" 2>/dev/null
mv "$scratch/ca.crt" "$scratch/node.crt" "$scratch/node.key" "$folder/"
printf 'wrote %s/ca.crt, node.crt, node.key, valid for %s days and for %s\n' "$folder" "$days" "$names"
