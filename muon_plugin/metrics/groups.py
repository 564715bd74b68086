"""The matrices of a model, by the groups over which the paper averages (its appendix F)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..core.routing import Routing, route

#: The six groups over which the paper averages the SVD entropy.
GROUPS = ("attention Q and O", "attention K and V", "experts", "shared experts", "router", "dense")
#: Layers of attention that make or take heads, by name: Hugging Face's, Megatron's, GPT-2's, the original Llama's.
_QUERY_OUTPUT = re.compile(r"^(linear_)?(q|o|out|wq|wo)(_a|_b|_down|_up)?(_proj)?$|^linear_proj$")
_KEY_VALUE = re.compile(r"^(linear_)?(k|v|kv|wk|wv)(_a|_b|_down|_up)?(_proj)?(_with_mqa)?$")
_FUSED = re.compile(r"qkv|c_attn|query_key_value|in_proj|w_pack")
_PART = re.compile(r"\[(?:\d+,)*(\d+)\]$")


def group_of(name: str) -> str:
    """The group of `GROUPS` that a matrix belongs to, by its name in Hugging Face's, Megatron's or DeepSpeed's style.

    Args:
        name: of a parameter, or of one of its matrices as `muon_plugin.core.routing` names them
            (``...linear_qkv.weight[0]`` is the query of a fused projection).

    Examples:
        >>> from muon_plugin.metrics import group_of
        >>> group_of("model.layers.0.self_attn.k_proj.weight")
        'attention K and V'
        >>> group_of("model.layers.3.mlp.experts.7.up_proj.weight")
        'experts'
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
    """Every matrix that Muon would have of a model; fused and batched ones are taken apart.

    Yields:
        The name of a matrix and the matrix, (rows, cols), of the parameter's dtype.

    Examples:
        >>> from torch import nn
        >>> from muon_plugin.metrics import matrices_of
        >>> model = nn.ModuleDict({"up": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "qkv": nn.Linear(16, 48)})
        >>> [(name, tuple(matrix.shape)) for name, matrix in matrices_of(model)]
        [('up.weight', (16, 8)), ('qkv.weight[0]', (16, 16)), ('qkv.weight[1]', (16, 16)), ('qkv.weight[2]', (16, 16))]
    """
    parameters = dict(model.named_parameters())
    yield from cut(parameters, route({name: tuple(p.shape) for name, p in parameters.items()}, model=model))


def cut(tensors: Mapping[str, Tensor], routing: Routing) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a routing, out of whole tensors; `matrices_of` does the same for a model.

    Args:
        tensors: the whole tensors by parameter name.
        routing: which matrices the parameters hold, as `muon_plugin.core.routing.route` finds them.

    Yields:
        The name of a matrix and the matrix, (rows, cols), of the tensor's dtype.

    Examples:
        >>> import torch
        >>> from muon_plugin.core.routing import route
        >>> from muon_plugin.metrics import cut
        >>> tensors = {"up.weight": torch.zeros(16, 8), "up.bias": torch.zeros(16)}
        >>> routing = route({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        >>> [(name, tuple(matrix.shape)) for name, matrix in cut(tensors, routing)]
        [('up.weight', (16, 8))]
    """
    for matrix in routing.matrices:
        flat = tensors[matrix.parameter].detach().reshape(-1)
        yield matrix.name, matrix.where.view(flat).reshape(matrix.rows, matrix.cols)
