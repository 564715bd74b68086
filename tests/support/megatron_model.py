"""Megatron's real GPTModel with the gradients of integers.py: no forward is run, only what follows backward.

On the CPU under `on_cpu`, else on a GPU.

Weights and gradients are drawn for whole parameters, by name, and cut as the layout asks: so all layouts train the
same model, and what they end in must not differ by a bit.
"""

from __future__ import annotations

import gc
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.integers import STEPS, gradient

VOCAB, SEQUENCE = 64, 16


@dataclass(frozen=True)
class Layout:
    """How a run is cut, in Megatron's words; what is left over of the ranks is data parallel."""

    model: str = "dense"
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    instances: int = 1
    dtype: str = "bf16"
    grad_reduce_in_fp32: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None
    tied: bool = False
    predicted: int | None = None  # further tokens (multi-token prediction)
    fp8: str | None = None  # the recipe of weights in fp8, with Transformer Engine's layers, on a GPU
    muon: dict[str, Any] = field(default_factory=dict, hash=False)
    ddp: dict[str, Any] = field(default_factory=dict, hash=False)


def _config(layout: Layout) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    half = {"bf16": {"bf16": True}, "fp16": {"fp16": True}, "fp32": {}}[layout.dtype]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[layout.dtype]
    options: dict[str, Any] = dict(
        num_layers=4,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=6,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp or layout.tp,
        mtp_num_layers=layout.predicted,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **half,
    )
    swiglu = {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
    }
    kinds: dict[str, dict[str, Any]] = {
        "dense": swiglu,
        "few_groups": {**swiglu, "num_query_groups": 2},
        "gelu": {"num_query_groups": 8},
        "gated_attention": {**swiglu, "attention_output_gate": True},
        "moe": {
            **swiglu,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 20,
            "moe_shared_expert_intermediate_size": 20,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_topk": 2,
        },
    }
    if layout.fp8:  # sizes in whole blocks
        options |= {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2}
        options |= {"kv_channels": 32, "fp8": "hybrid", "fp8_recipe": layout.fp8, "fp8_param": True}
    if layout.model not in kinds:
        return _latent(options | swiglu, low_rank=layout.model == "latent")
    return TransformerConfig(**(options | kinds[layout.model]))


def _latent(options: dict[str, Any], low_rank: bool) -> Any:
    """Multi-head latent attention, with or without a low rank of the query."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    sizes = {"kv_lora_rank": 10, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
    mla = {"multi_latent_attention": True, "q_lora_rank": 14 if low_rank else None, "rope_type": "rope", **sizes}
    return MLATransformerConfig(
        **{k: v for k, v in options.items() if k not in ("num_query_groups", "kv_channels")}, **mla
    )


def parallel(layout: Layout) -> None:
    """Megatron's process groups for this layout, in place of those before, unless these are of the same sizes."""
    from megatron.core import parallel_state

    sizes = layout.tp, layout.pp, layout.vp, layout.cp, layout.ep, layout.etp or layout.tp, layout.instances
    kept = not layout.vp and parallel_state.model_parallel_is_initialized()  # vp: its number changes in a forward
    if kept and getattr(parallel_state, "_sizes", None) == sizes:
        return
    parallel_state._sizes = sizes
    parallel_state.destroy_model_parallel()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):  # hundreds of gloo's threads would pile up
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp or layout.tp,
        num_distributed_optimizer_instances=layout.instances,
    )


