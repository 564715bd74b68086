"""Trains a small GPT on the tokens that examples/llama/data.py prepared, with Megatron-Core on the CPU.

    torchrun --nproc-per-node 4 examples/megatron/train.py --optimizer muon --tp 2

compare.py prepares the data and runs this once with AdamW and once with Muon. Everything but the optimizer is the same
in both. On GPUs leave `on_cpu` out; the rest is Megatron as everyone writes it.

SIGUSR1 makes it save and stop after the step, on all ranks, with exit code 0, as pretrain_gpt.py does with
--exit-signal-handler; --resume auto goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "llama"))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron would compile for ten seconds in each process
warnings.simplefilter("ignore")  # Megatron tells of every package that a CPU does not need

from muon_plugin.megatron import on_cpu  # noqa: E402

on_cpu.install()

import data  # noqa: E402
import numpy as np  # noqa: E402
import resume  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import muon_plugin  # noqa: E402

muon_plugin.register("megatron")

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from tqdm import tqdm  # noqa: E402

from muon_plugin.megatron.moonlight import three_stages  # noqa: E402
from muon_plugin.megatron.settings import PAPER  # noqa: E402
from muon_plugin.moonlight import Stages, gate_scaling_factor  # noqa: E402

BATCH_SIZE = 8  # sequences of all data parallel ranks together
VAL_WINDOWS = 64


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["adam", "muon"], default="muon")
    parser.add_argument("--tp", type=int, default=2, help="tensor parallel size (default: %(default)s)")
    parser.add_argument("--moe", action="store_true", help="four experts a layer, two a token, over --ep ranks")
    parser.add_argument("--moonlight", action="store_true", help="Moonlight, scaled down: its layers and its schedule")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.001, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    resume.add_arguments(parser)
    parser.add_argument("--data", type=Path, default=Path("runs/megatron/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/megatron/muon"))
    return parser.parse_args()


def make_model(args: argparse.Namespace, vocab_size: int) -> Any:
    """A GPT with grouped-query attention, SwiGLU, RMSNorm and rotary positions, in Megatron's DDP."""
    experts = {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": args.hidden * 3 // 2,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "allgather",
        "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "aux_loss",
    }
    # Moonlight: the first layer dense, shared experts, a sigmoid router balanced by biases. Its latent attention wants
    # Transformer Engine: Megatron's own attention for the CPU does not take keys and values of different sizes.
    moonlight = {
        "num_moe_experts": 8,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_ffn_hidden_size": args.hidden * 11 // 16,
        "moe_shared_expert_intermediate_size": args.hidden * 11 // 8,
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": gate_scaling_factor(8, 2, generator=torch.Generator().manual_seed(0)),
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
    }
    config = TransformerConfig(
        num_layers=4,
        hidden_size=args.hidden,
        ffn_hidden_size=3 * args.hidden,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tp,
        expert_model_parallel_size=args.ep,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **(moonlight if args.moonlight else experts if args.moe else {}),
    )
    torch.manual_seed(args.seed)  # the same whole matrices on every rank, from which TP takes its parts
    gpt = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size,
        data.SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    for p in gpt.parameters():
        if not getattr(p, "allreduce", True):  # experts of this rank: other numbers than the other ranks' experts
            torch.manual_seed(args.seed + 1 + parallel_state.get_expert_model_parallel_rank())
            torch.nn.init.normal_(p, std=config.init_method_std)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    extra = {}
    if hasattr(DistributedOptimizer, "compute_full_param_layout"):  # Megatron-Core from 0.19
        extra["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
            list(gpt.parameters()),
            None,
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            ddp,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
    return DistributedDataParallel(config=config, ddp_config=ddp, module=gpt, disable_bucketing=True, **extra)


def make_optimizer(args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
    """Megatron's optimizer and its scheduler; the paper's settings where it is Muon, Moonlight's stages for it."""
    config = OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.lr / 10,
        weight_decay=args.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        use_distributed_optimizer=True,
    )
    for key, value in PAPER.items():  # on Megatron's command line: --muon-paper
        setattr(config, key, value)
    optimizer = get_megatron_optimizer(config, [model])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.lr / 10,
        lr_warmup_steps=max(2, args.steps // 10),
        lr_decay_steps=args.steps,
        lr_decay_style="cosine",
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.steps,
        wd_incr_style="constant",
    )
    if args.moonlight:
        stages = Stages().scaled(args.steps, max(2, args.steps // 10), args.steps / 100)
        three_stages(scheduler, stages, 1, [model.config])  # in steps instead of tokens
    return optimizer, scheduler


def sharded(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    """What Megatron's training loop saves as torch_dist: each rank its part, named so that any layout can resume."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    found = {"model": model.module.sharded_state_dict(metadata=metadata)}
    found["optimizer"] = optimizer.sharded_state_dict(dict(found), is_loading=loading, metadata=metadata)
    return found


def save(checkpoint: Path, keep: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Saves on every rank; the file `complete` comes last."""
    state = sharded(model, optimizer, loading=False) | {"scheduler": scheduler.state_dict()}
    dist_checkpointing.save(state, str(resume.emptied(checkpoint)))
    resume.completed(checkpoint, keep)


def load(checkpoint: Path, model: Any, optimizer: Any, scheduler: Any) -> int:
    """Restores what `save` saved; the step after which that was."""
    state = dist_checkpointing.load(sharded(model, optimizer, loading=True), str(checkpoint))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return resume.step_of(checkpoint)


def loss_of(model: Any, windows: np.ndarray) -> torch.Tensor:
    """Mean loss per token of this rank's windows."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return model(inputs, positions, None, labels=labels).mean()


def mean_over_data(value: torch.Tensor) -> float:
    group = parallel_state.get_data_parallel_group()
    value = value.detach().clone()
    dist.all_reduce(value, group=group)
    return value.item() / group.size()


def train(args: argparse.Namespace) -> None:
    """One training run."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(args.tp, expert_model_parallel_size=args.ep)
    info = json.loads((args.data / "info.json").read_text())
    model = make_model(args, -(-info["vocab_size"] // 128) * 128)  # padded, so that TP can cut it
    optimizer, scheduler = make_optimizer(args, model)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    windows = data.load_windows(args.data, "train", BATCH_SIZE)
    held_out = data.spread(data.load_windows(args.data, "val", BATCH_SIZE), VAL_WINDOWS, size)
    order = np.random.default_rng(args.seed).permutation(len(windows))
    is_main = dist.get_rank() == 0
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = resume.newest(args.out / "checkpoint", args.resume)
    start = load(checkpoint, model, optimizer, scheduler) if checkpoint else 0
    stop = resume.StopSignal()
    metrics, spent = resume.open_metrics(args.out / "metrics.jsonl", start) if is_main else (None, 0.0)
    bar = tqdm(range(start + 1, args.steps + 1), desc=args.optimizer, unit="step", disable=not is_main, mininterval=5)
    for step in bar:
        places = np.arange((step - 1) * BATCH_SIZE, step * BATCH_SIZE) % len(order)
        began = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = loss_of(model, windows[order[places[rank::size]]])
        loss.backward()
        finalize_model_grads([model])
        scheduler.step(increment=1)
        _, grad_norm, _ = optimizer.step()
        mean = mean_over_data(loss)
        spent += time.perf_counter() - began
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} at step {step}; try an --lr below {args.lr}")
        values = {
            "step": step,
            "tokens": step * BATCH_SIZE * data.SEQUENCE,
            "loss": mean,
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": float(grad_norm),
            "seconds": spent,
        }
        if step % args.eval_every == 0 or step == args.steps:
            with torch.no_grad():
                mine = held_out[rank::size]
                batches = [mine[i : i + BATCH_SIZE] for i in range(0, len(mine), BATCH_SIZE)]
                losses = [loss_of(model, batch) * len(batch) for batch in batches]
            values["val_loss"] = mean_over_data(torch.stack(losses).sum() / len(mine))
        if metrics:
            print(json.dumps(values), file=metrics, flush=True)
            bar.set_postfix(loss=f"{mean:.3f}", val=f"{values.get('val_loss', float('nan')):.3f}", refresh=False)
        stopping = stop.on_any_rank("cpu")
        if step == args.steps or stopping or (args.save_every and step % args.save_every == 0):
            save(args.out / "checkpoint" / str(step), args.keep, model, optimizer, scheduler)
        if stopping and step < args.steps:
            if is_main:
                tqdm.write(f"stopped by SIGUSR1: saved after step {step} of {args.steps}")
            break
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    train(parse_args())
