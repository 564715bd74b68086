#!/usr/bin/env bash
# One node's part of a step: env.sh, then the command; passes the signal to stop on to the command's workers.
#
# node.sh LOG COMMAND...
set -uo pipefail
exec >> "$1-$SLURMD_NODENAME.log" 2>&1            # not by srun --output: what srun itself has to say stays in the job's
shift
[[ -d "$REPO/.venv/bin" ]] && export PATH="$REPO/.venv/bin:$PATH"
[[ -f "${ENV_SH:-$REPO/env.sh}" ]] && source "${ENV_SH:-$REPO/env.sh}"   # modules, conda, secrets: on every node

export NODE_RANK=$SLURM_NODEID
if [[ "$1" == torchrun ]]; then
    shift
    # Node 0 hosts the rendezvous because Slurm says so: torchrun would compare names, and waits for ever on an alias.
    set -- torchrun --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" --max-restarts 0 \
        --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID.$SLURM_STEP_ID" \
        --rdzv-conf "is_host=$((SLURM_NODEID == 0)),join_timeout=300" "$@"
fi

# torchrun would die of SIGUSR1, and gives workers 30 seconds after SIGTERM: only the workers get it. They ignore
# SIGUSR1 (what is ignored stays so through exec) until their own handler stands.
launcher=
trap '[[ -n "$launcher" ]] && pkill -"$STOP_SIGNAL" -P "$launcher"' USR1
(trap "" USR1; exec "$@") &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done   # a trap interrupts wait
wait "$launcher"
