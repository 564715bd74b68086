#!/usr/bin/env bash
# One node's part of a step: node.sh LOG COMMAND... runs env.sh, then the command.
set -uo pipefail
LOG=$1-$SLURMD_NODENAME
shift
exec >> "$LOG.log" 2>&1                            # not by srun --output: srun's own messages stay in the job's output
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

# What `stop` in common.sh looks for. SIGUSR1 is ignored, through exec too, until a worker's own handler stands.
echo $$ > "$LOG.pid"
trap "" USR1
exec "$@"
