"""DeepSpeed's built-in Muon, ours, and AdamW, side by side in one run: time, bytes, state, memory, FLOPs.

    python benchmarks/deepspeed_muon.py                    # 2 and 4 ranks on CPU over gloo, one thread a rank
    python benchmarks/deepspeed_muon.py --device cuda      # a GPU a rank over NCCL, all of them; a larger model

Every rank holds one engine of each kind (bf16, ZeRO-1, DeepSpeed's defaults) on the same model and steps them in turn,
round after round, so that whatever else the machine does hits all of them alike. Bytes and FLOPs are counted at the
operators that really run; peak memory on the CPU comes from separate runs, one kind each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.device import finish, machine, result, shown
from benchmarks.parts.profiles import profiled


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    vocabulary: int
    tokens: int


SIZES = {"cpu": Sizes(512, 8, 8192, 128), "cuda": Sizes(2048, 8, 32768, 2048), "tiny": Sizes(32, 1, 64, 8)}
KINDS = {
    "AdamW": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "built-in Muon": {"type": "Muon", "params": {"lr": 1e-3}},
    "built-in Muon, ns_method standard": {"type": "Muon", "params": {"lr": 1e-3, "ns_method": "standard"}},
    "muon_plugin": {"type": "Muon", "params": {"lr": 1e-3}},
}


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(x)))


class GPT(nn.Module):
    """29.4M parameters, on a GPU 470M; the embedding is the output head too."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes.hidden) for _ in range(sizes.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(x, self.embed.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class Bytes(TorchDispatchMode):
    """Bytes that this rank sends, by operation, ring accounting, at the c10d operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, n = func.__name__.split(".")[0].strip("_"), dist.get_world_size()
            share = {
                "allreduce": 2 * (n - 1) / n,
                "reduce": (n - 1) / n,
                "broadcast": (n - 1) / n,
                "allgather_base": (n - 1) / n,  # of its output, the first argument
                "allgather_into_tensor_coalesced": (n - 1) / n,
                "reduce_scatter_base": (n - 1) / n,
                "send": 1,
                "recv": 0,
                "recv_any_source": 0,
                "barrier": 0,
            }
            if name == "allgather":
                size, factor = sum(t.nbytes for t in _tensors(args[1])), n - 1
            elif name == "reduce_scatter_base":
                size, factor = sum(t.nbytes for t in _tensors(args[1])), share[name]
            else:
                size, factor = sum(t.nbytes for t in _tensors(args[0])), share[name]
            self.sent[name] += int(size * factor)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def build(kind: str, sizes: Sizes) -> Any:
    import deepspeed

    import muon_plugin

    deepspeed.utils.logger.setLevel("ERROR")
    muon_plugin.register() if kind == "muon_plugin" else muon_plugin.unregister()
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": copy.deepcopy(KINDS[kind]),  # DeepSpeed removes torch_adam
    }
    engine, *_ = deepspeed.initialize(model=GPT(sizes), config=settings)
    return engine


def step(engine: Any, tokens: Tensor) -> float:
    """One forward, backward and step; seconds of backward and step."""
    loss = engine(tokens)
    dist.barrier()
    finish()
    start = time.perf_counter()
    engine.backward(loss)
    engine.step()
    finish()
    return time.perf_counter() - start


def backward(engine: Any, tokens: Tensor) -> None:
    engine.backward(engine(tokens))
    finish()


def state_bytes(engine: Any) -> int:
    return sum(
        value.nbytes
        for state in engine.basic_optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def counts(engine: Any, tokens: Tensor) -> dict[str, Any]:
    """Bytes and FLOPs of one step. Compiled functions run uncompiled here: counters see operators, not kernels."""
    torch.compiler.set_stance("force_eager")
    with Bytes() as sent, FlopCounterMode(display=False) as flops:
        step(engine, tokens)
    torch.compiler.set_stance("default")
    return {"sent": dict(sent.sent), "flops": flops.get_total_flops()}


def measure(rank: int, kinds: Sequence[str], sizes: Sizes, device: str, rounds: int, trace: Path | None = None) -> Any:
    """Every engine once a round, in turn; then what a step counts, and a profile of the engine's step.

    Args:
        trace: a folder for rank 0's traces.
    """
    tokens = torch.randint(sizes.vocabulary, (1, sizes.tokens), generator=torch.Generator().manual_seed(rank))
    tokens = tokens.to(device)
    engines, peaks = {}, {}
    for kind in kinds:
        before = _allocated(device)
        engines[kind] = build(kind, sizes)
        for _ in range(2):  # compile, allocate
            step(engines[kind], tokens)
        peaks[kind] = _peak(device) - before
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, engine in engines.items():
            times[kind].append(step(engine, tokens))
    found = {}
    for kind, engine in engines.items():
        found[kind] = {
            "times": times[kind],
            "state": state_bytes(engine),
            "peak": peaks[kind],
            **counts(engine, tokens),
        }
        file = trace / f"deepspeed {kind}.json.gz".replace(" ", "_") if trace is not None and rank == 0 else None
        found[kind]["profile"] = profiled(engine.step, device, file, before=partial(backward, engine, tokens))
    return found


def worker(kinds: list[str], rounds: int, out: Path, device: str) -> None:
    torch.set_num_threads(1)
    import deepspeed

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
    mine = measure(dist.get_rank(), kinds, SIZES[device], device, rounds)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))
    dist.barrier()


def _allocated(device: str) -> int:
    """Bytes on the GPU that are not the next engine's, whose peak counts from here."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    """Bytes at most: on the GPU since `_allocated`, on the CPU of the process."""
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated() if device == "cuda" else on_cpu


