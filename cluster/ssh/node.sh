#!/usr/bin/env bash
# Ray on this machine, in a session of its own that can be stopped without touching anybody else's processes.
#
#   node.sh start COMMAND...    start it behind the token, in place of what this script started before
#   node.sh stop                stop what this script started, and nothing else
#   node.sh status              say whether it runs; exit status 0 when it does
#
# The launcher's own `ray stop` ends every Ray process of a machine, those of other users and clusters too.
#
#   ORCHESTRATOR_NODE       folder for pid and log; ~/.orchestrator-node
#   ORCHESTRATOR_SERVICE    name of what is started, one session each; ray
#   ORCHESTRATOR_VENV       virtual environment that goes first on PATH; .venv of the folder that has cluster/
#   RAY_AUTH_TOKEN_PATH     the token; ~/.ray/auth_token
#   RAY_TMPDIR              folder for Ray's files; TMPDIR, else /tmp. They lie in a folder of mode 0700 in it
set -euo pipefail
umask 077

drain=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-30}
START_SECONDS=120
# Ray's drain of the node, then the end of its processes: the GCS takes 16 s.
STOP_SECONDS=$((${drain%.*} + 30))

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${ORCHESTRATOR_VENV:-$root/.venv}
service=${ORCHESTRATOR_SERVICE:-ray}
state=${ORCHESTRATOR_NODE:-$HOME/.orchestrator-node}
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
pid_file=$state/$service.pid
log=$state/$service.log

fail() {
    printf 'node.sh: error: %s\n' "$1" >&2
    exit 1
}

# The fields of /proc/PID/stat after the name, which may hold spaces: 0 state, 3 session, 19 start time.
read_stat() {
    local line
    { read -r line <"/proc/$1/stat"; } 2>/dev/null || return 1
    read -ra fields <<<"${line##*) }"
    [ "${#fields[@]}" -gt 19 ]
}

# Live processes of a session, one a line.
members() {
    local entry fields
    for entry in /proc/[0-9]*; do
        if read_stat "${entry#/proc/}" && [ "${fields[3]}" = "$1" ] && [ "${fields[0]}" != Z ]; then
            printf '%s\n' "${entry#/proc/}"
        fi
    done
}

# The session that was started, if any of it lives; a pid that another process has by now does not count.
session() {
    local kept="" began="" fields
    if [ -r "$pid_file" ]; then
        read -r kept began <"$pid_file"
    fi
    [ -n "$kept" ] && [ -n "$began" ] || return 1
    # A number that is some session's is not given to a new process: without its leader, the session is still ours.
    if read_stat "$kept" && [ "${fields[19]}" != "$began" ]; then
        return 1
    fi
    [ -n "$(members "$kept")" ] || return 1
    printf '%s\n' "$kept"
}

require_token() {
    if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
        return
    fi
    [ -s "$token" ] || fail "$token is missing or empty: Ray would be open to everybody; make one with \`umask 077; ray get-auth-token --generate\` and ship it to every node"
    chmod 600 "$token" || fail "$token: its mode cannot be set to 600"
}

# A temp dir that is closed to other users: Ray itself makes one that they can write to. Each node's own: a worker that
# is given none takes the head's path, where nothing may close it.
temp_dir() {
    local python=$venv/bin/python
    [ -x "$python" ] || python=python3
    PYTHONPATH=$root "$python" -m orchestrator.ray_backend.ray_env || fail "Ray has no temp dir"
}

# Wait until a session has ended; whether it has.
ended() {
    local deadline=$((SECONDS + $2))
    while [ -n "$(members "$1")" ]; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.5
    done
}

stop() {
    local id
    id=$(session) || { rm -f "$pid_file"; return 0; }
    # To `ray start` alone, which drains its node, so that what trains here is saved, and then ends the others.
    # shellcheck disable=SC2046 # one word for each pid
    kill -TERM "$id" 2>/dev/null || kill -TERM $(members "$id") 2>/dev/null || true
    if ! ended "$id" "$STOP_SECONDS"; then
        # shellcheck disable=SC2046
        kill -KILL $(members "$id") 2>/dev/null || true
        ended "$id" 10 || fail "processes $(members "$id" | tr '\n' ' ')of session $id do not end"
    fi
    rm -f "$pid_file"
    echo "$service stopped"
}

start() {
    [ $# -gt 0 ] || fail "start: give the command, such as: node.sh start ray start --head --block"
    require_token
    if [ "${1##*/} ${2:-}" = "ray start" ]; then
        case " $*" in *" --temp-dir"*) fail "--temp-dir is chosen here: set RAY_TMPDIR to the folder for Ray's files" ;; esac
        local ray=$1 place
        place=$(temp_dir) || exit 1
        shift 2
        set -- "$ray" start --temp-dir="$place" "$@"
    fi
    stop
    mkdir -p "$state"
    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
    unset RAY_ADDRESS
    if [ -d "$venv/bin" ]; then
        # Submitted jobs inherit this: their `python` is the project's.
        export PATH="$venv/bin:$PATH"
    fi
    # Each worker process holds many sockets; where the limit cannot be raised, small clusters run all the same.
    ulimit -n 65536 2>/dev/null || true
    # The session writes down its own pid: what setsid's is depends on who called.
    # shellcheck disable=SC2016 # expands in the session
    setsid bash -c '
        line=$(cat "/proc/$$/stat")
        read -ra fields <<<"${line##*) }"
        printf "%s %s\n" "$$" "${fields[19]}" >"$0.new" && mv "$0.new" "$0"
        exec "$@"
    ' "$pid_file" "$@" >"$log" 2>&1 </dev/null &
    wait_until_up "$@"
}

wait_until_up() {
    local deadline=$((SECONDS + START_SECONDS))
    while [ ! -e "$pid_file" ] && [ "$SECONDS" -lt "$deadline" ]; do
        sleep 0.1
    done
    while session >/dev/null && [ "$SECONDS" -lt "$deadline" ]; do
        # Only `ray start` says when it is up.
        if [ "$service" != ray ] || grep -q "Ray runtime started" "$log"; then
            echo "$service started, log $log"
            return
        fi
        sleep 0.5
    done
    tail -n 5 "$log" >&2
    stop
    fail "\`$*\` did not start within $START_SECONDS s, or ended; its log is $log"
}

case ${1:-} in
    start)
        shift
        start "$@"
        ;;
    stop) stop ;;
    status)
        id=$(session) || { echo "$service does not run"; exit 1; }
        echo "$service runs in session $id, log $log"
        ;;
    *) fail "usage: node.sh start COMMAND... | stop | status" ;;
esac
