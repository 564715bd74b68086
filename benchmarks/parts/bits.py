"""The same bits over layouts, on the device: under DeepSpeed, under Megatron, and the core's own checks.

Each rank has a GPU of its own over NCCL where there are enough, else they share, over gloo (tests/support/staged.py).
Weights after some steps are compared with those of one process, bit by bit.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.parts.record import Case, Found, Progress, Setup
from benchmarks.parts.tables import table, title
from tests.support import ROOT, session
from tests.support.counted import Products
from tests.support.integers import build, config, differing, train, trained, weights
from tests.support.megatron_model import Layout
from tests.support.megatron_model import trained as megatron_trained
from tests.support.ranks import Ranks
from tests.support.ranks import release as release_folder

RELEASE = "0.19.2"
#: Under DeepSpeed "auto" takes torch's fused AdamW at stage 0 and DeepSpeed's from stage 1 on, which round differently.
ADAMW = {"cuda": {"adamw": "torch_fused"}, "cpu": {}}
#: AdamW on the CPU rounds otherwise than on the GPU: what an offload of the whole optimizer may differ by there.
OFFLOAD_ERROR = 1e-5

#: Stage, ranks, dtype, micro-batches, the share of the optimizer that is offloaded; the most telling first.
ZERO = [
    *[(stage, world, "bf16", 1, 0.0) for world in (2, 4) for stage in (1, 2, 3, 0)],
    *[(stage, world, "bf16", 1, 1.0) for stage, world in ((1, 2), (2, 2), (3, 2))],
    *[(stage, 2, dtype, gas, 0.0) for dtype in ("fp32", "fp16") for stage, gas in ((1, 4), (2, 1), (3, 4), (0, 1))],
    *[(stage, 1, "bf16", 4, 0.0) for stage in (1, 2, 3)],
    *[(stage, world, "fp32", 1, 1.0) for stage, world in ((1, 1), (2, 4), (3, 4))],
    (3, 1, "fp32", 1, 0.5),  # ZeRO-Offload++
    *[(stage, 3, "bf16", 4, 0.0) for stage in (1, 3)],
]
#: Ranks, layout.
MEGATRON = [
    (2, Layout(tp=2)),
    (2, Layout("moe", ep=2)),
    (2, Layout(pp=2)),
    (2, Layout()),
    (4, Layout("moe", tp=2, ep=2)),
    (4, Layout(tp=2, pp=2)),
    (4, Layout(tp=2)),
    (4, Layout("moe", ep=4)),
    (4, Layout("moe", pp=2, ep=2)),
    (4, Layout("moe", tp=2, ep=2, etp=1)),
    (4, Layout(tp=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=3000)),
    (4, Layout(tp=2, cp=2)),
    (4, Layout(tp=2, dtype="fp16")),
    (2, Layout(tp=2, dtype="fp32")),
    (2, Layout(tp=2, muon={"muon_offload": True})),
    (2, Layout(pp=2, vp=2)),
    (4, Layout(instances=2)),
    (4, Layout("few_groups", tp=4)),
    (2, Layout("gated_attention", tp=2)),
]
#: What is run of both with the size "tiny", which covers each line of this file.
TINY_ZERO = [(1, 2, "bf16", 1, 0.0), (3, 2, "fp32", 1, 1.0)]
TINY_MEGATRON = [(2, Layout("moe", ep=2))]
CORE = "tests/gpu/test_core.py"


@dataclass
class Pools:
    """Processes that stay, and what one of them alone ends in."""

    device: str
    pools: dict[tuple[int, str | None], Ranks] = field(default_factory=dict)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, size: int, megatron: str | None = None) -> Ranks:
        key = size, megatron
        if key not in self.pools or not self.pools[key].alive:
            if self.device == "cuda" and megatron is not None:  # DeepSpeed's are not needed any more
                for other in [k for k in self.pools if k[1] != megatron]:
                    self.pools.pop(other).close()
            self.pools[key] = Ranks(size, megatron, device=self.device)
        return self.pools[key]

    def alone(self, function: Any, *args: Any, megatron: str | None = None) -> dict[str, Tensor]:
        key = repr((function.__qualname__, args, megatron))
        if key not in self.kept:
            self.kept[key] = self(1, megatron).run(function, *args)[0]
        return self.kept[key]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
        self.pools.clear()


def cases(setup: Setup, opened: ExitStack) -> Iterator[Case]:
    if "MUON_TESTS_FOLDER" not in os.environ:
        session.begin()
        opened.callback(session.end)
    pools = Pools(setup.device)
    opened.callback(pools.close)
    steps = 2 if setup.tiny else 10
    yield Case("collectives between 2 processes", lambda _: collectives(pools))
    for case in TINY_ZERO if setup.tiny else ZERO:
        yield Case(zero_name(*case), functools.partial(zero, pools, *case, steps))
    folder = functools.cache(megatron_core)
    for world, layout in TINY_MEGATRON if setup.tiny else MEGATRON:
        yield Case(megatron_name(world, layout), functools.partial(megatron, pools, folder, world, layout, steps))
    for test in tests_of_the_core()[: 1 if setup.tiny else None]:
        yield Case(f"{CORE}: {test}", functools.partial(core, setup.device, test))


def megatron_core() -> str:
    """The folder of the release: .venv/megatron-core or MEGATRON_CORE, or the environment's where it is the one."""
    try:
        return str(release_folder(RELEASE))
    except FileNotFoundError:
        there = next(iter(importlib.metadata.distributions(name="megatron-core")), None)
        if there is None or there.version != RELEASE:
            raise
        return str(Path(str(there.locate_file(""))).resolve())


