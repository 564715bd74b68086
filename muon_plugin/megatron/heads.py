"""Which outputs of Megatron's attention projections are which head, from the config of the model that they are in."""

from __future__ import annotations

from typing import Any

from ..core.heads import GATE, KEY, QUERY, VALUE, Heads, Part

#: Layers with heads of another geometry, which stay as they are without heads, and why.
OTHERS = {
    "in_proj": "linear attention and state spaces have heads of their own",
    "linear_wq_b": "an indexer scores tokens by heads of its own",
    "linear_wk": "an indexer scores tokens by heads of its own",
}


def heads_of(layer: str, config: Any) -> Heads | None:
    """The heads of one layer; None for other layers.

    Args:
        layer: its name in the attention, such as ``linear_qkv``.
        config: the TransformerConfig nearest above it.
    """
    if layer == "linear_qkv":  # query (and its gate), key and value of one query group, then of the next
        width, groups = config.kv_channels, config.num_query_groups
        queries = Part(QUERY, width, config.num_attention_heads // groups)
        gates = (Part(GATE, width, queries.heads),) if getattr(config, "attention_output_gate", False) else ()
        return Heads((queries, *gates, Part(KEY, width), Part(VALUE, width)), groups)
    if layer == "linear_q":  # cross attention
        return Heads((Part(QUERY, config.kv_channels, config.num_attention_heads),))
    if layer == "linear_kv":
        return Heads((Part(KEY, config.kv_channels), Part(VALUE, config.kv_channels)), config.num_query_groups)
    if not getattr(config, "multi_latent_attention", False):
        return None
    if layer in ("linear_q_proj", "linear_q_up_proj"):  # W_UQ and W_QR head by head
        rotary = config.qk_pos_emb_head_dim
        return Heads((Part(QUERY, config.qk_head_dim + rotary, rotary=rotary),), config.num_attention_heads)
    if layer == "linear_kv_up_proj":  # W_UK and W_UV head by head
        return Heads((Part(KEY, config.qk_head_dim), Part(VALUE, config.v_head_dim)), config.num_attention_heads)
    return None