def launch(ranks: int, kinds: list[str], rounds: int, out: Path, device: str) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    command += ["--worker", *kinds, "--rounds", str(rounds), "--out", str(out), "--device", device]
    subprocess.run(command, env=environment, check=True)
    return json.loads(out.read_text())


def table(ranks: int, found: list[dict[str, Any]], peaks: dict[str, int], device: str) -> list[str]:
    """Markdown: the slowest rank's medians, and what Muon adds to AdamW as a share of what the built-in adds."""
    kinds = list(found[0])
    seconds = {kind: max(statistics.median(rank[kind]["times"]) for rank in found) for kind in kinds}
    added = {kind: seconds[kind] - seconds["AdamW"] for kind in kinds}
    rival = added.get("built-in Muon")
    forward_backward = min(rank["AdamW"]["flops"] for rank in found)
    rows = [
        f"**{ranks} ranks**",
        "",
        "| | backward + step | added to AdamW | of the built-in's | sent a rank | state a rank | peak memory a rank | "
        "Newton-Schulz, all ranks (busiest) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        flops = [rank[kind]["flops"] - forward_backward for rank in found]
        sent = max(sum(rank[kind]["sent"].values()) for rank in found)
        extra = ["", ""]
        if kind != "AdamW":
            extra = [shown(added[kind], device), f"{added[kind] / rival:.2f}" if rival else ""]
        newton_schulz = f"{sum(flops) / 1e9:.1f} ({max(flops) / 1e9:.1f}) GFLOP" if kind != "AdamW" else ""
        state = max(rank[kind]["state"] for rank in found)
        rows.append(
            f"| {kind} | {shown(seconds[kind], device)} | {extra[0]} | {extra[1]} | {sent / 1e6:.2f} MB | "
            f"{state / 1e6:.1f} MB | {peaks[kind] / 2**20:.0f} MiB | {newton_schulz} |"
        )
    operations = sorted({name for kind in kinds for name in found[0][kind]["sent"] if found[0][kind]["sent"][name]})
    rows += ["", f"Sent by rank 0 a step, MB, by operation ({', '.join(operations)}):"]
    for kind in kinds:
        rows.append(f"{kind}: " + ", ".join(f"{found[0][kind]['sent'].get(o, 0) / 1e6:.2f}" for o in operations) + ".")
    return [*rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", help="(default: 2 and 4; on CUDA as many as there are GPUs)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="(default: deepspeed_muon.md or deepspeed_muon_gpu.md in results)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if options.worker:
        worker(options.worker, options.rounds, options.out, device)
        return
    import deepspeed

    options.out = options.out or result("deepspeed_muon", device)
    options.ranks = options.ranks or ([2, 4] if device == "cpu" else [torch.cuda.device_count()])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = options.out.with_suffix(".json")
    where = f"{machine(device)}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}"
    rows = [
        f"{time.strftime('%Y-%m-%d')}, {where}, bf16, ZeRO-1, one thread a rank, median of {options.rounds} rounds.",
        "",
    ]
    raw = {}
    for ranks in options.ranks:
        found = raw[str(ranks)] = launch(ranks, list(KINDS), options.rounds, scratch, device)
        alone = {kind: found if device == "cuda" else launch(ranks, [kind], 2, scratch, device) for kind in KINDS}
        peaks = {kind: max(rank[kind]["peak"] for rank in alone[kind]) for kind in KINDS}
        rows += table(ranks, found, peaks, device)
    scratch.write_text(json.dumps(raw))
    options.out.write_text("\n".join(rows))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
