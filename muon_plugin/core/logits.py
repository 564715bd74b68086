"""The largest attention logit of each head: computed in blocks, and kept from one step to the next.

What the modules of a model hand over goes to the `Maxima` that watches them.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Logits at a time: bounds the working memory (fp32).
BLOCK = 2**25
#: An additive mask that is lower hides a key from a query; biases by position are not.
HIDDEN = -9999.0

#: (batch, head, query, key) -> whether the query attends to the key: as in torch's flex_attention.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def largest_logits(
    query: Tensor,
    key: Tensor,
    scaling: float | None = None,
    *,
    mask: Tensor | MaskFunction | None = None,
    causal: bool = False,
    window: int | None = None,
    segments: Tensor | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Tensor:
    """The largest ``query @ key.T * scaling`` of each query head, over all pairs that attend to each other.

    Computed in fp32 and in blocks, without the whole matrix of scores. All conditions must hold for a pair to count.
    QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1) scales a head down by it.

    Args:
        query: (batch, heads, queries, head size) of any floating-point dtype, as the attention gets it (rotated).
        key: (batch, key heads, keys, head size); heads is a multiple of key heads (grouped queries).
        scaling: ``head_size ** -0.5`` if not given.
        mask: bool (True: attends) or additive, and broadcasts to (batch, heads, queries, keys); (batch, keys) for
            padding (True or 1: a token); or a function of indices. Biases in it are no part of a logit.
        causal: a query attends only to keys that are not after it (the last ones align).
        window: and only to so many keys up to its own; without `causal`, also to so many from its own on.
        segments: (tokens,) or (batch, tokens): numbers of packed sequences, which do not attend to each other.
        softcap: logits are softcap tanh(logit / softcap).
        block: logits at a time.

    Returns:
        fp32 (heads,); -inf for a head none of whose pairs attend.

    Examples:
        Two query heads share a key head:

        >>> import torch
        >>> import muon_plugin
        >>> key = torch.eye(4).view(1, 1, 4, 4)
        >>> query = torch.cat([key, 30 * key], dim=1)
        >>> muon_plugin.largest_logits(query, key, causal=True)
        tensor([ 0.5000, 15.0000])
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    (batch, heads, queries, size), (_, groups, keys, _) = query.shape, key.shape
    shared, offset = heads // groups, keys - queries
    ahead = 0 if causal else queries if window is None else window - 1
    columns = min(keys, 2048)
    # Narrow enough that under a causal mask little is computed beside the triangle, and few launches.
    rows = max(1, min(queries, block // max(1, batch * heads * columns), max(128, -(-queries // 8))))
    found = torch.full((groups, shared), -math.inf, device=query.device)
    with torch.autocast(query.device.type, enabled=False):
        for first in range(0, queries, rows):
            last = min(first + rows, queries)
            some = query[:, :, first:last].reshape(batch * groups, shared * (last - first), size)
            seen = min(keys, last + offset + ahead)
            for begin in range(0, seen, columns):
                end = min(begin + columns, seen)
                if window is not None and end - 1 <= first + offset - window:
                    continue
                others = key[:, :, begin:end].reshape(batch * groups, end - begin, size)
                scores = _product(some, others.mT).view(batch, groups, shared, last - first, end - begin)
                part = (first, last, begin, end)
                hidden = _hidden(part, offset, causal, window, segments, query.device)
                if mask is not None:
                    masked = _masked(mask, part, (batch, groups, shared), query.device)
                    hidden = masked if hidden is None else hidden | masked
                if hidden is not None:
                    scores = scores.masked_fill_(hidden, -math.inf)
                found = torch.maximum(found, scores.amax(dim=(0, 3, 4)))
    logits = found.view(heads) * scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32: products of 16-bit numbers are exact there."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.dtype == b.dtype and a.is_cuda and _into_fp32():
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _into_fp32() -> bool:
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


def _hidden(
    part: tuple[int, int, int, int],
    offset: int,
    causal: bool,
    window: int | None,
    segments: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which pairs of a block do not attend to each other, by their positions; broadcasts to (b, g, s, q, k)."""
    first, last, begin, end = part
    at = torch.arange(first, last, device=device)[:, None] + offset
    to = torch.arange(begin, end, device=device)[None]
    found = None
    if causal and end - 1 > first + offset:
        found = to > at
    if window is not None and begin <= last - 1 + offset - window:
        before = to <= at - window
        found = before if found is None else found | before
    if window is not None and not causal and end - 1 >= first + offset + window:
        after = to >= at + window
        found = after if found is None else found | after
    if segments is not None:
        ids = segments if segments.dim() == 2 else segments[None]
        apart = ids[:, first:last, None] != ids[:, None, begin:end]
        apart = apart[:, None, None]
        found = apart if found is None else found | apart
    return found


def _masked(mask: Tensor | MaskFunction, part: tuple[int, int, int, int], shape: Sequence[int], device: Any) -> Tensor:
    """Which pairs of a block the mask hides; broadcasts to (batch, groups, shared, queries, keys)."""
    (first, last, begin, end), (batch, groups, shared) = part, shape
    if not isinstance(mask, Tensor):
        pairs = mask
        from torch.nn.attention.flex_attention import create_mask

        def moved(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return pairs(b, h, q + first, k + begin)

        made = create_mask(moved, batch, groups * shared, last - first, end - begin, device=str(device))
        return ~made.view(batch, groups, shared, last - first, end - begin)
    if mask.dim() == 2:
        return (mask[:, begin:end] == 0)[:, None, None, None]
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[2] > 1:
        mask = mask[:, :, first:last]
    if mask.shape[3] > 1:
        mask = mask[:, :, :, begin:end]
    hidden = ~mask if mask.dtype == torch.bool else mask < HIDDEN
    if hidden.shape[1] == 1:
        return hidden[:, :, None]
    return hidden.view(hidden.shape[0], groups, shared, *hidden.shape[2:])


class Maxima:
    """The largest logit of each head on this rank since the last `reset`.

    Args:
        layers: (name, number of query heads) of each layer.

    Attributes:
        held: for each layer, the query heads whose logits this rank computes: (first, number).
    """

    def __init__(self, layers: Sequence[tuple[str, int]]) -> None:
        self._layers = tuple(layers)
        self.held = [(0, heads) for _, heads in layers]
        self._begin = [sum(heads for _, heads in layers[:number]) for number in range(len(layers))]
        self._count = sum(heads for _, heads in layers)
        self._values: Tensor | None = None

    def record(self, layer: int, maxima: Tensor) -> None:
        """Keeps the larger of these, (heads,), and what was there before.

        Raises:
            RuntimeError: for another number of heads than the layer's weights have.
        """
        first, heads = self.held[layer]
        if maxima.shape != (heads,):
            raise RuntimeError(
                f"qk_clip: {self._layers[layer][0]} handed over logits of shape {list(maxima.shape)}, but its query "
                f"projection has {heads} heads on this rank"
            )
        if self._values is None:
            self._values = torch.full((self._count,), -math.inf, device=maxima.device)
        begin = self._begin[layer] + first
        kept = self._values[begin : begin + heads]
        torch.maximum(kept, maxima.detach().to(kept.device, torch.float32), out=kept)

    def read(self) -> Tensor:
        """fp32, of all layers; -inf where there was none."""
        return torch.full((self._count,), -math.inf) if self._values is None else self._values.clone()

    def reset(self) -> None:
        if self._values is not None:
            self._values.fill_(-math.inf)


#: Attention module -> who keeps its maxima, and as which layer; None for one that is not clipped.
_watched: weakref.WeakKeyDictionary[nn.Module, tuple[Maxima, int] | None] = weakref.WeakKeyDictionary()
#: All modules of the models that are watched.
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_watchers: list[Callable[[nn.Module], None]] = []


def at_watch(watcher: Callable[[nn.Module], None]) -> None:
    """`watcher` is called with each model that begins to be watched: it makes the modules hand over their logits."""
    if watcher not in _watchers:
        _watchers.append(watcher)


def watch(model: nn.Module, layers: Mapping[nn.Module, int], left: Sequence[nn.Module], maxima: Maxima) -> None:
    """From now on `maxima` keeps the logits of these modules of `model`, by the number of the layer; those of `left`
    are not kept.

    Code that torch has compiled until now is compiled again: it has traced modules that nobody watched, or another one.
    """
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled
        torch.compiler.reset()
    for module in model.modules():
        _known.add(module)
        _watched.pop(module, None)
    for module in left:
        _watched[module] = None
    for module, number in layers.items():
        _watched[module] = maxima, number
    for watcher in _watchers:
        watcher(model)


def is_watched(module: nn.Module) -> bool:
    """Whether the module's logits are to be recorded now: in training, with gradients, and once it is watched.

    Evaluation does not count. With gradient checkpointing the forward pass that is repeated has gradients, and a
    maximum does not change when it is taken twice.

    Raises:
        RuntimeError: for a module of a watched model that is not known to have heads.
    """
    if module not in _known or not (module.training and torch.is_grad_enabled()):
        return False
    if module not in _watched:
        raise RuntimeError(
            f"qk_clip: {type(module).__name__} computes attention, and which outputs of its projections are which head "
            "is not known. Leave qk_clip out for this model, or report its class"
        )
    return _watched[module] is not None


def record(module: nn.Module, maxima: Tensor) -> None:
    """Hands over the largest logit of each head, (heads,), of a module that `is_watched`."""
    watched = _watched.get(module)
    if watched is not None:
        keeper, layer = watched
        keeper.record(layer, maxima)
