"""Attention logits before the softmax: the largest of them, and how many lie above a threshold."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionLogits:
    """Logits before the softmax: the largest, how many there are, and how many lie above `threshold`."""

    max: float
    above: int
    count: int
    threshold: float = 100.0

    @property
    def share(self) -> float:
        """Share of the logits above the threshold; 0 where there are none."""
        return self.above / max(self.count, 1)

    def __add__(self, other: AttentionLogits) -> AttentionLogits:
        """Of both together."""
        largest = max(self.max, other.max)
        return AttentionLogits(largest, self.above + other.above, self.count + other.count, self.threshold)


@torch.no_grad()
def attention_logits(
    query: Tensor,
    key: Tensor,
    scaling: float | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    threshold: float = 100.0,
) -> AttentionLogits:
    """Statistics of query key^T scaling, in float32, of those pairs that attend to each other.

    Args:
        query: (batch, heads, tokens, head size), rotated already.
        key: (batch, key heads, tokens, head size); heads is a multiple of key heads (grouped queries).
        scaling: head size ** -0.5 if not given.
        mask: bool, broadcasts to (batch, heads, query tokens, key tokens): True where a query attends to a key.
        causal: without a mask, whether a query attends only to keys that are not after it (the last ones align).
        threshold: the paper's 100.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    (batch, heads, tokens, _), keys = query.shape, key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    if mask is None:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device)
        mask = (mask.tril(keys - tokens) if causal else mask)[None, None]
    mask = mask.expand(batch, heads, tokens, keys)
    found = AttentionLogits(-math.inf, 0, 0, threshold)
    for entry in range(batch):
        for rows in range(0, tokens, 512):  # of long contexts, not the whole square of tokens at once
            part = slice(rows, rows + 512)
            logits = query[entry, :, part].float() @ key[entry].float().mT * scaling
            logits = logits[mask[entry, :, part]]
            if logits.numel():
                found += AttentionLogits(
                    float(logits.max()), int((logits > threshold).sum()), logits.numel(), threshold
                )
    return found


@contextmanager
def watch_attention(model: nn.Module, threshold: float = 100.0) -> Iterator[dict[int, AttentionLogits]]:
    """While it is open, each forward pass of a Hugging Face model adds to the statistics of its layers.

    with watch_attention(model) as logits:
        model(input_ids=batch)
    print(logits[0].max, logits[0].share)

    It stands before the attention function of ``transformers``, whatever that is ("sdpa", "eager", flash), so it sees
    queries and keys after the rotary embedding, of grouped-query and latent attention too.

    Yields:
        layer -> its statistics; filled by forward passes.

    Raises:
        ValueError: for a model without an attention function of transformers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not isinstance(name, str):
        raise ValueError(
            f"watch_attention takes a Hugging Face model whose config names its attention, not {type(model)}"
        )
    found: dict[int, AttentionLogits] = {}
    original = ALL_ATTENTION_FUNCTIONS.get(name)

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        seen = mask if mask is None or mask.dtype == torch.bool else mask == 0  # an added mask is 0 where it lets pass
        causal = bool(getattr(module, "is_causal", True))
        scaling = kwargs.get("scaling")
        logits = attention_logits(query, key, scaling, mask=seen, causal=causal, threshold=threshold)
        layer = int(module.layer_idx)
        found[layer] = found[layer] + logits if layer in found else logits
        # Eager attention is not in the table: each model's file has its own.
        function = original or sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        return function(module, query, key, value, mask, *args, **kwargs)

    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield found
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(local)
