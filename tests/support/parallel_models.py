"""Models for DeepSpeed's AutoTP, experts, pipelines and a client's mpu, with the gradients of integers.py."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.integers import build, gathered, gradient


class Block(nn.Module):
    """Rows and columns that divide by 2, one layer that nobody cuts, a fused projection, biases, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(10, 24)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)
        self.qkv = nn.Linear(24, 48, bias=False)
        self.router = nn.Linear(24, 6, bias=False)
        self.norm = nn.LayerNorm(24)

    def forward(self, step: int, micro: int, rank: int, world: int, gas: int) -> Tensor:
        from deepspeed.utils import groups

        parts, index = dist.get_world_size() // world, groups.get_tensor_model_parallel_rank() if self.cut else 0
        loss = torch.zeros(())
        assert parts == 1 or self.cut
        for number, (_, p) in enumerate(self.named_parameters()):
            whole = gradient(shape_of(p), number, step, micro, rank, world, gas)
            loss = loss + (p.float() * part_of(p, whole, index)).sum()
        return loss

    cut = False


def described(p: Any) -> Any:
    """DeepSpeed's own description of a parameter that AutoTP cut."""
    from deepspeed.checkpoint.affine import ParamAffineMap

    meta = getattr(p, "ds_autotp_universal_checkpoint_meta", None)
    return ParamAffineMap.from_dict(meta["conversion"]["affine_map"]) if meta else None


def shape_of(p: Tensor) -> tuple[int, ...]:
    return described(p).logical_shape if described(p) else tuple(p.shape)


def part_of(p: Tensor, whole: Tensor, index: int) -> Tensor:
    return described(p).extract(whole, index) if described(p) else whole