def build(layout: Layout, freeze: str | None = None) -> list[Any]:
    """This rank's model chunks in Megatron's DistributedDataParallel, filled by name.

    What has `freeze` in its name is frozen: all with "".
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.module import Float16Module

    parallel(layout)
    config = _config(layout)
    chunks: list[Any] = []
    for stage in range(layout.vp or 1):
        vp = stage if layout.vp else None
        ends = {"ignore_virtual": False, "vp_stage": vp}
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=layout.fp8 is not None, vp_stage=vp)
        if layout.model.startswith("latent"):  # the local attention itself does not take its widths, and has no weights
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = IdentityOp
        predicts = get_gpt_mtp_block_spec(config, spec, False, vp_stage=vp) if layout.predicted else None
        model = GPTModel(
            config,
            spec,
            VOCAB,
            SEQUENCE,
            pre_process=mpu.is_pipeline_first_stage(**ends),
            post_process=mpu.is_pipeline_last_stage(**ends),
            share_embeddings_and_output_weights=layout.tied,
            position_embedding_type="learned_absolute" if layout.model == "gelu" else "rope",
            mtp_block_spec=predicts,
            vp_stage=vp,
        )
        model.cuda()
        fill(model, layout)
        for name, p in model.named_parameters():
            p.requires_grad_(freeze is None or freeze not in name)
        if layout.dtype != "fp32":
            model = Float16Module(config, model)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=layout.grad_reduce_in_fp32,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
            bucket_size=layout.bucket_size,
            num_distributed_optimizer_instances=layout.instances,
            **layout.ddp,
        )
        extra = {}
        if hasattr(DistributedOptimizer, "compute_full_param_layout"):  # 0.19.2 wants the cut beforehand
            extra["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
                [p for p in model.parameters() if p.requires_grad],
                layout.bucket_size,
                mpu.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True).size(),
                ddp,
                expert_data_parallel_world_size=mpu.get_expert_data_parallel_group(
                    partial_expert_data_parallel=True
                ).size(),
            )
        disable = {"disable_bucketing": stage > 0 or layout.bucket_size is None}
        chunks.append(DistributedDataParallel(config=config, ddp_config=ddp, module=model, **disable, **extra))
    return chunks


def config_for(layout: Layout, **options: Any) -> Any:
    """Megatron's OptimizerConfig for Muon under the distributed optimizer, without clipping (its norm rounds)."""
    from megatron.core.optimizer import OptimizerConfig

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[layout.dtype]
    values: dict[str, Any] = {
        "optimizer": "muon",
        "lr": 0.01,
        "min_lr": 0.01,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "clip_grad": 0.0,
        "use_distributed_optimizer": True,
        "bf16": layout.dtype == "bf16",
        "fp16": layout.dtype == "fp16",
        "initial_loss_scale": 16.0,
        "params_dtype": dtype,
        "overlap_param_gather": layout.overlap_param_gather,
        **layout.muon,
        **options,
    }
    known = set(OptimizerConfig.__dataclass_fields__)
    config = OptimizerConfig(**{key: value for key, value in values.items() if key in known})
    for key in set(values) - known:  # a release that lacks the field; the plugin reads it all the same
        setattr(config, key, values[key])
    return config


def optimizer_for(chunks: list[Any], layout: Layout, **options: Any) -> Any:
    """Megatron's optimizer with Muon registered."""
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.optimizer import get_megatron_optimizer

    return get_megatron_optimizer(config_for(layout, **options), chunks)


def named(chunks: list[Any]) -> list[tuple[str, Any, Any]]:
    """(Name that is the same in every layout, parameter, module)."""
    for chunk in chunks:
        if "_named" not in chunk.__dict__:  # once: it is asked for several times a step
            chunk.__dict__["_named"] = _named(chunk)
    return [found for chunk in chunks for found in chunk.__dict__["_named"]]


def _named(chunk: Any) -> list[tuple[str, Any, Any]]:
    from megatron.core import parallel_state as mpu

    modules = dict(chunk.named_modules())
    numbers = {
        path: module.layer_number - 1
        for path, module in modules.items()
        if hasattr(module, "layer_number") and path.rpartition(".")[2].isdigit()
    }
    found = []
    for path, module in modules.items():
        for leaf, p in module.named_parameters(recurse=False):
            parts, prefix, out = f"{path}.{leaf}".split("."), "", []
            for part in parts:
                prefix = f"{prefix}.{part}" if prefix else part
                if prefix in numbers:
                    part = str(numbers[prefix])
                elif out and out[-1] == "local_experts":
                    local = len(modules[prefix.rpartition(".")[0]])
                    part = str(mpu.get_expert_model_parallel_rank() * local + int(part))
                out.append(part)
            while out[0] == "module":
                out.pop(0)
            found.append((".".join(out), p, module))
    return found


def tp_cut(name: str, p: Any, module: Any) -> tuple[int | None, int, int, int]:
    """(Dimension that TP cuts or None, stride, this rank in TP, its size)."""
    from megatron.core import parallel_state as mpu

    expert = ".experts." in name
    size = mpu.get_expert_tensor_parallel_world_size() if expert else mpu.get_tensor_model_parallel_world_size()
    rank = mpu.get_expert_tensor_parallel_rank() if expert else mpu.get_tensor_model_parallel_rank()
    dim = p.partition_dim if getattr(p, "tensor_model_parallel", False) else None
    gated = "linear_fc1" in name and module.config.gated_linear_unit
    return dim, 2 if gated else 1, rank, size


def part_of(whole: Tensor, dim: int | None, stride: int, rank: int, size: int) -> Tensor:
    """What TP rank `rank` holds."""
    if dim is None:
        return whole
    return torch.cat([part.chunk(size, dim)[rank] for part in whole.chunk(stride, dim)], dim)


def whole_of(parts: list[Tensor], dim: int | None, stride: int) -> Tensor:
    """TP ranks' parts put together."""
    if dim is None:
        return parts[0]
    chunks = [part.chunk(stride, dim) for part in parts]
    return torch.cat([torch.cat([mine[i] for mine in chunks], dim) for i in range(stride)], dim)


def _whole_shape(p: Any, dim: int | None, size: int) -> tuple[int, ...]:
    return tuple(n * size if d == dim else n for d, n in enumerate(p.shape))


