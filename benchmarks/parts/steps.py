"""The optimizer's step against others', with launches and gaps: in each engine, and alone as a rank of a large run."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import muon_plugin
from benchmarks import counts, deepspeed_muon, megatron_muon
from benchmarks.device import finish
from benchmarks.parts.bits import megatron_core
from benchmarks.parts.profiles import GAP, profiled
from benchmarks.parts.record import Case, Found, Progress, Setup
from benchmarks.parts.tables import failures, table, title
from muon_plugin.core.plan import make_plan
from muon_plugin.core.settings import Settings
from muon_plugin.planner.cost import index_of
from muon_plugin.planner.counts import META, busiest
from tests.support import session
from tests.support.ranks import Ranks
from tests.support.torch_releases import extensions

ADAMW, OURS = "AdamW", "muon_plugin"
ROUNDS = 7


def cases(setup: Setup, opened: ExitStack) -> Iterator[Case]:
    if "MUON_TESTS_FOLDER" not in os.environ:
        session.begin()
        opened.callback(session.end)
    yield Case("DeepSpeed: its AdamW is compiled", functools.partial(compiled, setup))
    keep_compiled(setup.out)
    kinds = list(deepspeed_muon.KINDS) if fused_adam() or not setup.tiny else [ADAMW, OURS]
    for engine, run, names in (("Megatron", megatron, megatron_muon.NAMES), ("DeepSpeed", deepspeed, kinds)):
        everything = f"{engine}: all"
        # One that cannot run here must not cost what the others show: then each rival runs with ours alone.
        rivals = [name for name in names if name not in (ADAMW, OURS)]
        yield Case(everything, functools.partial(run, setup, (ADAMW, *rivals[:1], OURS) if setup.tiny else names))
        for rival in [] if setup.tiny else rivals:
            yield Case(f"{engine}: {rival}", functools.partial(run, setup, (ADAMW, rival, OURS)), everything)
        yield Case(f"{engine}: {OURS} and {ADAMW}", functools.partial(run, setup, (ADAMW, OURS)), everything)
    for name in list(counts.CASES)[: 1 if setup.tiny else None]:
        yield Case(f"one rank: {name}", functools.partial(alone, setup, name))


def compiled(setup: Setup, _: Progress) -> dict[str, Any]:
    """DeepSpeed's FusedAdam, which its own Muon uses, and ours under it on CUDA: a minute or two, once."""
    if setup.tiny and not fused_adam():
        return {"seconds": None}  # not for a few seconds' worth of a test
    begin = time.perf_counter()
    command = "from deepspeed.ops.op_builder import FusedAdamBuilder as B; B().load(verbose=False)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return {"seconds": time.perf_counter() - begin}


