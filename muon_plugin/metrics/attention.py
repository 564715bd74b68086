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
    """Logits before the softmax. The sum of two of them is of both together.

    Attributes:
        max: the largest logit.
        above: number of logits above `threshold`.
        count: number of logits.
        threshold: the paper's is 100.
    """

    max: float
    above: int
    count: int
    threshold: float = 100.0

    @property
    def share(self) -> float:
        """Share of the logits above the threshold; 0 where there are none."""
        return self.above / max(self.count, 1)

    def __add__(self, other: AttentionLogits) -> AttentionLogits:
        """Of the logits of both together."""
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
    """Statistics of ``query @ key.T * scaling``, in float32, of those pairs that attend to each other.

    The paper watches the largest logit and the share above 100. `muon_plugin.largest_logits` has the
    largest one alone, of each head.

    Args:
        query: (batch, heads, tokens, head size) of any floating-point dtype, rotated already.
        key: (batch, key heads, tokens, head size); heads is a multiple of key heads (grouped queries).
        scaling: ``head_size ** -0.5`` if not given.
        mask: bool, broadcasts to (batch, heads, query tokens, key tokens): True where a query attends to a key.
        causal: without a mask, whether a query attends only to keys that are not after it (the last ones align).
        threshold: the paper's 100.

    Examples:
        >>> import torch
        >>> from muon_plugin.metrics import attention_logits
        >>> query = key = torch.eye(4).mul(30.0).view(1, 1, 4, 4)
        >>> attention_logits(query, key)
        AttentionLogits(max=450.0, above=4, count=10, threshold=100.0)
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

    It stands before the attention function of ``transformers``, whatever that is ("sdpa", "eager", flash), so it sees
    queries and keys after the rotary embedding, of grouped-query and latent attention too.

    Args:
        model: of transformers, with a config.
        threshold: logits above it are counted; the paper's is 100.

    Yields:
        The statistics of each layer by its number, which forward passes fill.

    Raises:
        ValueError: for a model without an attention function of transformers.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from muon_plugin.metrics import watch_attention
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> with watch_attention(model) as logits:
        ...     _ = model(input_ids=torch.arange(8)[None])
        >>> {layer: found.count for layer, found in logits.items()}
        {0: 144, 1: 144}
        >>> logits[0].share
        0.0
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
