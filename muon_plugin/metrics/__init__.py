"""What the paper watches: RMS, SVD entropy, singular values, attention logits, by the groups of its appendix F.

Functions on tensors; ``python -m muon_plugin.metrics CHECKPOINT`` has a table and a picture of a saved model.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.routing import Routing, route

#: The six groups over which the paper averages the SVD entropy.
GROUPS = ("attention Q and O", "attention K and V", "experts", "shared experts", "router", "dense")
#: Layers of attention that make or take heads, by name: Hugging Face's, Megatron's, GPT-2's, the original Llama's.
_QUERY_OUTPUT = re.compile(r"^(linear_)?(q|o|out|wq|wo)(_a|_b|_down|_up)?(_proj)?$|^linear_proj$")
_KEY_VALUE = re.compile(r"^(linear_)?(k|v|kv|wk|wv)(_a|_b|_down|_up)?(_proj)?(_with_mqa)?$")
_FUSED = re.compile(r"qkv|c_attn|query_key_value|in_proj|w_pack")
_PART = re.compile(r"\[(?:\d+,)*(\d+)\]$")


def rms(tensor: Tensor) -> float:
    """Root of the mean square of all elements, summed in float64; of any shape and dtype; nan where there are none."""
    return float(tensor.detach().double().square().mean().sqrt())


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of (rows, cols), any float dtype: (min(rows, cols),) float32, the largest first.

    Raises:
        ValueError: for a tensor that is not a matrix.
    """
    if matrix.dim() != 2:
        raise ValueError(f"singular_values takes a matrix (rows, cols), not a tensor of shape {list(matrix.shape)}")
    return torch.linalg.svdvals(matrix.detach().float())


def svd_entropy(sigma: Tensor) -> float:
    """How evenly singular values are spread (paper, section 3.4): 1 if all are equal, 0 if only one is not zero.

    H = -(1/log n) sum p_i log p_i with p_i = sigma_i^2 / sum sigma^2.

    Args:
        sigma: (n,) singular values, in any order and scale; n at least 2.

    Returns:
        The entropy, from 0 to 1; nan where all values are zero.

    Raises:
        ValueError: for another shape: with one singular value the entropy is not defined.
    """
    if sigma.dim() != 1 or len(sigma) < 2:
        raise ValueError(f"svd_entropy takes 2 or more singular values (n,), not a tensor of shape {list(sigma.shape)}")
    p = sigma.double().square()
    p = p / p.sum()
    return float(torch.special.entr(p).sum() / math.log(len(p)))


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


def group_of(name: str) -> str:
    """The group of `GROUPS` that a matrix belongs to, by its name in Hugging Face's, Megatron's or DeepSpeed's style.

    Args:
        name: of a parameter, or of one of its matrices as `muon_plugin.routing` names them
            (``...linear_qkv.weight[0]`` is the query of a fused projection).
    """
    parts = re.sub(r"\[.*\]$", "", name).split(".")
    owner = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    attention = any("attn" in part or "attention" in part for part in parts[:-1])
    if "router" in parts or owner in ("gate", "wg"):
        return "router"
    if any("shared_expert" in part for part in parts):
        return "shared experts"
    if any("expert" in part for part in parts):
        return "experts"
    if _FUSED.search(owner):
        part = _PART.search(name)
        return GROUPS[0] if part is None or part[1] == "0" else GROUPS[1]
    if _KEY_VALUE.match(owner):
        return GROUPS[1]
    if _QUERY_OUTPUT.match(owner) or (attention and owner in ("c_proj", "dense")):
        return GROUPS[0]
    return "dense"


def matrices_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Name, (rows, cols)) of every matrix that Muon would have of a model; fused and batched ones taken apart."""
    parameters = dict(model.named_parameters())
    yield from cut(parameters, route({name: tuple(p.shape) for name, p in parameters.items()}, model=model))


def cut(tensors: Mapping[str, Tensor], routing: Routing) -> Iterator[tuple[str, Tensor]]:
    """(Name, (rows, cols)) of the matrices of a routing, out of whole tensors by parameter name."""
    for matrix in routing.matrices:
        flat = tensors[matrix.parameter].detach().reshape(-1)
        yield matrix.name, matrix.where.view(flat).reshape(matrix.rows, matrix.cols)
