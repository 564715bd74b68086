"""Checks a Megatron launch line and builds each pipeline stage's model, without a GPU and without processes.

Every argument goes through the installed Megatron's own parser and checks, as on rank 0 of a job of that size. The
model is built on the meta device, stage by stage, and sharded as Megatron's distributed optimizer would shard it. Run
this in a process of its own: it patches torch.cuda so that Megatron runs on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..deepspeed.cuts import Span
from ..megatron import on_cpu, register
from ..megatron.arguments import asks_for_muon
from ..megatron.refusals import check_supported
from ..megatron.routing import Parameter, parameters, route
from ..megatron.settings import Settings
from .calls import StageModel

GPT2_VOCABULARY = 50257
#: What Megatron's parser says of arguments that it does not know.
UNKNOWN = "unrecognized arguments: "
#: Arguments of other models than GPTModel (Mamba and hybrid ones).
OTHER_MODELS = ("hybrid_layer_pattern", "hybrid_override_pattern")


@dataclass(frozen=True)
class Buffers:
    """What one distributed optimizer cuts.

    Attributes:
        experts: the routed experts, or everything else.
        parameters: numbers of the stage's parameters in it.
        held: for each DP rank, what it holds of these parameters (counted as in `parameters`) as a TP rank has them.
    """

    experts: bool
    parameters: tuple[int, ...]
    held: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True)
class BuiltStage(StageModel):
    """A stage whose model chunks were built.

    Attributes:
        buffers: for a number of ranks of the job, the cut of Megatron's distributed optimizers.
    """

    buffers: Callable[[int], list[Buffers]]


class BufferLayout(Protocol):
    """What is read of Megatron's description of one buffer.

    Attributes:
        param_index_map: parameter -> (first element, last element, bucket) in the buffer; the last is exclusive.
        bucket_indices: (first element, last element) of each bucket, padding included.
    """

    param_index_map: Mapping[Any, tuple[int, int, int]]
    bucket_indices: Sequence[tuple[int, int]]


def load(arguments: Sequence[str], world_size: int, strict: bool = False) -> tuple[Any, Settings]:
    """Megatron's arguments, parsed and validated by Megatron for so many ranks, and Muon's settings.

    Args:
        arguments: without the program's name.
        world_size: ranks of the job.
        strict: whether an argument that Megatron does not know is an error, as when the job starts; otherwise it is
            named in a note and left out, as a fork's are.

    Raises:
        ValueError: if Megatron's parser cannot be imported, or the arguments are invalid.
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.training") is None:
        raise ValueError(
            "megatron.training, which has Megatron's parser, cannot be imported: put a Megatron-LM source tree of "
            "core_v0.19.0 on PYTHONPATH (MEGATRON_PATH for the launch scripts), or install megatron-core 0.19.2"
        )
    with _without_compiling():
        on_cpu.install()
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
        gpu = SimpleNamespace(name="dry run", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
        torch.cuda.get_device_properties = lambda *_: gpu  # type: ignore[assignment]
        torch.cuda.get_device_capability = lambda *_: (gpu.major, gpu.minor)
        register()
        logging.getLogger("megatron").setLevel("ERROR")
        try:
            args = _checked(arguments, strict)
            check_supported(args, args)
            return args, Settings.from_config(args, args, bool(args.fp8_param_gather))
        except (ValueError, AssertionError, RuntimeError, ZeroDivisionError, TypeError) as error:
            raise ValueError(f"invalid Megatron arguments: {error or _failed_check(error)}") from error


class _without_compiling:
    """Megatron marks functions with torch.compile when it is imported, which takes seconds; none of them runs here."""

    def __enter__(self) -> None:
        self.compile = torch.compile
        torch.compile = lambda model=None, **_: model if model is not None else lambda function: function  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        torch.compile = self.compile


def _failed_check(error: Exception) -> str:
    """The source line of a Megatron check that fails without a message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"


def _checked(arguments: Sequence[str], strict: bool) -> Any:
    from megatron.training.arguments import parse_args, validate_args

    sys.argv = ["pretrain_gpt.py", *arguments]
    unknown = ""
    try:
        args = _parsed(parse_args)
    except ValueError as error:
        if strict or not str(error).startswith(UNKNOWN) or "--muon-" in str(error):  # a slip in one of ours
            raise
        args, unknown = _parsed(partial(parse_args, ignore_unknown_args=True)), str(error).removeprefix(UNKNOWN)
    args.unknown_arguments = unknown
    for name in OTHER_MODELS:
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: the planner builds GPTModel, whose layers are "
                "attention and MLP; allowed: --shapes, with the names and shapes of another model"
            )
    if not asks_for_muon(args):
        raise ValueError("--optimizer muon and --use-distributed-optimizer are both needed for this Muon")
    printed = sys.stdout
    with open(os.devnull, "w") as sys.stdout:  # Megatron prints hundreds of lines
        try:
            validate_args(args)
        finally:
            sys.stdout = printed
    return args


def _parsed(parse: Callable[[], Any]) -> Any:
    """What Megatron's parser makes of sys.argv.

    Raises:
        ValueError: with its complaint, which it prints behind hundreds of lines of usage.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse()
    except SystemExit as end:
        if end.code:
            raise ValueError(complaint.getvalue().strip().rpartition("error: ")[2]) from end
        raise


def assumptions(args: Any) -> list[str]:
    """What the plan assumes or leaves out, for the notes."""
    found = []
    if args.unknown_arguments:
        found.append(f"left out, as this Megatron-Core does not know them: {args.unknown_arguments}")
    if not (getattr(args, "padded_vocab_size", None) or args.vocab_size):
        found.append(f"the tokenizer is not loaded; {GPT2_VOCABULARY} tokens are assumed (--vocab-size)")
    if getattr(args, "mtp_num_layers", None):
        found.append(f"without the {args.mtp_num_layers} layers of --mtp-num-layers")
    if getattr(args, "spec", None):
        found.append(f"of GPTModel's own layers, not of --spec {' '.join(args.spec)}")
    if args.fp8_param_gather:
        found.append("weights are counted in 16 bits; what they take with --fp8-param-gather depends on the recipe")
    return found


def sizes(args: Any, ranks: int | None = None) -> dict[str, int]:
    """TP, PP, EP, expert TP, CP; with so many ranks, DP (CP included, of one optimizer instance) and the experts'."""
    ranks = ranks or args.world_size
    tp, pp, ep = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size
    etp, instances = args.expert_tensor_parallel_size or tp, args.num_distributed_optimizer_instances
    dense = ranks // (tp * pp * instances)
    experts = ranks // (etp * ep * pp * instances)
    return {"tp": tp, "pp": pp, "ep": ep, "etp": etp, "cp": args.context_parallel_size, "dp": dense, "edp": experts}


def stages(args: Any, settings: Settings) -> list[BuiltStage]:
    """Every kind of pipeline stage, built, routed and cut once.

    Raises:
        ValueError: if Megatron cannot build the model here.
    """
    try:
        return list(_stages(args, settings))
    except (AssertionError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Megatron cannot build this model without a GPU: {error or _failed_check(error)}; allowed: a GPTModel "
            "whose libraries are installed, or --shapes with names and shapes"
        ) from error


def _stages(args: Any, settings: Settings) -> Iterator[BuiltStage]:
    alike: dict[str, list[int]] = {}
    for number in range(args.pipeline_model_parallel_size):
        _process_groups(number, args)
        alike.setdefault(_kind(number, args), []).append(number)
    cut = sizes(args)
    for numbers in alike.values():
        _process_groups(numbers[0], args)
        chunks = _build(args)
        found = tuple(parameters(chunks, cut["tp"], cut["etp"]))
        routing = route(found, chunks, settings.split_qkv, per_head=settings.per_head)
        partitions = tuple(p.partition for p in found)
        yield BuiltStage(tuple(numbers), partitions, routing, partial(_buffers, chunks, found, args, numbers[0]))
    _no_process_groups()  # a step is counted in one of its own


def _kind(stage: int, args: Any) -> str:
    """What the stage is made of: the same text, the same shapes and the same cut."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = _config(args)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    of_chunks = [
        get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, vp_stage=chunk if chunks > 1 else None, pp_rank=stage
        ).layer_specs
        for chunk in range(chunks)
    ]
    ends = stage == 0, stage == args.pipeline_model_parallel_size - 1
    return repr((ends, of_chunks))


def _config(args: Any) -> Any:
    """The model's config, without what needs a GPU to be built and leaves the shapes as they are."""
    from megatron.training.arguments import core_transformer_config_from_args

    args = copy.copy(args)
    args.use_cpu_initialization = True
    args.transformer_impl = "local"
    args.moe_grouped_gemm = False
    args.tp_comm_overlap = False
    args.fp8 = None
    args.moe_token_dispatcher_type = "allgather"  # others may want libraries that are not installed
    args.moe_enable_deepep = False
    for name, value in vars(args).items():
        wants_fp8 = value is True and ("fp8" in name or name.endswith("_for_quantization"))
        if wants_fp8 or name.endswith("_fusion"):
            setattr(args, name, False)
    config = core_transformer_config_from_args(args)
    config.perform_initialization = False
    config.persist_layer_norm = False
    config.layernorm_zero_centered_gamma = False  # Transformer Engine's and Apex's
    if config.multi_latent_attention:
        config.qk_layernorm = False  # Transformer Engine's; a vector of the latent's size a layer is not counted
    config.context_parallel_size = 1
    config.sequence_parallel = False
    return config


def _process_groups(stage: int, args: Any) -> None:
    """Megatron's, as the first rank of a pipeline stage sees them, without processes."""
    from megatron.core import parallel_state as mpu
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _no_process_groups()
    cut = sizes(args)
    # Shapes do not depend on DP and CP, and thousands of process groups take seconds: the fewest ranks that do.
    of_stage = math.lcm(cut["tp"], cut["etp"] * cut["ep"])
    # Stages are the outermost of Megatron's dimensions.
    dist.init_process_group("fake", store=FakeStore(), rank=stage * of_stage, world_size=of_stage * cut["pp"])
    mpu.initialize_model_parallel(
        cut["tp"],
        cut["pp"],
        args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=cut["ep"],
        expert_tensor_parallel_size=cut["etp"],
        create_gloo_process_groups=False,
    )


def _no_process_groups() -> None:
    from megatron.core import parallel_state as mpu

    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _build(args: Any) -> list[Any]:
    """The model chunks of this pipeline stage, on the meta device."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    config = _config(args)
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
                    _vocabulary(args),
                    args.max_position_embeddings,
                    pre_process=mpu.is_pipeline_first_stage(**ends),
                    post_process=mpu.is_pipeline_last_stage(**ends),
                    share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                    position_embedding_type=args.position_embedding_type,
                    vp_stage=vp,
                ).to(args.params_dtype)  # the router is made in fp32; each dtype has buffers of its own
            )
    return chunks


def _vocabulary(args: Any) -> int:
    """Its size as Megatron pads it; GPT-2's where the tokenizer would tell and is not loaded."""
    multiple = int(args.make_vocab_size_divisible_by * args.tensor_model_parallel_size)
    size = int(getattr(args, "padded_vocab_size", None) or args.vocab_size or GPT2_VOCABULARY)
    return -(-size // multiple) * multiple


def _bucket_size(args: Any, ranks: int, stage: int, chunk: int, numel: int) -> int | None:
    """As Megatron's training code chooses it: only the first chunk of the first stage has several buckets."""
    if not args.overlap_grad_reduce or stage > 0 or chunk > 0 or args.overlap_param_gather_with_optimizer_step:
        return None
    if args.ddp_num_buckets is not None:
        return numel // int(args.ddp_num_buckets)
    dp = ranks // int(args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    return int(args.ddp_bucket_size or max(40_000_000, 1_000_000 * dp))


def _buffers(chunks: Sequence[Any], found: Sequence[Parameter], args: Any, stage: int, ranks: int) -> list[Buffers]:
    """The cut of Megatron's distributed optimizers for so many ranks."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if not hasattr(DistributedOptimizer, "compute_full_param_layout"):
        raise ValueError("the plan needs Megatron-Core 0.19: 0.16 cuts only what is really there")
    cut = sizes(args, ranks)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        pad_buckets_for_high_nccl_busbw=args.ddp_pad_buckets_for_high_nccl_busbw,
    )
    numel = sum(p.numel() for chunk in chunks for p in chunk.parameters())
    by_kind: dict[bool, list[BufferLayout]] = {}
    for number, chunk in enumerate(chunks):
        of_chunk = DistributedOptimizer.compute_full_param_layout(
            list(chunk.parameters()),
            _bucket_size(args, ranks, stage, number, numel),
            cut["dp"],
            ddp,
            expert_data_parallel_world_size=cut["edp"],
        )
        for key, buffer in of_chunk.layouts.items():
            by_kind.setdefault(bool(key.is_expert_parallel), []).append(buffer)
    numbers = {id(p.tensor): number for number, p in enumerate(found)}
    return [
        _cut(experts, buffers, numbers, cut["edp" if experts else "dp"]) for experts, buffers in sorted(by_kind.items())
    ]


def _cut(experts: bool, buffers: Sequence[BufferLayout], numbers: Mapping[int, int], dp: int) -> Buffers:
    """Cuts every bucket of the buffers in equal parts.

    Args:
        experts: see `Buffers`.
        buffers: of all model chunks.
        numbers: id of a parameter -> its number.
        dp: how many ranks share the buffers.
    """
    parameters: list[int] = []
    held: list[list[Span]] = [[] for _ in range(dp)]
    for buffer in buffers:
        for p, (start, end, bucket) in buffer.param_index_map.items():
            for rank, first, last in _shared(start, end, buffer.bucket_indices[bucket], dp):
                held[rank].append(Span(len(parameters), first, last - first))
            parameters.append(numbers[id(p)])
    return Buffers(experts, tuple(parameters), tuple(map(tuple, held)))


def _shared(start: int, end: int, bucket: tuple[int, int], dp: int) -> Iterator[tuple[int, int, int]]:
    """(Rank, start, end) of a parameter that lies at `start` to `end` of a bucket cut in `dp` equal parts."""
    begin, finish = bucket
    part = (finish - begin) // dp
    for rank in range((start - begin) // part, min(dp - 1, (end - 1 - begin) // part) + 1):
        low = begin + rank * part
        yield rank, max(start, low) - start, min(end, low + part) - start
