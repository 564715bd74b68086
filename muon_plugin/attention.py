"""Where QK-Clip's logits come from without an engine that has them: transformers' attention functions, or the model.

A model of transformers calls the attention function of its config ("sdpa", "eager", flash, flex ...) through
``AttentionInterface.get_interface``. While an optimizer with ``qk_clip`` watches a model, ours stands before that
function: it takes the maximum over the queries and keys that the function gets, and calls it. Models that compute
attention by themselves call `record_logits`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .core import logits
from .core.hooks import Hook, Hooks
from .core.logits import largest_logits

_hooks: list[Hooks] = []


def record_logits(
    module: nn.Module,
    query: Tensor | None = None,
    key: Tensor | None = None,
    *,
    maxima: Tensor | None = None,
    **how: Any,
) -> None:
    """Hands the attention logits of this forward pass over to the optimizer, if one with ``qk_clip`` trains the module.

    For models that compute attention without the attention functions of transformers. Call it in the forward pass of
    the module whose attributes are the query and key projections. It does nothing without ``qk_clip``, in evaluation
    and where gradients are disabled.

    Args:
        module: of the model that the optimizer was given.
        query: (batch, heads, queries, head size), as `muon_plugin.largest_logits` takes it.
        key: (batch, key heads, keys, head size), as `muon_plugin.largest_logits` takes it.
        maxima: in the place of `query` and `key`, the largest logit of each query head on this rank, (heads,).
        **how: further arguments of `muon_plugin.largest_logits`, such as ``causal``.

    Raises:
        ValueError: without `query` and `key`, and without `maxima`.
        RuntimeError: for another number of heads than the query projection has, or a module whose heads are not known.

    Examples:
        ``num_heads``, ``num_key_value_heads`` and ``head_dim`` say what is a head:

        >>> import torch
        >>> from torch import nn
        >>> import muon_plugin
        >>> class Attention(nn.Module):
        ...     num_heads, num_key_value_heads, head_dim = 2, 2, 4
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        ...
        ...     def forward(self, x):  # (batch, tokens, 8)
        ...         layers = self.q_proj, self.k_proj, self.v_proj
        ...         query, key, value = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in layers)
        ...         muon_plugin.record_logits(self, query, key, causal=True)
        ...         mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        ...         return self.o_proj(mixed.transpose(1, 2).flatten(-2))
        >>> model = nn.ModuleDict({"attention": Attention()})
        >>> clip = {"threshold": 100}
        >>> optimizer = muon_plugin.Muon(model.named_parameters(), model=model, qk_clip=clip)
        >>> model["attention"](torch.randn(1, 5, 8)).sum().backward()
        >>> optimizer.step()
    """
    if not logits.is_watched(module):
        return
    if maxima is None:
        if query is None or key is None:
            raise ValueError("record_logits takes query and key, or maxima")
        maxima = largest_logits(query, key, **how)
    logits.record(module, maxima)


def watch(model: nn.Module) -> None:
    """Makes the modules of a model of transformers hand their logits over.

    Raises:
        RuntimeError: for a release of transformers without ``AttentionInterface.get_interface``.
    """
    if not _hooks and any(hasattr(getattr(m, "config", None), "_attn_implementation") for m in model.modules()):
        import transformers
        from transformers.modeling_utils import AttentionInterface

        hooks = Hooks("transformers", ())
        parameters = ["self", "attn_implementation", "default"]
        hooks.install(transformers.__version__, [Hook(AttentionInterface, "get_interface", parameters, _interface)])
        _hooks.append(hooks)


def unwatch() -> None:
    """Restores transformers' own function. An optimizer with ``qk_clip`` that steps afterwards raises an error."""
    while _hooks:
        _hooks.pop().remove()


def _interface(original: Callable[..., Any], table: Any, attn_implementation: str, default: Any) -> Any:
    return functools.partial(_attend, original(table, attn_implementation, default), attn_implementation)


def _attend(
    function: Callable[..., Any],
    name: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if logits.is_watched(module):
        _record(name or "eager", module, query, key, attention_mask, kwargs)
    return function(module, query, key, value, attention_mask, *args, **kwargs)


@torch.compiler.disable
@torch.no_grad()
def _record(name: str, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Any) -> None:
    """The maxima over the pairs that the attention function of that name lets attend to each other."""
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    packed = name.startswith(("flash", "kernels-")) or "/" in name  # these take no mask of pairs
    how: dict[str, Any] = {"softcap": kwargs.get("softcap"), "mask": mask}
    if isinstance(mask, Tensor) and mask.dim() == 4:
        causal = False  # it is in the mask, and so is the window
    elif hasattr(mask, "mask_mod"):  # flex attention's BlockMask
        causal, how["mask"] = False, mask.mask_mod
    elif mask is None and name == "eager":
        causal = False  # eager attention adds a mask, or sees everything
    else:
        how["window"] = kwargs.get("sliding_window") if causal or packed else None
        if packed:
            how["segments"] = _segments(query, key, mask, kwargs)
        elif mask is None and causal and key.shape[2] > query.shape[2] > 1:
            key = key[:, :, : query.shape[2]]  # sdpa aligns the first ones
    logits.record(module, largest_logits(query, key, kwargs.get("scaling"), causal=causal, **how))


def _segments(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: Any) -> Tensor | None:
    """The sequence of each token where several are packed into one row, as flash attention is told.

    Padding is another sequence: flash attention takes it out of the queries too.
    """
    ends, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    tokens = query.shape[2]
    if mask is not None:
        return mask != 0 if mask.dim() == 2 and mask.shape[1] == key.shape[2] == tokens else None
    if ends is not None:
        return torch.searchsorted(ends[1:].contiguous(), torch.arange(tokens, device=query.device), right=True)
    if positions is not None and query.shape[0] == 1 and positions.shape == (1, tokens):
        return (torch.diff(positions[0], prepend=positions[0, :1]) != 1).cumsum(0)
    return None


logits.at_watch(watch)
