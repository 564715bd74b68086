"""QK-Clip under Megatron: ``--qk-clip`` scales the shards, in the place of Megatron's own `clip_qk`.

Megatron's rewrites ``weight.main_param``, of which the distributed optimizer holds a part on each rank, after the
weights were gathered. Its attention keeps the largest logit of each head (``current_max_attn_logits``): that of
Transformer Engine from 2.9 on. For Megatron's local attention, which does not, a hook on each module computes it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from ..core.checks import above, require
from ..core.cutting import Stored
from ..core.heads import KEY, QUERY, Heads
from ..core.layout import Shard
from ..core.logits import largest_logits
from ..core.qk_clip import ALPHA, AttentionLayer, Clip, QKClip
from ..core.qk_heads import attention_layer
from .heads import heads_of
from .routing import Parameter, modules_of

#: Model chunk -> its QK-Clip, or None on a pipeline stage without attention: those that `clip_qk` leaves to us.
_clips: weakref.WeakKeyDictionary[nn.Module, Clip | None] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Attentions:
    """The attention layers of this rank's model chunks.

    Attributes:
        setting: threshold and alpha.
        layers: whole.
        modules: those that compute them.
    """

    setting: QKClip
    layers: tuple[AttentionLayer, ...]
    modules: tuple[Any, ...]


def setting_of(config: Any) -> QKClip | None:
    """From a TransformerConfig; None without ``--qk-clip``.

    Raises:
        ValueError: with the flag, its value and what is allowed.
    """
    if not getattr(config, "qk_clip", False):
        return None
    require(f"--qk-clip-threshold {config.qk_clip_threshold!r}", config.qk_clip_threshold, above(0))
    require(f"--qk-clip-alpha {config.qk_clip_alpha!r}", config.qk_clip_alpha, ALPHA)
    return QKClip(float(config.qk_clip_threshold), float(config.qk_clip_alpha))


def find(chunks: Sequence[nn.Module], found: Sequence[Parameter], setting: QKClip) -> Attentions:
    """The attention layers whose query and key projections are trained.

    Args:
        chunks: the model chunks.
        found: their parameters.
        setting: threshold and alpha.

    Raises:
        ValueError: for attention that QK-Clip does not know, whose logits nobody keeps, or with QK-norm.
    """
    names = {id(p.tensor): p for p in found}
    layers: list[AttentionLayer] = []
    modules = []
    for chunk in chunks:
        for path, module, _ in modules_of(chunk):
            if not isinstance(module, Attention) or not any(id(p) in names for p in module.parameters()):
                continue
            projections = [
                (names[id(layer.weight)], held)
                for layer, held in _projections(path, module)
                if id(layer.weight) in names
            ]
            roles = {part.role for _, held in projections for part in held.parts}
            if {QUERY, KEY} <= roles:
                _check(path, module)
                label = _label(path, module, {layer.name for layer in layers})
                layers.append(_layer(label, projections, {p.name: p.partition.shape for p in found}))
                modules.append(module)
    return Attentions(setting, tuple(layers), tuple(modules))


def _layer(label: str, projections: Sequence[tuple[Parameter, Heads]], shapes: Mapping[str, Any]) -> AttentionLayer:
    stored = [(p.name, Stored.of(p.partition.shape), held) for p, held in projections]
    return attention_layer(label, stored, shapes)


def _label(path: str, module: Any, taken: set[str]) -> str:
    """The layer's name, numbered over all pipeline stages."""
    label = f"{path.partition('.layers.')[0]}.layers.{module.layer_number - 1}"
    return path if label in taken else label


def _projections(path: str, module: Any) -> list[tuple[Any, Heads]]:
    """The layers that project to queries and keys, with their heads."""
    if type(module) is SelfAttention or (isinstance(module, MLASelfAttention) and hasattr(module, "linear_kv_up_proj")):
        found = [(layer, heads_of(name, module.config)) for name, layer in module.named_children()]
        return [(layer, heads) for layer, heads in found if heads is not None]
    raise ValueError(
        f"--qk-clip does not know the heads of {path} ({type(module).__name__}); allowed: models whose attention is "
        "SelfAttention or MLASelfAttention, or no --qk-clip"
    )


def _check(path: str, module: Any) -> None:
    """Refuses what bounds the logits otherwise, and attention whose logits nobody keeps."""
    norms = [getattr(module, name, None) for name in ("q_layernorm", "k_layernorm")]
    normed = any(norm is not None and not isinstance(norm, IdentityOp) for norm in norms)
    latent = isinstance(module, MLASelfAttention)  # whose norms stand before the projections
    if not latent and (normed or getattr(module.config, "qk_l2_norm", False)):
        raise ValueError(
            f"--qk-clip with --qk-layernorm or qk_l2_norm: {path} norms its queries and keys behind the projection, so "
            "that its logits do not depend on the size of the weights; allowed: one of the two"
        )
    core = module.core_attention
    if not (isinstance(core, DotProductAttention) or hasattr(core, "current_max_attn_logits")):
        raise ValueError(
            f"--qk-clip: {path} computes attention with {type(core).__name__}, which does not keep its largest logits; "
            "allowed: Megatron's local attention, or that of Transformer Engine 2.9 or newer in a model that was built "
            "with qk_clip"
        )


