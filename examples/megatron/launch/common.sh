# Sourced by the launch scripts beside it: the job, the data, what every model shares, and the launch itself.
# What to edit is set by environment variables. Without a GPU: DRY_RUN=1 checks every argument and prints Muon's plan
# (docs/planner.md). PLAN_ARGS are the planner's own options, EXTRA_ARGS more of Megatron's; both are split at spaces,
# whatever is quoted in them.

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-8}
MEGATRON_PATH=${MEGATRON_PATH:-.}              # a Megatron-LM tree (core_v0.16.1 or core_v0.19.0): has pretrain_gpt.py
CHECKPOINT_PATH=${CHECKPOINT_PATH:-checkpoints/$(basename "$0" .sh)}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}   # tensor parallelism overlaps with it

for name in GPUS_PER_NODE NUM_NODES; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || { echo "$name=${!name}: allowed: a whole number from 1 on" >&2; exit 2; }
done

DISTRIBUTED_ARGS=(
    --nproc-per-node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-29500}"
)

# Muon in the stock distributed optimizer, with the paper's settings. Learning rate and weight decay are AdamW's.
OPTIMIZER_ARGS=(
    --optimizer muon
    --use-distributed-optimizer
    --muon-paper
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
    --overlap-grad-reduce
    --overlap-param-gather
)

COMMON_ARGS=(
    --bf16
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --sequence-parallel
    --distributed-backend nccl
    --log-interval 10
    --eval-iters 10
    --eval-interval 1000
    --save-interval 1000
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
    --ckpt-format torch_dist                   # resumes at another layout with the next flag
    --dist-ckpt-optim-fully-reshardable
)

if [[ -n "${DATA_PATH:-}" ]]; then
    DATA_ARGS=(--data-path "$DATA_PATH" --tokenizer-type HuggingFaceTokenizer --tokenizer-model
               "${TOKENIZER_MODEL:?set it with DATA_PATH: the folder or name of a Hugging Face tokenizer}")
else
    DATA_ARGS=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCAB_SIZE")
fi
DATA_ARGS+=(--split 99,1,0)

launch() {
    local all=("${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${COMMON_ARGS[@]}"
               "${OPTIMIZER_ARGS[@]}" "${DATA_ARGS[@]}" ${EXTRA_ARGS:-})
    if [[ "${DRY_RUN:-0}" == 1 || "${PLAN:-0}" == 1 ]]; then   # PLAN=1: an older name
        [[ -d "$MEGATRON_PATH/megatron" ]] && export PYTHONPATH="$MEGATRON_PATH${PYTHONPATH:+:$PYTHONPATH}"
        exec "${PYTHON:-python}" -W ignore -m muon_plugin.planner \
            --nodes "$NUM_NODES" --gpus-per-node "$GPUS_PER_NODE" --strict ${PLAN_ARGS:-} -- "${all[@]}"
    fi
    exec torchrun "${DISTRIBUTED_ARGS[@]}" -m muon_plugin "$MEGATRON_PATH/pretrain_gpt.py" "${all[@]}"
}
