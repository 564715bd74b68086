#!/usr/bin/env bash
# A dense GPT of 2.7 billion parameters: hidden 2560, 32 layers, 2K context. DRY_RUN=1 checks it without a GPU.
set -euo pipefail
NUM_NODES=${NUM_NODES:-1}
VOCAB_SIZE=50257
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL_ARGS=(
    --num-layers 32
    --hidden-size 2560
    --ffn-hidden-size 6912
    --num-attention-heads 32
    --seq-length 2048
    --max-position-embeddings 2048
)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 1
)
TRAINING_ARGS=(
    --micro-batch-size 4
    --global-batch-size 512
    --train-iters 50000
    --lr 1.6e-4
    --min-lr 1.6e-5
    --lr-decay-style cosine
    --lr-warmup-iters 500
)
launch
