# Sourced by the sbatch scripts beside it: the job's environment, one step on all nodes, what happens when one ends.
#
#   exit code 0                     done
#   0 after the signal to stop      saved in time: requeued, goes on from there (ends at once if it was done)
#   of the preflight, not 0         a node or setting is not fit: ends, since a restart would meet the same
#   any other                       requeued, unless MAX_FAILURES in a row came without a new checkpoint
#
# Where the watchdog has ended the training, its exit code is the job's (75), and its verdict the output's last line.
set -uo pipefail

MAX_FAILURES=${MAX_FAILURES:-3}
export STOP_SIGNAL=${STOP_SIGNAL:-USR1}            # what the training program takes as "save and stop"
# Seconds without progress in the optimizer's step, then the run ends and names the rank: fewer than NCCL's own 600.
# Outside of it the limit is 12 times as long, or a second number: 300,500.
export MUON_WATCHDOG=${MUON_WATCHDOG:-300}

export NUM_NODES=$SLURM_JOB_NUM_NODES
export GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-1}      # without GPUs one process a node, over gloo
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}   # two jobs on a node do not meet
# The last task of an array has the whole array's number: as JOB_TASK it means itself alone.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then       # a sweep: LRS="5e-4 1e-3" sbatch --array=0-1 ...
    read -ra rates <<< "${LRS:-}"
    LR=${rates[SLURM_ARRAY_TASK_ID]:-}
    if [[ -z "$LR" ]]; then
        echo "array task $SLURM_ARRAY_TASK_ID: LRS='${LRS:-}' has ${#rates[@]} learning rates; allowed: one a task" >&2
        exit 2
    fi
    OUTPUT=$OUTPUT/lr_$LR
fi
mkdir -p "$OUTPUT" || exit 2
OUTPUT=$(realpath "$OUTPUT")
LOGS=$OUTPUT/logs/$SLURM_JOB_ID/start$((${SLURM_RESTART_COUNT:-0} + 1))
mkdir -p "$LOGS" || exit 2
export REPO OUTPUT

export PYTHONUNBUFFERED=1                          # the last lines before a crash are in the log
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # torchrun's own default, without its warning; more for CPU offload
export DS_ACCELERATOR=${DS_ACCELERATOR:-$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}   # Megatron's TP overlaps with it
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}              # NCCL says why it failed, and nothing else
# Which collective hung, and on which ranks: the last 2,000 are written to the logs when one times out (torchfrtrace).
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$LOGS/nccl_trace_rank_
if [[ -n "${IFNAME:-}" ]]; then                    # nodes with several networks: the one that reaches the others
    export NCCL_SOCKET_IFNAME=$IFNAME              # NCCL's start-up; its data still goes over InfiniBand if there is
    export GLOO_SOCKET_IFNAME=$IFNAME              # gloo takes the node's own name, on some systems 127.0.1.1
fi

# CONTAINER: an apptainer image (*.sif), or what pyxis takes; CONTAINER_MOUNTS: what it sees besides these two folders.
CONTAINER_ARGS=() CONTAINER_EXEC=()
MOUNTS=$REPO:$REPO,$OUTPUT:$OUTPUT${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
case ${CONTAINER:-} in
    "") ;;
    *.sif) CONTAINER_EXEC=(apptainer exec --nv --bind "$MOUNTS" --pwd "$PWD" "$CONTAINER") ;;
    *) CONTAINER_ARGS=("--container-image=$CONTAINER" "--container-mounts=$MOUNTS" "--container-workdir=$PWD") ;;
esac

say() { echo "$(date +%T) $*"; }

# step NAME COMMAND...: once on every node, each with a log of its own; returns the step's exit code.
step() {
    local name=$1; shift
    say "$name: $*"
    srun --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=1 "${CONTAINER_ARGS[@]}" \
        "${CONTAINER_EXEC[@]}" bash "$REPO/examples/slurm/node.sh" "$LOGS/$name" "$@" &
    finished $!
}

