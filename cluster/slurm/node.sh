#!/usr/bin/env bash
# One life of Ray on one node of a Slurm job: train.sbatch has `srun` start this on each node, and ends it by USR2.
# Neither processes nor files of it stay on the node.
#
#   node.sh head|worker HEAD_ADDRESS FIRST_PORT RAY_DISTRIBUTION
#
# Exit status: 0 ended on request, 2 this node cannot take part, 1 Ray has ended or did not start.
set -uo pipefail

role=$1 address=$2 port=$3 distribution=$4
here=${SLURMD_NODENAME:-$(hostname)}
scratch=$TRAIN_SCRATCH/ray-$UID-$SLURM_JOB_ID
agent_port=$((port + 3))
ORPHAN_SECONDS=900 # more than Slurm needs to find the first node down (SlurmdTimeout)

say() { printf '%(%T)T %s: %s\n' -1 "$here" "$*"; }

fail() {
    say "error: ${*:2}" >&2
    exit "$1"
}

# Everything below a process, and itself.
tree() {
    local child
    for child in $(pgrep -P "$1"); do tree "$child"; done
    echo "$1"
}

# What cannot be on this node; a port in use is no reason to exclude the node permanently.
check() {
    local found=("$TRAIN_VENV"/lib/python3*/site-packages/ray-*.dist-info) ports=("$agent_port") taken
    [[ -x $TRAIN_VENV/bin/ray ]] \
        || fail 2 "$TRAIN_VENV/bin/ray is not here: the clone must lie where all nodes see it, or TRAIN_VENV on each"
    [[ ${found[0]##*/} == "$distribution" ]] \
        || fail 2 "Ray is ${found[0]##*/} here and $distribution on the first node: install the same everywhere"
    # A shared file system may show a new file late.
    for _ in {1..30}; do
        [[ ! -r $RAY_AUTH_TOKEN_PATH ]] || break
        sleep 1
    done
    [[ -r $RAY_AUTH_TOKEN_PATH ]] \
        || fail 2 "${RAY_AUTH_TOKEN_PATH%/.slurm/*} is not the first node's: ORCHESTRATOR_RUNS must be on a shared file system"
    [[ $role == worker ]] || ports+=("$port" $((port + 1)) $((port + 2)))
    for taken in "${ports[@]}"; do
        if answers 127.0.0.1 "$taken"; then
            fail 1 "port $taken is in use, by another job or user: choose others with TRAIN_PORT"
        fi
    done
    if [[ -z ${SLURM_GPUS_ON_NODE:-} && -e /dev/nvidiactl ]]; then
        say "this node has GPUs, and the job asked for none: sbatch --gpus-per-node=..."
    fi
}

start_ray() {
    # Without an interface Ray takes the address from which the head is reached.
    local own=${TRAIN_INTERFACE:+$(ip -4 -o addr show dev "$TRAIN_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}')}
    local options=(
        # Ray opens its temp dir to all users; $scratch above it stays closed.
        --block --disable-usage-stats --temp-dir="$scratch/ray" --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}"
        --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --object-store-memory=$((TRAIN_STORE_MB * 1000000))
        # Random ones: two jobs of a node would both take Ray's 10002 and those after it.
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port="$agent_port"
    )
    if [[ $role == head ]]; then
        options+=(
            --head --node-ip-address="$address" --port="$port" --ray-client-server-port=$((port + 2))
            --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1))
        )
    else
        options+=(--address="$address:$port")
        [[ -z $own ]] || options+=(--node-ip-address="$own")
    fi
    # A session of its own, so that no signal to this script's group is one to Ray.
    setsid "$TRAIN_VENV/bin/ray" start "${options[@]}" >"$scratch/start.log" 2>&1 &
    ray=$!
}

# Immediately: what Ray holds is needed no more, and its own way waits for its parts one after the other.
end_ray() {
    local all
    if kill -0 "$ray" 2>/dev/null; then
        mapfile -t all < <(tree "$ray")
        kill -KILL "${all[@]}" 2>/dev/null
        wait "$ray" 2>/dev/null
    fi
    if [[ -n $TRAIN_KEEP ]]; then
        say "Ray's logs are kept: $scratch"
        return
    fi
    # What died last may still have written.
    for _ in 1 2 3 4 5; do
        rm -rf -- "$scratch" 2>/dev/null && break
        sleep 0.5
    done
}

# Whether somebody listens at HOST PORT.
answers() { timeout 5 bash -c "exec 3<>/dev/tcp/$1/$2" 2>/dev/null; }

# --no-kill lets a job outlive its first node, and with it all that manages it: the remaining nodes have it requeued.
requeue_orphan() {
    local until=$((SECONDS + ORPHAN_SECONDS)) shown
    while [[ -z $asked ]] && ((terms == 0 && SECONDS < until)) && ! answers "$address" "$port"; do
        shown=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null)
        if [[ $shown =~ \ JobState=RUNNING\ .*\ NodeList=([^ ]+)\ BatchHost=([^ ]+) ]] \
            && ! scontrol show hostnames "${BASH_REMATCH[1]}" | grep -qxF "${BASH_REMATCH[2]}"; then
            rm -rf -- "${RAY_AUTH_TOKEN_PATH%/*}" # of this job alone; its next life makes its own
            rmdir -- "${RAY_AUTH_TOKEN_PATH%/*/*}" 2>/dev/null
            if ((${SLURM_RESTART_COUNT:-0} < TRAIN_REQUEUES)); then
                scontrol requeue "$SLURM_JOB_ID"
            else
                scancel "$SLURM_JOB_ID"
            fi
        fi
        sleep 5 &
        wait $!
    done
}

# Slurm sends TERM when the job is over, then KILL after KillWait; and, before it preempts a job with a grace time, to the
# steps alone. While the driver saves its workers must live: Ray runs until train.sbatch, or time, says otherwise.
# shellcheck disable=SC2329  # called by the trap
hear_term() {
    local state
    terms=$((terms + 1))
    ((terms == 1)) || return 0
    state=$(thrice squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state != RUNNING ]]; then
        deadline=$((SECONDS + TRAIN_KILL_WAIT - 5))
    fi
    # Where Slurm does not say, others may need the nodes: a job that is over has heard of that itself, which comes first.
    if [[ $role == head && (-z $state || $state == RUNNING) ]]; then
        thrice scancel --batch --signal=USR1 "$SLURM_JOB_ID"
    fi
}

# Ask Slurm; its controller may be busy, all the more when it has just decided who gets which nodes.
# shellcheck disable=SC2329  # called by the above
thrice() {
    "$@" 2>/dev/null || { sleep 1 && "$@" 2>/dev/null; } || { sleep 2 && "$@" 2>/dev/null; }
}

asked="" terms=0 deadline=""
trap 'asked=1' USR2
trap hear_term TERM
check
rm -rf -- "$scratch" # of this job before it was requeued, had Slurm to kill it
if ! mkdir -m 700 "$scratch" "$scratch/driver"; then fail 2 "$scratch cannot be made"; fi
start_ray
while kill -0 "$ray" 2>/dev/null; do
    sleep 1 &
    wait $!
    if [[ -n $asked ]] || ((terms > 1)) || { [[ -n $deadline ]] && ((SECONDS >= deadline)); }; then
        end_ray
        exit 0
    fi
done
say "Ray has ended: $(tail -n 4 "$scratch/start.log" | sed 's/\x1b\[[0-9;]*m//g' | tr '\n' ' ')" >&2
end_ray
[[ $role == head ]] || requeue_orphan
exit 1
