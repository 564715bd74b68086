"""Which of Megatron's parameters are matrices, which matrices a fused one holds, and how TP cuts it.

Megatron's own rule: two-dimensional, and not an embedding or the output layer. Its modules' configs say what is fused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.cutting import Rule, Stored, cut
from ..core.heads import Heads
from ..core.layout import Matrix, Partition
from ..core.routing import Routing, kept_whole, not_cut_by_head
from .heads import OTHERS, heads_of

#: Layers whose outputs are gate, then up, in models with gated units.
GATED = ("linear_fc1", "experts.weight1")
#: Projections of several parts that TP cuts one by one; 0.19 says their sizes, for checkpoints. (Mamba: gate, hidden
#: states, B, C and time steps.)
PACKED = ("in_proj",)


@dataclass(frozen=True)
class Parameter:
    """One parameter as Megatron holds it on this rank.

    Attributes:
        tensor: this rank's part.
        partition: its name, without the wrappers' prefixes (with the model chunk's number where there are several), and
            how tensor parallelism partitions it. The shape is (rows, cols), or (batch, rows, cols) for grouped experts.
        transposed: stored (in, out).
    """

    tensor: Tensor
    partition: Partition
    transposed: bool = False

    @property
    def name(self) -> str:
        return self.partition.name


def parameters(chunks: Sequence[nn.Module], tp: int, expert_tp: int) -> list[Parameter]:
    """All trainable parameters of this rank's model chunks, in Megatron's order.

    Args:
        chunks: the model chunks, wrapped or not.
        tp, expert_tp: sizes of the tensor parallel groups of the dense layers and of the experts.
    """
    found = []
    for number, chunk in enumerate(chunks):
        prefix = f"chunk{number}." if len(chunks) > 1 else ""
        for path, module, config in modules_of(chunk):
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad:
                    found.append(_parameter(f"{prefix}{path}.{name}", p, module, config, tp, expert_tp))
    unique = {id(p.tensor): p for p in reversed(found)}  # tied: the first name
    return [p for p in found if unique[id(p.tensor)] is p]


def frozen_parameters(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Name -> parameter, of those that are frozen now."""
    frozen: dict[str, Tensor] = {}
    for number, chunk in enumerate(chunks):
        prefix = f"chunk{number}." if len(chunks) > 1 else ""
        for path, module, _ in modules_of(chunk):
            for name, p in module.named_parameters(recurse=False):
                if not p.requires_grad:
                    frozen[f"{prefix}{path}.{name}"] = p
    return frozen


def modules_of(chunk: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(Path without wrappers, module, the config nearest above it)."""
    configs: dict[str, Any] = {}
    for path, module in chunk.named_modules():
        config = getattr(module, "config", None) or configs.get(path.rpartition(".")[0] if path else "")
        configs[path] = config
        parts = path.split(".")
        while parts and parts[0] == "module":
            parts.pop(0)
        yield ".".join(parts), module, config


def is_expert(name: str) -> bool:
    """Whether the parameter belongs to the routed experts (their TP is the expert TP)."""
    return "experts" in name.split(".")


def _owner(name: str) -> str:
    """The layer that a parameter is the weight of; of the legacy grouped experts, which one of the two."""
    *path, leaf = name.split(".")
    owner = path[-1] if path else ""
    return f"{owner}.{leaf}" if owner == "experts" else owner


def _parameter(name: str, p: Any, module: Any, config: Any, tp: int, expert_tp: int) -> Parameter:
    size = expert_tp if is_expert(name) else tp
    owner, leaf = _owner(name), name.rpartition(".")[2]
    gated = bool(getattr(config, "gated_linear_unit", False))
    if owner in ("experts.weight1", "experts.weight2"):
        # The legacy grouped experts: (hidden, experts x outputs), read as (experts, hidden, outputs).
        batch, hidden = int(module.num_local_experts), int(config.hidden_size)
        others = p.numel() // (batch * hidden) * size
        if leaf == "weight1":
            partition = Partition.of(name, (batch, hidden, others), 2, size, 2 if gated else 1)
        else:
            partition = Partition.of(name, (batch, others, hidden), 1, size)
        return Parameter(p, partition, transposed=True)
    batch = p.dim() - (1 if leaf.startswith("bias") else 2) if is_expert(name) else 0  # of grouped experts
    dim, stride = None, 1
    if getattr(p, "tensor_model_parallel", False) and getattr(p, "partition_dim", -1) in range(p.dim() - batch):
        dim, stride = p.partition_dim, getattr(p, "partition_stride", 1)
    if is_expert(name) and owner in ("linear_fc1", "linear_fc2"):
        dim = int(owner == "linear_fc2")  # not every release marks them
        dim = dim if dim < p.dim() - batch else None  # TP adds up linear_fc2's outputs before its bias
    elif getattr(module, "parallel_mode", "") is None:
        # Transformer Engine marks what it repeats on every TP rank as cut, and 0.16.1 leaves that.
        dim, stride = None, 1
    if owner == "linear_fc1":
        # Each rank holds its part of gate, then of up, whatever is marked; or blocks of gate and up in turn.
        stride = 2 if gated and not _interleaved(name, config) else 1
    shape = list(p.shape)
    if dim is not None:
        dim += batch
        shape[dim] *= size
    return Parameter(p, Partition.of(name, shape, dim, size, stride))


def route(
    found: Sequence[Parameter],
    chunks: Sequence[nn.Module],
    split_qkv: bool = True,
    overridden: Collection[int] = (),
    per_head: bool = False,
) -> Routing:
    """Decides for every parameter.

    Args:
        found: what `parameters` found.
        chunks: the same model chunks.
        split_qkv: take attention's fused projections apart (``--muon-no-split-qkv``: don't).
        overridden: ids of parameters that the client sends to AdamW.
        per_head: whether each head of query, key and value is a matrix (``--muon-split-qkv-per-head``).

    Raises:
        ValueError: for a fused projection whose shape is not what the model's config says.
    """
    configs = {
        id(p): config
        for chunk in chunks
        for _, module, config in modules_of(chunk)
        for p in module.parameters(recurse=False)
    }
    embeddings = {
        id(p)
        for chunk in chunks
        for module in chunk.modules()
        if "Embedding" in type(module).__name__
        for p in module.parameters(recurse=False)
    }
    matrices: list[Matrix] = []
    adamw: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    whole: list[str] = []
    by_head: dict[str, Heads] = {}
    not_by_head: dict[str, str] = {}
    for parameter in found:
        shape = shapes[parameter.name] = parameter.partition.shape
        why = _not_a_matrix(parameter, id(parameter.tensor) in embeddings)
        if why is None and id(parameter.tensor) in overridden:
            why = "config_overrides"
        if why is not None:
            adamw[parameter.name] = why
            continue
        *batch, rows, cols = shape
        outputs = cols if parameter.transposed else rows
        owner, config = _owner(parameter.name), configs[id(parameter.tensor)]
        rule = _rule(parameter, outputs, config, split_qkv)
        heads = heads_of(owner, config) if per_head else None
        if heads is not None:
            by_head[parameter.name], rule = heads, heads.by_head
        elif per_head and owner in OTHERS:
            not_by_head[parameter.name] = OTHERS[owner]
        matrices += cut(parameter.name, Stored(math.prod(batch), rows, cols, parameter.transposed), rule)
        if owner in PACKED and len(rule.sizes) == 1:
            whole.append(parameter.name)
    notes = kept_whole("Megatron-Core does not say where its parts are", whole)
    notes += not_cut_by_head(not_by_head)
    return Routing(tuple(matrices), adamw, shapes, tuple(notes), by_head, not_by_head)


def _interleaved(name: str, config: Any) -> int:
    """The rows of gate, then of up, that take turns in an expert's linear_fc1; 0 where gate comes before up."""
    kind = "moe_mlp" if is_expert(name) else "moe_shared_expert" if "shared_experts" in name.split(".") else ""
    return getattr(config, f"{kind}_glu_interleave_size", None) or 0