class Experts(nn.Module):
    """A router, four experts over `ep` ranks, and a dense layer."""

    def __init__(self, ep: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        torch.manual_seed(8)
        expert = nn.ModuleDict({"up": nn.Linear(16, 20), "down": nn.Linear(20, 16)})
        self.moe = MoE(16, expert, num_experts=4, ep_size=ep)
        self.dense = nn.Linear(16, 24)

    def forward(self, step: int) -> Tensor:
        loss = torch.zeros(())
        for name, p, group, scale in self.placed():
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            grad = gradient(p.shape, zlib.crc32(name.encode()), step, 0, rank, size, 1)
            loss = loss + (p.float() * grad * scale).sum()
        return loss

    def placed(self) -> Any:
        """(Name with the expert's number among all, parameter, its DP group, what DeepSpeed's averaging divides by)."""
        from deepspeed.utils import groups

        for name, p in self.named_parameters():
            if "deepspeed_experts" not in name:
                yield name, p, groups._get_data_parallel_group(), 1.0
                continue
            before, number, after = re.split(r"deepspeed_experts\.(\d+)", name)
            first = groups._get_expert_parallel_rank(p.group_name) * self.moe.num_local_experts
            group = groups._get_expert_data_parallel_group(p.group_name)
            scale = dist.get_world_size() / dist.get_world_size(group)
            yield f"{before}{first + int(number)}{after}", p, group, scale


def with_experts(rank: int, settings: dict[str, Any], ep: int, handed_over: bool = False) -> dict[str, Tensor]:
    """Five steps: the weights on this rank, experts by their number among all. (They start as copies of one.)

    Args:
        handed_over: the client builds the optimizer, with DeepSpeed's key for groups of experts.
    """
    model = Experts(ep)
    own = {}
    if handed_over:
        from deepspeed.moe.utils import is_moe_param

        from muon_plugin import Muon

        dense, experts = (
            [(name, p) for name, p in model.named_parameters() if is_moe_param(p) is of_experts]
            for of_experts in (False, True)
        )
        groups = [{"params": dense}, {"params": experts, "name": f"ep_size_{ep}", "moe": True}]
        own["optimizer"] = Muon(groups, model=model, **settings.pop("optimizer")["params"])
    engine = build(rank, settings, model, **own)
    if dist.get_world_size() > 1:
        table = engine.basic_optimizer.summary()
        assert re.search(rf"dense layers: Newton-Schulz a step: .*FLOP over {dist.get_world_size()} ranks", table)
        assert re.search(rf"ep_size_{ep}: Newton-Schulz a step: .*FLOP over {dist.get_world_size() // ep} rank", table)
    for step in range(5):
        engine.backward(engine(step))
        engine.step()
    return {name: p.detach().clone() for name, p, *_ in engine.module.placed()}


class Stage(nn.Module):
    """A layer of a pipeline: hands on the loss so far, and which step and micro-batch this is.

    The first has no matrix, the third nothing else.
    """

    def __init__(self, number: int, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.number = number
        if number == 0:
            self.embed = nn.Embedding(*shape)
        else:
            self.linear = nn.Linear(*shape, bias=number != 2)

    def forward(self, x: Tensor) -> Tensor:
        from deepspeed.utils import groups

        group = groups._get_data_parallel_group()
        step, micro = int(x[0, 1]), int(x[0, 2])
        total = x[0, 0]
        for number, p in enumerate(self.parameters()):
            grad = gradient(
                p.shape, 10 * self.number + number, step, micro, dist.get_rank(group), dist.get_world_size(group), 2
            )
            total = total + (p.float() * grad).sum()
        return torch.stack([total, x[0, 1], x[0, 2]]).view(1, 3)


def in_a_pipeline(rank: int, settings: dict[str, Any], stages: int) -> dict[str, Tensor]:
    """Five steps of two micro-batches: the weights of this rank's stage."""
    engine = _pipeline(rank, settings, stages)
    for step in range(5):
        _train_batch(engine, step)
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def norms_in_a_pipeline(rank: int, settings: dict[str, Any], stages: int) -> list[float]:
    """The gradient norms of two steps, and of one with inf in the gradients of the first stage."""
    engine = _pipeline(rank, settings, stages)
    found = []
    for step in range(2):
        _train_batch(engine, step)
        found.append(float(engine.get_global_grad_norm()))
    first = next(iter(engine.module.named_parameters()))[1]
    if engine.is_first_stage():
        first.register_hook(lambda grad: grad * float("inf"))
    _train_batch(engine, 2)
    assert engine.skipped_steps == 1
    return found


def _pipeline(rank: int, settings: dict[str, Any], stages: int) -> Any:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed("gloo")
    shapes = [(10, 16), (16, 24), (24, 20), (20, 33)]
    layers = [LayerSpec(Stage, number, *shape) for number, shape in enumerate(shapes)]
    model = PipelineModule(layers, num_stages=stages, loss_fn=lambda x, _: x[0, 0], partition_method="uniform")
    return build(rank, settings, model, model_parameters=list(model.parameters()))


def _train_batch(engine: Any, step: int) -> None:
    rows = [(torch.tensor([[0.0, step, micro]]).requires_grad_(), torch.zeros(1)) for micro in range(2)]
    engine.train_batch(iter(rows))


class NamedLikeHeads(nn.Module):
    """A block with the names of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.output = nn.Linear(8, 12), nn.Linear(12, 8)


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 40, bias=False)


def routed_in_a_pipeline(rank: int, settings: dict[str, Any]) -> dict[str, str]:
    """Of this rank's stage: parameter -> why AdamW trains it, "" for matrices; without vectors."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed("gloo")
    layers = [LayerSpec(nn.Embedding, 40, 8), torch.neg, LayerSpec(NamedLikeHeads)]
    layers += [LayerSpec(NamedLikeHeads), LayerSpec(Last), torch.neg]
    model = PipelineModule(layers, num_stages=2, loss_fn=nn.functional.cross_entropy, partition_method="uniform")
    engine = build(rank, settings, model, model_parameters=list(model.parameters()))
    routing = engine.basic_optimizer.routing
    return {name: routing.adamw.get(name, "") for name, shape in routing.shapes.items() if len(shape) > 1}


class Grid:
    """A client's mpu: TP ranks side by side, DP across; one in each part of the world. Collective over the world.

    Args:
        tp: number of TP ranks.
        parts: the ranks of each part; by default all ranks of the world are one. A rank that is in none has no groups.
    """

    def __init__(self, tp: int, parts: Sequence[Sequence[int]] = ()) -> None:
        parts = parts or [range(dist.get_world_size())]
        rows = [part[i : i + tp] for part in parts for i in range(0, len(part), tp)]
        columns = [part[i::tp] for part in parts for i in range(tp)]
        self.tp, self.dp = _own(rows), _own(columns)
        for kind, group in (("tensor_model", self.tp), ("model", self.tp), ("data", self.dp)):
            setattr(self, f"get_{kind}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{kind}_parallel_world_size", lambda group=group: dist.get_world_size(group))
            setattr(self, f"get_{kind}_parallel_rank", lambda group=group: dist.get_rank(group))


class Marked(nn.Module):
    """Parameters cut by hand and marked as Megatron marks them; gate and up side by side on each rank."""

    CUTS: ClassVar = {"up": (0, 1), "down": (1, 1), "gate_up_proj": (0, 2), "router": None}

    def __init__(self, rank: int, size: int, marked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.rank, self.size = rank, size
        for name, cut in self.CUTS.items():
            self.add_module(name, nn.Linear(24, 32, bias=False))
            weight = self.get_submodule(name).weight
            if cut is not None:
                weight.data = self.part(weight.data, cut).clone()
                if marked:
                    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, *cut

    def part(self, whole: Tensor, cut: tuple[int, int] | None) -> Tensor:
        if cut is None:
            return whole
        return torch.cat([half.chunk(self.size, cut[0])[self.rank] for half in whole.chunk(cut[1], cut[0])], cut[0])

    def forward(self, step: int, rank: int, world: int) -> Tensor:
        loss = torch.zeros(())
        for number, (name, p) in enumerate(self.named_parameters()):
            grad = gradient((32, 24), number, step, 0, rank, world, 1)
            loss = loss + (p.float() * self.part(grad, self.CUTS[name.split(".")[0]])).sum()
        return loss


def _own(parts: Sequence[Sequence[int]]) -> Any:
    """Makes a process group of each; returns this rank's."""
    made = [(dist.new_group(list(part)), part) for part in parts]
    return next((group for group, part in made if dist.get_rank() in part), None)


class RoutedMLP(nn.Module):
    """What DeepSpeed's AutoEP replaces: a router and a list of gated experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        parts = {"w1": (16, 20), "w2": (20, 16), "w3": (16, 20)}
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in parts.items()}) for _ in range(4)
        )


def of_integers(model: nn.Module, step: int) -> Tensor:
    """A loss with the gradients of integers.py, in the place of the model's forward."""
    from deepspeed.utils import groups

    loss = torch.zeros(())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        number = zlib.crc32(name.encode()) % 10**6
        if getattr(p, "allreduce", True):
            group = groups._get_data_parallel_group()
            grad = gradient(p.shape, number, step, 0, dist.get_rank(group), dist.get_world_size(group), 1)
        else:
            group = groups._get_expert_data_parallel_group(p.group_name)
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            first = first_expert(p)
            grads = [gradient(p.shape[1:], number + first + i, step, 0, rank, size, 1) for i in range(p.shape[0])]
            grad = torch.stack(grads) * (dist.get_world_size() / size)
        loss = loss + (p.float() * grad).sum()
    return loss


class ReplacedExperts(nn.Module):
    """A layer for AutoEP, and a dense one. AutoEP keeps this rank's experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.config = SimpleNamespace(num_local_experts=4, num_experts_per_tok=2, hidden_act="silu")
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": RoutedMLP(), "dense": nn.Linear(16, 24)})])

    def forward(self, step: int) -> Tensor:
        return of_integers(self, step)

    @staticmethod
    def patterns(ep: int) -> dict[str, Any]:
        """AutoEP's section in the JSON."""
        names = {"expert_pattern": "experts", "router_pattern": "gate", "num_experts_attr": "num_local_experts"}
        names |= {"expert_w1": "w1", "expert_w2": "w2", "expert_w3": "w3", "top_k_attr": "num_experts_per_tok"}
        return {
            "enabled": True,
            "autoep_size": ep,
            "moe_layer_pattern": r"layers\.\d+\.mlp",
            "use_grouped_mm": False,
            **names,
        }


def first_expert(p: Any) -> int:
    """The number of this rank's first expert among all."""
    from deepspeed.utils import groups

    return int(groups._get_expert_parallel_rank(p.group_name) * p.shape[0])


def build_replaced(rank: int, settings: dict[str, Any], ep: int, model: ReplacedExperts) -> Any:
    """An engine whose experts AutoEP has replaced."""
    import deepspeed

    engine = build(rank, {**settings, "expert_parallel": ReplacedExperts.patterns(ep)}, model)
    if engine.zero_optimization_stage() == 3:  # `build` registered those that AutoEP has replaced
        engine.module._external_params = {}
        for p in engine.module.parameters():
            deepspeed.zero.register_external_parameter(engine.module, p)
    return engine


def with_replaced_experts(
    rank: int, settings: dict[str, Any], ep: int, folder: Path | None, tag: str = "tag", first: int = 0, last: int = 4
) -> dict[str, Tensor]:
    """Steps `first` to `last`, in a `folder` with a save and a resume before the third: weights on this rank, experts
    by their number. From a `first` step on, what is in the folder is resumed; the last save stays there."""
    engine = build_replaced(rank, settings, ep, ReplacedExperts())
    if first:
        engine.load_checkpoint(str(folder), tag=tag)
    for step in range(first, last):
        if (step, first) == (2, 0) and folder is not None:
            engine.save_checkpoint(str(folder), tag="tag")
            engine = build_replaced(rank, settings, ep, ReplacedExperts())
            engine.load_checkpoint(str(folder), tag="tag")
        engine.backward(engine(step))
        engine.step()
    found = {}
    with gathered(engine.module):
        for name, p in engine.module.named_parameters():
            if getattr(p, "allreduce", True):
                found[name] = p.detach().clone()
            else:
                found |= {f"{name} {first_expert(p) + i}": expert.detach().clone() for i, expert in enumerate(p)}
    return found
