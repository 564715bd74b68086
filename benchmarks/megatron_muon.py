"""Megatron 0.19.2's own Muon, ours and AdamW, stepped in turn in one run: `make bench-megatron`; on GPUs `make gpu`.

The optimizer's step alone (what follows the reduction of gradients, with the gather of parameters), at DP 2 and TP 2
on the CPU, at DP and at TP over all GPUs with `--device cuda`, there with a larger model.
Counted: Newton-Schulz FLOPs at the operators that run, bytes at the collectives that run, state bytes in the tensors.
Megatron's own is emerging-optimizers 0.3.0 under the layer-wise optimizer, as its training loop builds it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device
import torch
import torch.distributed as dist
from device import DEVICE, shown
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from ranks import Ranks  # noqa: E402

RELEASE, ADAMW, OURS = "0.19.2", "AdamW", "muon_plugin"
NATIVE = ("Megatron's own Muon (blockwise, its default)", "Megatron's own Muon (duplicated)")
NAMES = (ADAMW, *NATIVE, OURS, "muon_plugin, standard iteration")
HIDDEN, LAYERS, FFN, VOCAB = (512, 8, 1408, 8192) if DEVICE == "cpu" else (2048, 8, 5632, 32768)


def model(tp: int) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=8,
        num_query_groups=4,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        bf16=True,
        params_dtype=torch.bfloat16,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    gpt = Float16Module(config, GPTModel(config, spec, VOCAB, 64, position_embedding_type="rope"))
    return gpt.to(DEVICE), config


def build(name: str, tp: int) -> tuple[Any, Any]:
    """(Model in Megatron's DistributedDataParallel, optimizer), as Megatron's training loop builds them."""
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.training.training import wrap_model_chunks_with_ddp

    native = name in NATIVE
    gpt, config = model(tp)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=not native, grad_reduce_in_fp32=True)
    (chunk,) = wrap_model_chunks_with_ddp([gpt], config, ddp, use_layer_wise_distributed_optimizer=native)
    options = OptimizerConfig(
        optimizer="adam" if name == ADAMW else "muon",
        lr=1e-3,
        min_lr=1e-3,
        bf16=True,
        params_dtype=torch.bfloat16,
        clip_grad=0.0,
        use_distributed_optimizer=not native,
        use_layer_wise_distributed_optimizer=native,
        muon_tp_mode="duplicated" if "duplicated" in name else "blockwise",
    )
    options.muon_ns_method = "standard" if "standard" in name else "auto"
    with contextlib.redirect_stdout(None):
        return chunk, get_megatron_optimizer(options, [chunk])


@contextlib.contextmanager
def bytes_sent() -> Iterator[dict[str, int]]:
    """Bytes this rank sends in collectives, by the usual formulas (a ring; one message to every receiver)."""
    from megatron.core.distributed import param_and_grad_buffer

    def gathered(n: int, out: Any, part: Any) -> int:
        return (n - 1) * part.nbytes

    # (module, function, position of its group among the arguments, bytes sent by each of n ranks)
    collectives = [
        (dist, "all_gather_into_tensor", 2, gathered),
        (dist, "all_gather", 2, gathered),
        (param_and_grad_buffer, "dist_all_gather_func", 2, gathered),
        (dist, "all_reduce", 2, lambda n, t: 2 * (n - 1) * t.nbytes // n),
        (dist, "broadcast", 2, lambda n, t: (n - 1) * t.nbytes // n),  # its source's, spread over the ranks
        (dist, "batch_isend_irecv", 1, lambda n, ops: sum(o.tensor.nbytes for o in ops if o.op is dist.isend)),
    ]
    sent: dict[str, int] = {}

    def counted(original: Any, name: str, position: int, amount: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group", args[position] if len(args) > position else None)
            operands = args[: 2 if amount is gathered else 1]
            sent[name] = sent.get(name, 0) + amount(dist.get_world_size(group), *operands)
            return original(*args, **kwargs)

        return function

    saved = [(module, name, getattr(module, name)) for module, name, *_ in collectives]
    for (module, name, position, amount), (*_, original) in zip(collectives, saved):
        setattr(module, name, counted(original, name, position, amount))
    try:
        yield sent
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


def measure(rank: int, tp: int, rounds: int) -> dict[str, Any]:
    """Every optimizer once a round, in turn; then what one step counts."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp)
    built = {name: build(name, tp) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    found: dict[str, Any] = {}
    for number in range(rounds + 2):
        for name, (chunk, optimizer) in built.items():
            torch.manual_seed(number)
            chunk.zero_grad_buffer()
            for p in chunk.parameters():
                p.main_grad.normal_()
            chunk.finish_grad_sync()
            _together()
            if number == 0:  # on CUDA the first step tries each shape in a batch
                optimizer.step()
                continue
            if number == 1:  # what is counted
                with FlopCounterMode(display=False) as flops, bytes_sent() as sent:
                    optimizer.step()
                found[name] = {
                    "flops": flops.get_total_flops(),
                    "bytes": sum(sent.values()),
                    "by operation": sent,
                    "state": state_bytes(optimizer),
                }
                continue
            began = time.perf_counter()
            optimizer.step()
            _together()
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        found[name]["seconds"] = times
    return found


def _together() -> None:
    dist.barrier()
    device.finish()


def state_bytes(optimizer: Any) -> int:
    """Tensors of the optimizer's state on this rank, masters apart."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    total = 0
    for part in parts:
        for inner in getattr(part, "chained_optimizers", [part]):
            states = getattr(inner.optimizer, "state", {}).values()
            total += sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.dim())
    return total


def row(name: str, ranks: list[dict[str, Any]], base: dict[str, float], seconds: dict[str, float]) -> str:
    added = seconds[name] - seconds[ADAMW]
    cells = [
        name,
        shown(seconds[name]),
        "" if name == ADAMW else shown(added),
        "" if name == ADAMW else " / ".join(f"{added / value:.2f}" for value in base.values()),
        f"{sum(r[name]['flops'] for r in ranks) / 1e9:.1f} GFLOP",
        f"{sum(r[name]['bytes'] for r in ranks) / 1e6:.1f} MB",
        f"{sum(r[name]['state'] for r in ranks) / 1e6:.1f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="(default: megatron_muon.md or megatron_muon_gpu.md in results)")
    args = parser.parse_args()
    device.on(args.device)
    args.out = args.out or device.result("megatron_muon")
    folder = Path(os.environ.get("MEGATRON_CORE", ROOT / ".venv" / "megatron-core"))
    if not (folder / "emerging-optimizers-0.3.0").is_dir():
        raise SystemExit(f"{folder}/emerging-optimizers-0.3.0 is missing: make bench-megatron installs it")
    sys.path.append(str(folder / "emerging-optimizers-0.3.0"))  # the ranks' processes take this path over
    lines = [
        f"{datetime.date.today()}, {device.machine()}, torch {torch.__version__}, Megatron-Core {RELEASE}, "
        f"emerging-optimizers 0.3.0, bf16, quintic coefficients, one thread a rank, median of {args.rounds} rounds; "
        f"hidden {HIDDEN}, {LAYERS} layers, SwiGLU {FFN}, vocabulary {VOCAB}.",
    ]
    results = {}
    world = 2 if DEVICE == "cpu" else torch.cuda.device_count()
    for label, tp in ((f"DP {world}", 1), (f"TP {world}", world))[: 1 if world == 1 else 2]:
        pool = Ranks(world, RELEASE, device=DEVICE)
        ranks = pool.run(measure, tp, args.rounds)
        pool.close()
        results[label] = ranks
        seconds = {name: statistics.median(ranks[0][name]["seconds"]) for name in NAMES}
        base = {name: seconds[name] - seconds[ADAMW] for name in NATIVE}
        lines += [
            "",
            f"**{label}**",
            "",
            "| | step | added to AdamW | of Megatron's own (blockwise / duplicated) | Newton-Schulz, all ranks "
            "| sent in the step, all ranks | state, all ranks |",
            "|---|---|---|---|---|---|---|",
            *(row(name, ranks, base, seconds) for name in NAMES),
        ]
        print("\n".join(lines[-len(NAMES) - 4 :]), flush=True)
    args.out.write_text("\n".join(lines) + "\n")
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