class Logits:
    """The largest logits that Megatron's attention keeps, of the heads of this TP rank. A `Source` of `Clip`.

    Args:
        found: the attention layers.
        tp: (rank, size) in the tensor parallel group. Each rank computes as many heads, one after the other, also
            where it holds a part of a query group.
        device: where the logits are.
    """

    def __init__(self, found: Attentions, tp: tuple[int, int], device: torch.device) -> None:
        self._found, self._tp, self._device = found, tp, device
        for module in found.modules:
            _keep(module.core_attention)

    def read(self) -> Tensor:
        values = torch.full((sum(layer.heads for layer in self._found.layers),), -math.inf, device=self._device)
        begin = 0
        for layer, module in zip(self._found.layers, self._found.modules):
            kept = module.core_attention.current_max_attn_logits
            if kept is not None:
                rank, size = self._tp
                heads = layer.heads // size
                first = begin + rank * heads
                if tuple(kept.shape) != (heads,):
                    raise RuntimeError(
                        f"--qk-clip: {layer.name} kept logits of shape {list(kept.shape)}, and has {heads} of "
                        f"{layer.heads} heads on this tensor parallel rank"
                    )
                values[first : first + heads] = kept.detach().float()
            begin += layer.heads
        return values

    def reset(self) -> None:
        for module in self._found.modules:
            module.core_attention.current_max_attn_logits = None


def _keep(core: Any) -> None:
    """Makes one attention keep its largest logits in training, and in training alone."""
    if isinstance(core, DotProductAttention):
        core.current_max_attn_logits = None
        core.register_forward_pre_hook(_compute, with_kwargs=True)
        return

    def before(module: Any, args: Any) -> None:
        module._muon_before_evaluation = module.current_max_attn_logits

    def after(module: Any, args: Any, output: Any) -> None:
        if not module.training:  # Transformer Engine's keeps those of evaluation too
            module.current_max_attn_logits = module._muon_before_evaluation

    core.register_forward_pre_hook(before)
    core.register_forward_hook(after)


@torch.no_grad()
def _compute(core: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Before the forward pass of Megatron's local attention: queries and keys are (tokens, batch, heads, size)."""
    if not core.training:
        return
    names = ("query", "key", "value", "attention_mask")
    given = {**dict(zip(names, args)), **kwargs}
    softmax, hidden, causal = core.scale_mask_softmax, given.get("attention_mask"), False
    query, key = (given[name].permute(1, 2, 0, 3) for name in ("query", "key"))
    if softmax.window_size is not None:
        from megatron.core.transformer.utils import get_sliding_window_causal_mask

        hidden = get_sliding_window_causal_mask(query.shape[2], key.shape[2], softmax.window_size)
    elif softmax.attn_mask_type == AttnMaskType.causal and hidden is None:
        causal = True
    scaling = core.softmax_scale * (1.0 if softmax.scale is None else softmax.scale)
    mask = None
    if hidden is not None:
        mask = ~hidden.bool().to(query.device)
        mask = mask[(None,) * (4 - mask.dim())]
    maxima = largest_logits(query, key, scaling, mask=mask, causal=causal)
    before = core.current_max_attn_logits
    core.current_max_attn_logits = maxima if before is None else torch.maximum(before, maxima)


def make(
    found: Attentions,
    chunks: Sequence[nn.Module],
    shards: Sequence[Shard],
    parameters: Mapping[str, Tensor],
    tp: tuple[int, int],
    group: Any,
    device: torch.device,
) -> Clip | None:
    """The clip of this rank, and that `clip_qk` leaves these chunks to it; None on a stage without attention.

    Args:
        found: the attention layers.
        chunks: the model chunks, as Megatron's training loop has them.
        shards: all that this rank holds.
        parameters: name -> parameter.
        tp: (rank, size) in the tensor parallel group.
        group: data and context parallel times tensor parallel.
        device: where the logits are.
    """
    clip = None
    if found.layers:
        clip = Clip(found.setting, found.layers, Logits(found, tp, device), shards, parameters, group, device)
    for chunk in chunks:
        _clips[chunk] = clip
    return clip


def clip_qk(original: Callable[..., Any], model: Any, log_max_only: bool = False) -> float:
    """In the place of Megatron's: the weights were clipped in the optimizer's step; returns the largest logit."""
    logit = largest_logit(model)
    return float(original(model, log_max_only)) if logit is None else logit


def largest_logit(model: Any) -> float | None:
    """The largest of the last step, over the layers of these model chunks; None where QK-Clip is not ours."""
    if not model or model[0] not in _clips:
        return None
    clip = _clips[model[0]]
    return max((logit for _, logit, _ in clip.last), default=0.0) if clip is not None else 0.0
