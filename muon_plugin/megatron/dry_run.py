"""Checks a launch line of Megatron and prints Muon's plan: no GPU, no processes, no data.

    python -m muon_plugin.megatron.dry_run --world-size 64 -- --num-layers 32 ... --optimizer muon ...

Every argument goes through the installed Megatron's own parser and checks, as on rank 0 of that many. Then the model is
built without memory, stage by stage, cut as Megatron's distributed optimizer would cut it, and planned. Exit code 2
for arguments that would not start.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ..layout import pieces
from ..plan import Plan, make_plan
from ..report import si
from . import on_cpu, register
from .arguments import asks_for_muon
from .routing import Parameter, parameters, route
from .settings import Settings
from .shards import cut_range

GPT2_VOCABULARY = 50257


def main() -> None:
    began = time.perf_counter()
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the job: nodes x GPUs")
    own = parser.parse_args(arguments[:cut])
    if own.world_size < 1:
        parser.error(f"--world-size {own.world_size}: allowed: 1 or more (nodes x GPUs a node)")
    on_cpu.install()
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.training") is None:
        parser.error(
            "megatron.training, which has Megatron's parser, is not there: put a Megatron-LM source tree of "
            "core_v0.19.0 on PYTHONPATH (MEGATRON_PATH for the launch scripts), or install megatron-core 0.19.2"
        )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(own.world_size)}
    gpu = SimpleNamespace(name="dry run", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    torch.cuda.get_device_properties = lambda *_: gpu  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (gpu.major, gpu.minor)
    try:
        args = checked(arguments[cut + 1 :])
        settings = Settings.from_config(args, args)
        from .engine import check_supported  # imports Megatron

        check_supported(args, args)
        print("\n".join([settings.describe(), *settings.notes, *assumptions(args)]))
        for stage in range(args.pipeline_model_parallel_size):
            report(stage, args, settings)
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        print(f"dry run: these arguments would not start: {error or failed_check(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"dry run: the arguments are good ({time.perf_counter() - began:.0f} s)")


def failed_check(error: Exception) -> str:
    """The source of a check of Megatron's that says nothing itself."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"


def assumptions(args: Any) -> list[str]:
    """What the plan does not know."""
    found = []
    if not (getattr(args, "padded_vocab_size", None) or args.vocab_size):
        found.append(f"plan: the tokenizer is not loaded; {GPT2_VOCABULARY} tokens are assumed (--vocab-size)")
    if getattr(args, "mtp_num_layers", None):
        found.append(f"plan: without the {args.mtp_num_layers} layers of --mtp-num-layers")
    if getattr(args, "spec", None):
        found.append(f"plan: of GPTModel's own layers, not of --spec {' '.join(args.spec)}")
    return found


def checked(arguments: Sequence[str]) -> Any:
    """Megatron's arguments, parsed and validated by Megatron.

    Raises:
        ValueError: if they do not ask for this Muon.
        SystemExit: 2, for an unknown argument.
    """
    register()
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = ["pretrain_gpt.py", *arguments]
    args = parse_args()
    if not asks_for_muon(args):
        raise ValueError("--optimizer muon and --use-distributed-optimizer are both needed for this Muon")
    printed = sys.stdout
    with open(os.devnull, "w") as sys.stdout:  # Megatron prints hundreds of lines
        try:
            validate_args(args)
        finally:
            sys.stdout = printed
    return args


