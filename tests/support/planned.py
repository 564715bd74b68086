"""Small models as the planner is given them."""

import shlex

LLAMA = {
    "model_type": "llama",
    "hidden_size": 42,
    "intermediate_size": 87,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "max_position_embeddings": 32,
}
#: The arguments of megatron_model.py's models.
MODEL = shlex.split("""
    --num-layers 4 --hidden-size 24 --ffn-hidden-size 40 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --kv-channels 6 --swiglu --normalization RMSNorm --disable-bias-linear --seq-length 16
    --position-embedding-type rope --max-position-embeddings 16 --untie-embeddings-and-output-weights --mock-data
    --vocab-size 64 --make-vocab-size-divisible-by 32 --tokenizer-type NullTokenizer --bf16 --micro-batch-size 1
    --global-batch-size 4 --train-iters 10 --lr 0.01 --optimizer muon --use-distributed-optimizer --muon-ns-dtype bf16
""")