def keep_compiled(out: Path) -> None:
    """Where DeepSpeed's kernels are kept: where `make test` compiles them, else beside the results."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return
    mine = out / "extensions"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions() if extensions().is_dir() else mine)
    for lock in mine.rglob("lock"):  # left by a build that was killed; every later one would wait for it
        lock.unlink()


def fused_adam() -> bool:
    """Whether it is compiled already."""
    return any(Path(os.environ.get("TORCH_EXTENSIONS_DIR", "nowhere")).rglob("fused_adam.so"))


def world_of(setup: Setup) -> int:
    return torch.cuda.device_count() if setup.device == "cuda" else 1 if setup.tiny else 2


def megatron(setup: Setup, names: Sequence[str], _: Progress) -> dict[str, Any]:
    """The step after the reduction of gradients, at DP, and at TP where there are several GPUs."""
    sizes, world = megatron_muon.SIZES[setup.size if setup.tiny else setup.device], world_of(setup)
    found: dict[str, Any] = {}
    pool = megatron_muon.pool(world, megatron_core(), names, setup.device)
    try:
        for label, tp in ((f"DP {world}", 1), (f"TP {world}", world)):
            if label.startswith("DP") or tp > 1:
                rounds, trace = 1 if setup.tiny else ROUNDS, setup.out / "traces"
                found[label] = pool.run(megatron_muon.measure, names, sizes, tp, setup.device, rounds, trace)
    finally:
        pool.close()
    return found


def deepspeed(setup: Setup, names: Sequence[str], _: Progress) -> dict[str, Any]:
    """Backward and step under ZeRO-1."""
    sizes, world = deepspeed_muon.SIZES[setup.size if setup.tiny else setup.device], world_of(setup)
    pool = Ranks(world, device=setup.device)
    try:
        rounds, trace = 1 if setup.tiny else ROUNDS, setup.out / "traces"
        return {f"DP {world}": pool.run(deepspeed_muon.measure, names, sizes, setup.device, rounds, trace)}
    finally:
        pool.close()


def alone(setup: Setup, name: str, _: Progress) -> dict[str, Any]:
    """The matrices that one rank of a large run owns, whole and without the exchange."""
    device = setup.device
    shapes = owned(counts.CASES[name])
    if setup.tiny:
        shapes = [(max(rows // 64, 1), max(cols // 64, 1)) for rows, cols in shapes[:4]]
    generator = torch.Generator(device).manual_seed(0)

    def drawn() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02) for shape in shapes]

    parameters = {name: drawn() for name in (ADAMW, "torch.optim.Muon", OURS)}
    named = [(f"layers.{i}.mlp.weight", p) for i, p in enumerate(parameters[OURS])]
    optimizers: dict[str, Any] = {
        ADAMW: torch.optim.AdamW(parameters[ADAMW], lr=1e-3, fused=device == "cuda"),
        OURS: muon_plugin.Muon(named, lr=1e-3),
    }
    if hasattr(torch.optim, "Muon"):  # torch 2.9 and later
        theirs = torch.optim.Muon(parameters["torch.optim.Muon"], lr=1e-3, adjust_lr_fn="match_rms_adamw")
        optimizers["torch.optim.Muon"] = theirs
    for who in optimizers:
        for p in parameters[who]:
            p.grad = torch.randn(p.shape, generator=generator, device=device)
    seconds: dict[str, list[float]] = {who: [] for who in optimizers}
    for number in range((1 if setup.tiny else ROUNDS) + 2):
        for who, optimizer in optimizers.items():
            finish()
            begin = time.perf_counter()
            optimizer.step()
            finish()
            if number > 1:  # the first ones allocate, and try each shape in a batch
                seconds[who].append(time.perf_counter() - begin)
    found: dict[str, Any] = {"matrices": len(shapes), "elements": sum(rows * cols for rows, cols in shapes)}
    for who, optimizer in optimizers.items():
        file = setup.out / "traces" / f"alone_{name}_{who}.json.gz".replace(" ", "_").replace(",", "")
        found[who] = {"seconds": seconds[who], "profile": profiled(optimizer.step, device, file)}
    return found


def owned(case: counts.Case) -> list[tuple[int, int]]:
    """Shapes of the matrices of the rank that has parts of most, and of these computes most, over all calls."""
    flops, found = Settings().newton_schulz.on(META).flops, []
    for call in case.planned():
        plan = make_plan(call.matrices, index_of(call), flops)
        rank = busiest(plan)
        found += [(m.rows, m.cols) for m, route in zip(call.matrices, plan.routes) if route.owner == rank]
    return found


def report(setup: Setup, found: dict[str, Found], on: dict[str, Any]) -> str:
    device, parts = setup.device, [title("The optimizer's step", on)]
    passed = {name: copy.deepcopy(one.value) for name, one in found.items() if one.state == "passed"}
    for name, value in passed.items():
        engine = name.partition(":")[0]
        if "is compiled" in name:
            continue
        if engine == "one rank":
            parts += [f"## {name}", _alone(value)]
            continue
        for label, ranks in value.items():
            parts.append(f"## {name}, {label}")
            if engine == "Megatron":
                parts.append("\n".join(megatron_muon.table(ranks, device)))
            else:
                peaks = {kind: max(rank[kind]["peak"] for rank in ranks) for kind in ranks[0]}
                parts.append("\n".join(deepspeed_muon.table(len(ranks), ranks, peaks, device)[2:]).rstrip())
            parts.append(_profiles({kind: one["profile"] for kind, one in ranks[0].items()}))
    return "\n\n".join(parts) + failures(found) + "\n"


def _alone(value: dict[str, Any]) -> str:
    steps = {who: one for who, one in value.items() if isinstance(one, dict)}
    rows = [[who, f"{1e3 * median(one['seconds']):.2f} ms"] for who, one in steps.items()]
    text = f"{value['matrices']} matrices, {value['elements'] / 1e6:.1f}M elements, fp32; no exchange."
    profiles = _profiles({who: one["profile"] for who, one in steps.items()})
    return f"{text}\n\n{table(['', 'step'], rows)}\n\n{profiles}"


def _profiles(profiles: dict[str, dict[str, Any]]) -> str:
    """Launches and gaps of each, and the kernels of ours that take longest."""
    columns = [key for key in next(iter(profiles.values())) if key != "by kernel"]
    rows = [[who, *[profile[key] for key in columns]] for who, profile in profiles.items()]
    text = (
        f"Under the profiler, whose own time is in it: gaps are longer than {GAP:g} us with nothing running.\n\n"
        f"{table(['', *columns], rows)}"
    )
    if OURS in profiles:
        kernels = [[name.replace("|", "/"), *counted] for name, *counted in profiles[OURS]["by kernel"]]
        text += f"\n\n{table([f'kernel of {OURS}', 'launches', 'ms'], kernels)}"
    return text