# finished PID: waits for it, through the signals that interrupt wait; returns its exit code.
finished() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# The launcher's children on every node, and nobody else: torchrun would die of SIGUSR1, and kills 30 seconds after
# SIGTERM; scancel and srun signal all processes of a step under proctrack/linuxproc, which kills workers' helpers.
stop_workers() {
    srun --overlap --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1 bash -c \
        'pid=$(cat "$1-$SLURMD_NODENAME.pid") && pkill -"$STOP_SIGNAL" -P "$pid"' stop "$LOGS/train"
}

stopping= training=
stop() {
    stopping=1
    say "the time limit is near: workers are asked to save and stop"
    [[ -n "$training" ]] && "${STOP:-stop_workers}"
}
trap stop USR1
trap '[[ "$(squeue -h -j "$JOB" -o %r)" == TimeLimit ]] && failed 143 train; exit 143' TERM   # the time was too short

# requeue WHY [LAST LINE]
requeue() {
    local drained
    say "requeued: $1"
    drained=$(sinfo -h -R -n "$SLURM_JOB_NODELIST" -o "%N: %E" | paste -s -d ";")
    [[ -n "$drained" ]] && say "drained or down, so that the next start may have to wait: $drained"
    [[ -n "${2:-}" ]] && say "$2"
    scontrol requeue "$JOB" || exit 1
    exit 0
}

# The newest mark of a complete checkpoint: of the example's, or of Megatron's, which writes its own after all ranks.
progress() {
    find "$OUTPUT" -maxdepth 3 \( -name complete -o -name latest_checkpointed_iteration.txt \) -printf "%T@\n" |
        sort -n | tail -n 1
}

# The watchdog's verdict, if it has ended the training: every rank prints it, each with its own name behind.
verdict() {
    sed -n 's/^\(muon_plugin watchdog: .*\)\. Rank .* exits with code 75$/\1/p' "$LOGS/$1"-*.log | head -n 1
}

# A failure is worth another start as long as checkpoints come: a bug that stops them must not be requeued for ever.
failed() {
    local code=$1 now count=0 last= told; now=$(progress) told=$(verdict "$2")
    [[ -n "$told" ]] && code=75                    # torchrun's own is 1, whatever its ranks exit with
    tail -n 20 "$LOGS"/"$2"-*.log
    case $(squeue -h -j "$JOB" -o "%T %r") in
        RUNNING* | *TimeLimit) ;;
        *) exit "$code" ;;                         # cancelled: stays so
    esac
    local file=$OUTPUT/logs/$SLURM_JOB_ID/failures
    [[ "${SLURM_RESTART_COUNT:-0}" != 0 && -f "$file" ]] && read -r count last < "$file"
    [[ "$last" == "$now" ]] && count=$((count + 1)) || count=1
    echo "$count $now" > "$file"
    if ((count >= MAX_FAILURES)); then
        say "failed with exit code $code, $count times in a row without a new checkpoint: not requeued"
        [[ -n "$told" ]] && say "$told"
        exit "$code"
    fi
    requeue "failed with exit code $code, time $count of $MAX_FAILURES without a new checkpoint" "$told"
}

# Rank 0's table, which is in the log of one node, and what all ranks say.
preflight_found() {
    sed -sn '/^nodes  *ranks /,/^preflight: /{/^preflight: /!p}' "$LOGS"/preflight-*.log
    grep -h "preflight: " "$LOGS"/preflight-*.log || tail -n 20 "$LOGS"/preflight-*.log
}

# run COMMAND...: preflight, training, and what its end asks for.
run() {
    local code
    say "job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)), nodes $SLURM_JOB_NODELIST, logs in $LOGS"
    if [[ "${PREFLIGHT:-1}" != 0 ]]; then
        # PREFLIGHT_ARGS: --tp and --pp of the job, --checkpoint-bytes 240G, --timeout; see --help
        step preflight torchrun -m muon_plugin.preflight --checkpoints "$OUTPUT" ${PREFLIGHT_ARGS:-}; code=$?
        preflight_found
        ((code)) && { say "the preflight failed: not started, not requeued"; exit 1; }
    fi
    [[ -n "$stopping" ]] && requeue "no time left to train"
    training=1
    "${STEP:-step}" train "$@"; code=$?
    ((code)) && failed "$code" train
    [[ -n "$stopping" || $EPOCHSECONDS -ge ${EXIT_AT:-$((EPOCHSECONDS + 1))} ]] && requeue "saved and stopped"
    say "done"
}
