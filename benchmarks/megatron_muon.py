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
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.device import finish, machine, result, shown  # noqa: E402
from benchmarks.parts.profiles import profiled  # noqa: E402
from tests.support import session  # noqa: E402
from tests.support.ranks import Ranks  # noqa: E402

RELEASE, ADAMW, OURS = "0.19.2", "AdamW", "muon_plugin"
NATIVE = ("Megatron's own Muon (blockwise, its default)", "Megatron's own Muon (duplicated)")
NAMES = (ADAMW, *NATIVE, OURS, "muon_plugin, standard iteration")


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    ffn: int
    vocabulary: int


SIZES = {"cpu": Sizes(512, 8, 1408, 8192), "cuda": Sizes(2048, 8, 5632, 32768), "tiny": Sizes(32, 1, 48, 64)}


def model(sizes: Sizes, tp: int, device: str) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        ffn_hidden_size=sizes.ffn,
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
    gpt = Float16Module(config, GPTModel(config, spec, sizes.vocabulary, 64, position_embedding_type="rope"))
    return gpt.to(device), config


def build(name: str, sizes: Sizes, tp: int, device: str) -> tuple[Any, Any]:
    """(Model in Megatron's DistributedDataParallel, optimizer), as Megatron's training loop builds them."""
    import muon_plugin

    muon_plugin.register("megatron")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.training.training import wrap_model_chunks_with_ddp

    native = name in NATIVE
    gpt, config = model(sizes, tp, device)
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


def measure(
    rank: int, names: Sequence[str], sizes: Sizes, tp: int, device: str, rounds: int, trace: Path | None = None
) -> dict[str, Any]:
    """Every optimizer once a round, in turn; what one step counts; and a profile of it.

    Args:
        trace: a folder for rank 0's traces.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp)
    built = {name: build(name, sizes, tp, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Any] = {}
    for number in range(rounds + 2):
        for name, (chunk, optimizer) in built.items():
            torch.manual_seed(number)
            _gradients(chunk)
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
    for name, (chunk, optimizer) in built.items():
        found[name]["seconds"] = seconds[name]
        file = trace / f"megatron {name}.json.gz".replace(" ", "_") if trace is not None and rank == 0 else None
        found[name]["profile"] = profiled(optimizer.step, device, file, before=lambda chunk=chunk: _gradients(chunk))
    return found


def _gradients(chunk: Any) -> None:
    """As if backward had run, reduced by Megatron."""
    chunk.zero_grad_buffer()
    for p in chunk.parameters():
        p.main_grad.normal_()
    chunk.finish_grad_sync()
    _together()


def pool(world: int, release: str, names: Sequence[str], device: str) -> Ranks:
    """Ranks that have imported a Megatron-Core, and what its own Muon is made of where that is among `names`.

    Raises:
        FileNotFoundError: if that is neither in the environment nor where `make bench-megatron` installs it.
    """
    beside = None
    if any(name in NATIVE for name in names) and importlib.util.find_spec("emerging_optimizers") is None:
        beside = Path(os.environ.get("MEGATRON_CORE", ROOT / ".venv" / "megatron-core")) / "emerging-optimizers-0.3.0"
        if not beside.is_dir():
            raise FileNotFoundError(f"{beside} is missing: make bench-megatron installs it")
    return Ranks(world, release, device=device, beside=str(beside) if beside else None)


def _together() -> None:
    dist.barrier()
    finish()


def state_bytes(optimizer: Any) -> int:
    """Tensors of the optimizer's state on this rank, masters apart."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    total = 0
    for part in parts:
        for inner in getattr(part, "chained_optimizers", [part]):
            states = getattr(inner.optimizer, "state", {}).values()
            total += sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.dim())
    return total


def table(ranks: list[dict[str, Any]], device: str) -> list[str]:
    """Markdown: the medians of rank 0, and what Muon adds to AdamW as a share of what Megatron's own adds."""
    seconds = {name: statistics.median(ranks[0][name]["seconds"]) for name in ranks[0]}
    base = {name: seconds[name] - seconds[ADAMW] for name in NATIVE if name in seconds}
    kinds = " / ".join(name.partition("(")[2].partition(",")[0].strip(")") for name in base)
    return [
        f"| | step | added to AdamW | of Megatron's own ({kinds or 'not run'}) | Newton-Schulz, all ranks "
        "| sent in the step, all ranks | state, all ranks |",
        "|---|---|---|---|---|---|---|",
        *(row(name, ranks, base, seconds, device) for name in seconds),
    ]


def row(name: str, ranks: list[dict[str, Any]], base: dict[str, float], seconds: dict[str, float], device: str) -> str:
    added = seconds[name] - seconds[ADAMW]
    cells = [
        name,
        shown(seconds[name], device),
        "" if name == ADAMW else shown(added, device),
        "" if name == ADAMW else " / ".join(f"{added / value:.2f}" for value in base.values()),
        f"{sum(r[name]['flops'] for r in ranks) / 1e9:.1f} GFLOP",
        f"{sum(r[name]['bytes'] for r in ranks) / 1e6:.1f} MB",
        f"{sum(r[name]['state'] for r in ranks) / 1e6:.1f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="(default: megatron_muon.md or megatron_muon_gpu.md in results)")
    args = parser.parse_args()
    device, sizes = args.device, SIZES[args.device]
    args.out = args.out or result("megatron_muon", device)
    lines = [
        f"{datetime.date.today()}, {machine(device)}, torch {torch.__version__}, Megatron-Core {RELEASE}, "
        f"emerging-optimizers 0.3.0, bf16, quintic coefficients, one thread a rank, median of {args.rounds} rounds; "
        f"hidden {sizes.hidden}, {sizes.layers} layers, SwiGLU {sizes.ffn}, vocabulary {sizes.vocabulary}.",
    ]
    results = {}
    world = 2 if device == "cpu" else torch.cuda.device_count()
    session.begin()
    for label, tp in ((f"DP {world}", 1), (f"TP {world}", world))[: 1 if world == 1 else 2]:
        processes = pool(world, RELEASE, NAMES, device)
        ranks = processes.run(measure, NAMES, sizes, tp, device, args.rounds)
        processes.close()
        results[label] = ranks
        lines += ["", f"**{label}**", "", *table(ranks, device)]
        print("\n".join(lines[-len(NAMES) - 4 :]), flush=True)
    session.end()
    args.out.write_text("\n".join(lines) + "\n")
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    from benchmarks import megatron_muon  # the ranks' processes know `measure` by this name

    megatron_muon.main()
