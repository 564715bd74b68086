#!/usr/bin/env bash
# A model like Kimi K2 (1T parameters, 32B active; arXiv 2507.20534), trained with MuonClip: Muon head by head, and
# QK-Clip at 100. DRY_RUN=1 checks it without a GPU.
#
# The report's schedule: 15.5T tokens of 4,096, batches of 67M tokens; 500 steps of warm-up, 10T tokens at 2e-4, then a
# cosine down to 2e-5. Here is the constant part; for the others see moonlight_16b_a3b.sh.
set -euo pipefail
NUM_NODES=${NUM_NODES:-256}
VOCAB_SIZE=163840
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL_ARGS=(
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 18432
    --num-attention-heads 64
    --seq-length 4096
    --max-position-embeddings 4096
    --rotary-base 50000
    --init-method-std 0.02
    --make-vocab-size-divisible-by 128
)
ATTENTION_ARGS=(                               # multi-latent attention: its norms stand before the up-projections, so
                                               # that --qk-layernorm and --qk-clip go together
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
)
EXPERT_ARGS=(                                  # the first layer is dense; 8 of 384 experts, 1 shared, a sigmoid router
    --num-experts 384
    --moe-layer-freq "([0]*1+[1]*60)"
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048
    --moe-router-topk 8
    --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-3
    --moe-router-topk-scaling-factor 2.827
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
)
MODEL_ARGS+=("${ATTENTION_ARGS[@]}" "${EXPERT_ARGS[@]}")
PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 16
    --decoder-first-pipeline-num-layers 3
    --decoder-last-pipeline-num-layers 2
    --expert-model-parallel-size 16
)
# Samples of 4,096 tokens: 10T tokens are 2,441,406,250.
TRAINING_ARGS=(--micro-batch-size 1 --global-batch-size 16384 --train-samples 2441406250
               --lr-decay-samples 2441406250 --lr-warmup-samples 8192000 --lr 2e-4 --min-lr 2e-4
               --lr-decay-style constant)
OPTIMIZER_ARGS+=(
    --muon-split-qkv-per-head                  # each head of query, key and value is a matrix of its own
    --qk-clip                                  # needs Transformer Engine 2.9 for its attention's largest logits
    --qk-clip-threshold 100
)
launch