def build_stage(stage: int, args: Any) -> list[Any]:
    """The model chunks of one pipeline stage, on the meta device, in a process group without processes."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training.arguments import core_transformer_config_from_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
    # Stages are the outermost of Megatron's dimensions: the first rank of this one.
    first = stage * args.world_size // args.pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=first, world_size=args.world_size)
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        create_gloo_process_groups=False,
    )
    config = core_transformer_config_from_args(plain(args))
    config.perform_initialization = False
    config.persist_layer_norm = False
    if config.multi_latent_attention:
        config.qk_layernorm = False  # Transformer Engine's; a vector of the latent's size a layer is not counted
    config.context_parallel_size = 1
    config.sequence_parallel = False
    chunks = []
    for chunk in range(args.virtual_pipeline_model_parallel_size or 1):
        vp = chunk if args.virtual_pipeline_model_parallel_size else None
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp)
        for layer in spec.layer_specs:  # attention itself has no parameters, and some kinds exist for GPUs only
            layer.submodules.self_attention.submodules.core_attention = IdentityOp
        ends = {"ignore_virtual": False, "vp_stage": vp}
        with torch.device("meta"):
            chunks.append(
                GPTModel(
                    config,
                    spec,
                    vocabulary(args),
                    args.max_position_embeddings,
                    pre_process=mpu.is_pipeline_first_stage(**ends),
                    post_process=mpu.is_pipeline_last_stage(**ends),
                    share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                    position_embedding_type=args.position_embedding_type,
                    vp_stage=vp,
                )
            )
    return chunks


def vocabulary(args: Any) -> int:
    """Its size as Megatron pads it; GPT-2's where the tokenizer would tell and is not loaded."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    size = getattr(args, "padded_vocab_size", None) or args.vocab_size or GPT2_VOCABULARY
    return -(-size // multiple) * multiple


def plain(args: Any) -> Any:
    """The arguments without what needs a GPU to be built and leaves the shapes as they are."""
    args = copy.copy(args)
    args.use_cpu_initialization = True
    args.transformer_impl = "local"
    args.moe_grouped_gemm = False
    args.tp_comm_overlap = False
    args.fp8 = None
    for name in vars(args):
        if name.endswith("_fusion"):
            setattr(args, name, False)
    return args


def held(chunks: Sequence[Any], args: Any, experts: bool) -> tuple[int, Iterator[list[tuple[int, int, int]]]]:
    """(DP size, for each DP rank what it holds of the TP-local parameters: id, start, end), as Megatron cuts them."""
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not hasattr(DistributedOptimizer, "compute_full_param_layout"):
        raise RuntimeError("the plan of a dry run needs Megatron-Core 0.19: 0.16 cuts only what is really there")
    partial = {"with_context_parallel": True, "partial_data_parallel": True}
    dense_size = mpu.get_data_parallel_group(**partial).size()
    expert_size = mpu.get_expert_data_parallel_group(partial_expert_data_parallel=True).size()
    bucket = max(40_000_000, 1_000_000 * dense_size) if args.overlap_grad_reduce else None
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    size = expert_size if experts else dense_size
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(size)]
    for chunk in chunks:
        layout = DistributedOptimizer.compute_full_param_layout(
            list(chunk.parameters()), bucket, dense_size, ddp, expert_data_parallel_world_size=expert_size
        )
        for key, buffer in layout.layouts.items():
            if key.is_expert_parallel is not experts:
                continue
            for p, (start, end, number) in buffer.param_index_map.items():
                begin, finish = buffer.bucket_indices[number]
                part = (finish - begin) // size
                for rank in range((start - begin) // part, min(size - 1, (end - 1 - begin) // part) + 1):
                    low, high = begin + rank * part, begin + (rank + 1) * part
                    found[rank].append((id(p), max(start, low) - start, min(end, high) - start))
    return size, iter(found)


def report(stage: int, args: Any, settings: Settings) -> None:
    """Prints what one pipeline stage holds, computes and sends."""
    chunks = build_stage(stage, args)
    tp, expert_tp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    everything = parameters(chunks, tp, expert_tp)
    routing = route(everything, chunks, settings.split_qkv)
    muon = {matrix.parameter for matrix in routing.matrices}
    print(
        f"stage {stage}: {len(everything)} parameters, {len(muon)} of them for Muon, {len(routing.matrices)} matrices"
    )
    for experts in (False, True):
        of_tensor = {id(p.tensor): p for p in everything if (not getattr(p.tensor, "allreduce", True)) is experts}
        if not of_tensor:
            continue
        ranks, plan, state = planned(chunks, args, settings, routing.matrices, of_tensor, muon, experts)
        kind = "experts" if experts else "dense"
        muon_bytes, adamw_bytes = (max(sizes) for sizes in zip(*state))
        print(
            f"  {kind}: {ranks} ranks share them; Newton-Schulz {si(sum(plan.flops))}FLOP a step, the busiest rank "
            f"{plan.balance:.2f} of the mean\n"
            f"  {kind}: {si(sum(plan.bytes_sent))}B sent a step, {si(max(plan.bytes_sent))}B by the busiest rank; "
            f"state at most {si(muon_bytes)}B a rank (AdamW: {si(adamw_bytes)}B)"
        )


def planned(
    chunks: Sequence[Any],
    args: Any,
    settings: Settings,
    matrices: Sequence[Any],
    of_tensor: dict[int, Parameter],
    muon: set[str],
    experts: bool,
) -> tuple[int, Plan, list[tuple[int, int]]]:
    """(Ranks, the plan of one DistributedOptimizer, state bytes of each rank under Muon and under AdamW)."""
    mine = [m for m in matrices if m.parameter in {p.name for p in of_tensor.values()}]
    nothing = torch.empty(0)
    size = max((p.size for p in of_tensor.values()), default=1)
    _, ranks = held(chunks, args, experts)
    index: list[Any] = []
    state = []
    for of_rank in ranks:
        for tp_rank in range(size):
            shards = [
                shard
                for key, start, end in of_rank
                if of_tensor[key].name in muon
                for shard in cut_range(of_tensor[key], tp_rank, start, end, nothing)
            ]
            index.append([(piece.matrix, piece.inside) for piece in pieces(mine, shards, {id(nothing): 0})])
            sizes = [(end - start, of_tensor[key].name in muon) for key, start, end in of_rank]
            state.append((sum(n * (4 if matrix else 8) for n, matrix in sizes), sum(8 * n for n, _ in sizes)))
    return len(index), make_plan(mine, index, settings.newton_schulz.flops), state


if __name__ == "__main__":
    main()