def collectives(pools: Pools) -> dict[str, Any]:
    """What engines send with: by operation, whether what arrives is right. Fails if any is wrong."""
    by_rank = pools(2).run(communicate, pools.device)
    found = {name: all(rank[0][name] == "right" for rank in by_rank) for name in by_rank[0][0]}
    if not all(found.values()):
        raise AssertionError(f"over {by_rank[0][1]}: {[rank[0] for rank in by_rank]}")
    return {"backend": by_rank[0][1], "operations": sorted(found)}


def communicate(rank: int, device: str) -> tuple[dict[str, str], str]:
    """Operation -> "right", or what is wrong with it; and the backend."""
    world, peer = dist.get_world_size(), 1 - rank

    def ones(*shape: int, times: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.full(shape, times, dtype=dtype, device=device)

    def gathered(coalesced: bool) -> tuple[Tensor, list[float]]:
        out, part = ones(4, times=0.0), ones(2, times=rank + 1.0)
        if coalesced:
            with dist.distributed_c10d._coalescing_manager(None, async_ops=True) as work:
                dist.all_gather_into_tensor(out, part)
            work.wait()
        else:
            dist.all_gather_into_tensor(out, part)
        return out, [1.0, 1.0, 2.0, 2.0]

    def scattered() -> tuple[Tensor, list[float]]:
        out, whole = torch.zeros(2, device=device), torch.arange(4.0, device=device) * (rank + 1)
        dist.reduce_scatter_tensor(out, whole, async_op=True).wait()
        return out, [6.0 * rank, 6.0 * rank + 3.0]

    def reduced(to_one: bool) -> tuple[Tensor, list[float]]:
        x = ones(3, times=rank + 1.0)
        if to_one:
            dist.reduce(x, 0)
            return (x, [3.0] * 3) if rank == 0 else (x[:0], [])
        dist.all_reduce(x)
        return x, [3.0] * 3

    def listed() -> tuple[Tensor, list[float]]:
        parts = [ones(2, times=0.0) for _ in range(world)]
        dist.all_gather(parts, ones(2, times=rank + 1.0))
        return torch.cat(parts), [1.0, 1.0, 2.0, 2.0]

    def broadcast() -> tuple[Tensor, list[float]]:
        x = ones(2, times=rank + 5.0, dtype=torch.float16)
        dist.broadcast(x, 1, async_op=True).wait()
        return x, [6.0, 6.0]

    def messages() -> tuple[Tensor, list[float]]:
        """Larger than what sockets take before the other side reads."""
        x, out = ones(2**21, times=rank + 1.0), ones(2**21, times=0.0)
        ops = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, out, peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return out[[0, -1]], [peer + 1.0] * 2

    def exchanged() -> tuple[Tensor, list[float]]:
        out = ones(4, times=0.0)
        dist.all_to_all_single(out, torch.arange(4.0, device=device).bfloat16() + 10 * rank)
        return out, [2.0 * rank, 2.0 * rank + 1, 10 + 2.0 * rank, 11 + 2.0 * rank]

    operations: dict[str, Any] = {
        "all_reduce": lambda: reduced(False),
        "reduce": lambda: reduced(True),
        "all_gather_into_tensor": lambda: gathered(False),
        "all_gather_into_tensor, coalesced": lambda: gathered(True),
        "all_gather": listed,
        "reduce_scatter_tensor": scattered,
        "broadcast": broadcast,
        "isend and irecv": messages,
        "all_to_all_single": exchanged,
    }
    found = {}
    for name, operation in operations.items():
        try:
            got, wanted = operation()
            found[name] = "right" if got.float().tolist() == wanted else f"{got.float().tolist()}, not {wanted}"
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found, dist.get_backend()


def zero_name(stage: int, world: int, dtype: str, gas: int, offloaded: float) -> str:
    offload = f"offload of {offloaded:.0%}" if 0 < offloaded < 1 else "offload" if offloaded else ""
    parts = [f"ZeRO-{stage}", offload, dtype, f"{world} ranks" if world > 1 else "1 rank"]
    return ", ".join(filter(None, [*parts, f"{gas} micro-batches" if gas > 1 else ""]))


def zero(
    pools: Pools, stage: int, world: int, dtype: str, gas: int, offloaded: float, steps: int, _: Progress
) -> dict[str, Any]:
    params = ADAMW[pools.device]
    alone = pools.alone(trained, config(0, dtype, params=params), steps)
    if not offloaded:
        return compared(pools(world).run(trained, config(stage, dtype, gas, params), steps), alone)
    offload: dict[str, Any] = {"offload_optimizer": {"device": "cpu", "pin_memory": dtype == "bf16"}}
    wanted = {f"matrices multiplied on {pools.device}", "state on cpu"}
    if offloaded < 1:  # by sub-groups; the rest is stepped where the parameters are
        offload["sub_group_size"], offload["offload_optimizer"]["ratio"] = 300, offloaded
        wanted.add(f"state on {pools.device}")
    found = pools(world).run(offloaded_run, config(stage, dtype, gas, zero_optimization=offload), steps)
    if (used := {place for run in found for place in run.places}) != wanted:
        raise AssertionError(f"{sorted(used)}")
    exact = None if pools.device == "cpu" else found[0].matrices
    return compared([run.weights for run in found], alone, exact)


@dataclass
class Offloaded:
    """What a run with offload ends in.

    Attributes:
        matrices: the parameters that Muon trains, whose bits AdamW has no part in.
        places: where matrices were multiplied, and where the optimizer's state is.
    """

    weights: dict[str, Tensor]
    matrices: set[str]
    places: set[str]


def offloaded_run(rank: int, settings: dict[str, Any], steps: int) -> Offloaded:
    engine = build(rank, settings)
    with Products() as products:
        train(engine, rank, steps)
    states = engine.basic_optimizer.state.values()
    places = {f"state on {v.device.type}" for state in states for v in state.values() if isinstance(v, Tensor)}
    places |= {f"matrices multiplied on {device}" for device in products.devices}
    muon = {matrix.parameter for matrix in engine.basic_optimizer.routing.matrices}
    found = Offloaded(weights(engine), muon, places)
    engine.destroy()
    return found


def compared(found: list[dict[str, Tensor]], alone: dict[str, Tensor], exact: set[str] | None = None) -> dict[str, Any]:
    """What was compared; raises where a rank's weights differ from those of one process.

    Args:
        exact: the parameters whose bits must be equal, all by default; others may differ by OFFLOAD_ERROR.
    """
    wrong: dict[str, Any] = {}
    for rank, mine in enumerate(found):
        for name in differing(mine, alone):
            if name not in mine or name not in alone:
                wrong[f"rank {rank}: {name}"] = "only one has it"
                continue
            wanted = alone[name].double()
            far = float((mine[name].double() - wanted).norm() / wanted.norm())
            # Parameters are rounded from masters that may differ, so by one unit of their last place.
            allowed = OFFLOAD_ERROR if alone[name].dtype == torch.float32 else torch.finfo(alone[name].dtype).eps
            if exact is None or name.removesuffix(" (fp32)") in exact or not far < allowed:
                count = int((mine[name] != alone[name]).sum())
                wrong[f"rank {rank}: {name}"] = f"{count} of {alone[name].numel()} elements, {far:.1e}"
    if wrong:
        raise AssertionError(f"bits differ from those of one process: {wrong}")
    elements = sum(value.numel() for value in alone.values())
    return {"ranks": len(found), "tensors": len(alone), "elements": elements}


def megatron_name(world: int, layout: Layout) -> str:
    changed = {
        key: value for key, value in vars(layout).items() if value != getattr(Layout(), key) and key not in ("model",)
    }
    sizes = [f"{key} {value}" for key, value in changed.items()]
    return ", ".join(["Megatron", layout.model, f"{world} ranks", *sizes])


def megatron(pools: Pools, folder: Any, world: int, layout: Layout, steps: int, _: Progress) -> dict[str, Any]:
    alone = pools.alone(megatron_trained, Layout(layout.model, dtype=layout.dtype), steps, megatron=folder())
    return compared(pools(world, folder()).run(megatron_trained, layout, steps), alone)


def tests_of_the_core() -> list[str]:
    """Names of the test functions, in order."""
    lines = (ROOT / CORE).read_text().splitlines()
    return [line.split()[1].partition("(")[0] for line in lines if line.startswith("def test_")]


def core(device: str, test: str, _: Progress) -> dict[str, Any]:
    """One of the core's checks, in a process of its own."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MUON_TESTS")}
    variables |= {"GPU_TESTS_DEVICE": device}
    own = "addopts=-q --import-mode=importlib"  # a second -q, as in the project's, leaves out how many have passed
    command = [sys.executable, "-m", "pytest", "-o", own, "-p", "no:cacheprovider", f"{CORE}::{test}"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    if done.returncode:
        raise AssertionError("\n".join(said)[-3500:])
    if " passed" not in said[-1]:
        raise AssertionError(f"no test was run: {said[-1]}")
    return {"pytest": said[-1]}


def report(setup: Setup, found: dict[str, Found], on: dict[str, Any]) -> str:
    rows = []
    for name, one in found.items():
        what = one.value.get("error") or ", ".join(f"{value} {key}" for key, value in one.value.items())
        rows.append([name, one.state, f"{one.seconds:.1f} s", what.replace("\n", " ").replace("|", "/")[:300]])
    steps = 2 if setup.tiny else 10
    return f"""{title("The same bits over layouts", on)}

Weights after {steps} steps, bit by bit against one process: the parameters and the fp32 masters of every rank. With
offload on a GPU, those that AdamW trains may differ by {OFFLOAD_ERROR:g} in all: it runs on the CPU there.

{table(["case", "", "time", "compared"], rows)}
"""