def _tied(name: str, layout: Layout) -> str:
    return "embedding.word_embeddings.weight" if layout.tied and name == "output_layer.weight" else name


@torch.no_grad()
def fill(model: Any, layout: Layout) -> None:
    for name, p, module in named([model]):
        dim, stride, rank, size = tp_cut(name, p, module)
        generator = torch.Generator().manual_seed(zlib.crc32(_tied(name, layout).encode()))
        whole = torch.randn(_whole_shape(p, dim, size), generator=generator) * 0.1
        p.copy_(part_of(whole, dim, stride, rank, size))


@torch.no_grad()
def set_gradients(chunks: list[Any], layout: Layout, step: int, scale: float = 1.0) -> None:
    """As if backward had run: small integers in the gradient buffers, reduced by Megatron."""
    from megatron.core import parallel_state as mpu

    dense = mpu.get_data_parallel_group(with_context_parallel=True)
    experts = mpu.get_expert_data_parallel_group()
    for chunk in chunks:
        chunk.zero_grad_buffer()
    for name, p, module in named(chunks):
        if not p.requires_grad:
            continue
        dim, stride, rank, size = tp_cut(name, p, module)
        group = dense if getattr(p, "allreduce", True) else experts
        number = zlib.crc32(_tied(name, layout).encode())
        shape = _whole_shape(p, dim, size)
        whole = gradient(shape, number, step, 0, group.rank(), group.size(), 1)
        # Megatron divides by the dense DP size: the gradients of an expert come from more ranks than hold it.
        whole *= scale * dense.size() / group.size()
        p.main_grad.copy_(part_of(whole, dim, stride, rank, size))
    for chunk in chunks:
        chunk.finish_grad_sync()


def step(chunks: list[Any], optimizer: Any, layout: Layout, number: int) -> Any:
    scale = float(optimizer.get_loss_scale()) if layout.dtype == "fp16" else 1.0
    set_gradients(chunks, layout, number, scale)
    done = optimizer.step()
    if layout.overlap_param_gather:  # otherwise the next forward would gather
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
    return done


def full_weights(chunks: list[Any], layout: Layout) -> dict[str, Tensor]:
    """Every parameter whole, by name, on every rank."""
    mine = {}
    for name, p, module in named(chunks):
        dim, stride, rank, size = tp_cut(name, p, module)
        mine[name] = (rank, size, dim, stride, p.detach().to("cpu", torch.float32, copy=True).numpy())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)  # arrays, as a tensor costs ten times as much to pickle
    found: dict[str, dict[int, Any]] = {}
    for theirs in everyone:
        for name, (rank, size, dim, stride, array) in theirs.items():
            part = torch.from_numpy(array)
            held = found.setdefault(name, {}).setdefault(rank, (part, size, dim, stride))
            assert torch.equal(held[0], part), f"replicas of {name} differ"
    weights = {}
    for name, parts in found.items():
        _, size, dim, stride = parts[0]
        weights[name] = whole_of([parts[r][0] for r in range(size)] if dim is not None else [parts[0][0]], dim, stride)
    if layout.tied and "output_layer.weight" in weights:
        assert torch.equal(weights.pop("output_layer.weight"), weights["embedding.word_embeddings.weight"])
    return weights


def full_masters(chunks: list[Any], optimizer: Any, layout: Layout) -> dict[str, Tensor]:
    """The fp32 main parameters of the distributed optimizer, written over the model's, then gathered."""
    mains = [
        (part, model, part._get_main_param_and_optimizer_states(model)["param"].detach().clone())
        for part in optimizer.chained_optimizers
        if not part.is_stub_optimizer
        for model in part.model_param_group_index_map
    ]
    saved = [(p, p.data) for _, p, _ in named(chunks)]
    from megatron.core import parallel_state as mpu

    for _, p, _ in named(chunks):
        p.data = torch.zeros(p.shape, device=p.device)
    for part, model, main in mains:
        held = part._get_model_param_range_map(model)["param"]
        model.data.view(-1)[held.start : held.end] = main.detach()
    for _name, p, _ in named(chunks):
        expert = not getattr(p, "allreduce", True)
        group = (
            mpu.get_expert_data_parallel_group(partial_expert_data_parallel=True)
            if expert
            else mpu.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
        )
        dist.all_reduce(p.data, group=group)
    found = full_weights(chunks, layout)
    for p, data in saved:
        p.data = data
    return {f"{name} (fp32)": value for name, value in found.items()}


def trained(rank: int, layout: Layout, steps: int = STEPS, **options: Any) -> dict[str, Tensor]:
    """Steps from scratch: the whole weights, and the fp32 masters, that they end in."""
    chunks = build(layout)
    optimizer = optimizer_for(chunks, layout, **options)
    for number in range(steps):
        step(chunks, optimizer, layout, number)
    return full_weights(chunks, layout) | full_masters(chunks, optimizer, layout)
