#!/usr/bin/env bash
# Moonlight 16B-A3B, the paper's model, with its schedule. DRY_RUN=1 checks it without a GPU.
#
# STAGE=1 up to 33B tokens: warm-up to 4.2e-4 in 2,000 steps. STAGE=2 up to 5.2T tokens: cosine to 4.2e-5; the batch
# doubles at 200B tokens, so it is 2a, then 2b. STAGE=3 up to 5.7T tokens: up to 1e-4 in 100 steps, then linearly to 0.
# Megatron's scheduler knows one warm-up and one decay, so each stage is a run of its own that loads the last one's
# checkpoint (--override-opt_param-scheduler). Stage 2's cosine starts anew at 2b, a few percent off the paper's.
# MUONCLIP=1 trains with Muon head by head and QK-Clip, which came after the paper. (--qk-layernorm does not exclude it
# in multi-latent attention, whose norms stand before the up-projections.)
set -euo pipefail
VOCAB_SIZE=163840
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL_ARGS=(
    --num-layers 27
    --hidden-size 2048
    --ffn-hidden-size 11264
    --num-attention-heads 16
    --seq-length 8192
    --max-position-embeddings 8192
    --rotary-base 50000
    --init-method-std 0.02
    --make-vocab-size-divisible-by 128
)
ATTENTION_ARGS=(                               # multi-latent attention, without a query latent
    --multi-latent-attention
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm
)
EXPERT_ARGS=(                                  # the first layer is dense; 6 of 64 experts, 2 shared, a sigmoid router
    --num-experts 64
    --moe-layer-freq "([0]*1+[1]*26)"
    --moe-ffn-hidden-size 1408
    --moe-shared-expert-intermediate-size 2816
    --moe-router-topk 6
    --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor 2.446
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
)
MODEL_ARGS+=("${ATTENTION_ARGS[@]}" "${EXPERT_ARGS[@]}")
PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 8
)

# Samples of 8,192 tokens: 33B tokens are 4,028,320, 200B 24,414,062, 5.2T 634,765,625, 5.7T 695,800,781.
case "${STAGE:-1}" in
    1) SCHEDULE=(--global-batch-size 2048 --train-samples 4028320 --lr-decay-samples 4028320
                 --lr-warmup-samples 4026368 --lr 4.2e-4 --min-lr 4.2e-4 --lr-decay-style constant
                 --moe-router-bias-update-rate 1e-3) ;;
    2a) SCHEDULE=(--global-batch-size 2048 --train-samples 24414062 --lr-decay-samples 634765625
                  --lr 4.2e-4 --min-lr 4.2e-5 --lr-decay-style cosine --moe-router-bias-update-rate 1e-3) ;;
    2b) SCHEDULE=(--global-batch-size 4096 --train-samples 634765625 --lr-decay-samples 634765625
                  --lr 4.2e-4 --min-lr 4.2e-5 --lr-decay-style cosine --moe-router-bias-update-rate 1e-3) ;;
    3) SCHEDULE=(--global-batch-size 4096 --train-samples 61035156 --lr-decay-samples 61035156
                 --lr-warmup-samples 409600 --lr 1e-4 --min-lr 0 --lr-decay-style linear
                 --moe-router-bias-update-rate 0 --finetune) ;;
    *) echo "STAGE=$STAGE: allowed are 1, 2a, 2b, 3" >&2; exit 2 ;;
esac
TRAINING_ARGS=(--micro-batch-size 1 "${SCHEDULE[@]}")
# Not the paper's: MuonClip, with which its authors trained Kimi K2 (see kimi_k2.sh).
[[ "${MUONCLIP:-0}" == 0 ]] || OPTIMIZER_ARGS+=(--muon-split-qkv-per-head --qk-clip --qk-clip-threshold 100)
[[ "${STAGE:-1}" == 1 ]] || TRAINING_ARGS+=(--override-opt_param-scheduler)
launch