def _not_a_matrix(parameter: Parameter, embedding: bool) -> str | None:
    p, name, shape = parameter.tensor, parameter.name, parameter.partition.shape
    if name.rpartition(".")[2].startswith("bias"):
        return "a bias"
    if len(shape) < 2 or min(shape[-2:]) == 1:
        return "a vector"
    if getattr(p, "is_embedding_or_output_parameter", False) or "output_layer" in name.split("."):
        return "embedding or output head"
    if embedding:  # learned positions, and copies that Megatron does not mark
        return "embedding"
    if p.dim() > 2 and not is_expert(name):
        return f"{p.dim()} dimensions"
    return None


def _rule(parameter: Parameter, outputs: int, config: Any, split_qkv: bool) -> Rule:
    """How the outputs of a fused projection are cut, from the config of the model that it is in."""
    owner = _owner(parameter.name)
    size = _interleaved(parameter.name, config) if owner == "linear_fc1" else 0
    if size:
        return _checked(parameter, outputs, Rule((size, size), outputs // (2 * size)))
    sizes = getattr(parameter.tensor, "partition_sizes", None) if owner in PACKED else None
    if sizes:  # of each TP rank's part
        return _checked(parameter, outputs, Rule(tuple(sizes), outputs // sum(sizes)))
    rule = _fused(owner, outputs, config) if split_qkv or owner in GATED else None
    return _checked(parameter, outputs, rule or Rule((outputs,)))


def _checked(parameter: Parameter, outputs: int, rule: Rule) -> Rule:
    if sum(rule.sizes) * rule.groups != outputs or not all(rule.sizes):
        fused = "Please report it with the arguments"  # gate and up are separate whatever the flags say
        if _owner(parameter.name) not in GATED:
            fused = "Its projections can stay fused with --muon-no-split-qkv"
        raise ValueError(
            f"{parameter.name} has {outputs} outputs, but the model's config says {rule.groups} x {list(rule.sizes)}: "
            f"muon_plugin does not know this layer. {fused}"
        )
    return rule


def _fused(owner: str, outputs: int, config: Any) -> Rule | None:
    if owner in GATED:
        return Rule((outputs // 2,) * 2) if getattr(config, "gated_linear_unit", False) else None
    heads = heads_of(owner, config)
    if heads is not None:
        return heads.by_role
    if not getattr(config, "multi_latent_attention", False):
        return None
    latent, rope = config.kv_lora_rank, config.qk_pos_emb_head_dim
    # DeepSeek's names: W_DQ, W_DKV, W_KR.
    rules: Mapping[str, Rule] = {
        "linear_kv_down_proj": Rule((latent, rope)),
        "linear_qkv_down_proj": Rule((config.q_lora_rank or 0, latent, rope)),
    }
    return rules.get(owner)
