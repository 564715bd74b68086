"""The plan as text, and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..core.report import si
from ..core.routing import by_pattern
from . import memory
from .cost import Load, StageLoad
from .counts import META
from .planned import Planned

#: The paper's count: fp32 gradients reduce-scattered, fp32 weights all-gathered; its bound for Muon: bf16 gathered too.
PAPER_BYTES, PAPER_BOUND = 8, 1.25
#: The parts of Muon's step on the GPU.
DEVICE = {"elementwise": "elementwise", "newton_schulz": "Newton-Schulz", "exchange": "exchange"}
#: Above these, `reasons` explains a call: balance over the bound, traffic over AdamW's.
BALANCE, TRAFFIC = 1.05, 1.02


def totals(planned: Planned) -> dict[str, float]:
    """A step of the whole job: FLOPs, bytes of the exchange and of the engine's own traffic (and the paper's count).

    And the exchange on top of these, as factors.
    """
    found = {"newton_schulz_flops": 0.0, "exchange_bytes": 0.0, "engine_bytes": 0.0, "paper_bytes": 0.0}
    for of_stage in planned.stages:
        for load in of_stage.loads:
            groups = len(of_stage.stage.numbers) * _groups(of_stage, load)
            found["newton_schulz_flops"] += groups * load.total
            found["exchange_bytes"] += groups * sum(load.sent)
            found["engine_bytes"] += groups * load.call.ranks * load.adamw_sent(planned.model.traffic.each)
            found["paper_bytes"] += groups * load.call.ranks * load.adamw_sent(PAPER_BYTES)
    for key in ("engine", "paper"):
        own = found[f"{key}_bytes"]
        found[f"times_{key}"] = 1 + found["exchange_bytes"] / own if own else 1.0
    return found


def parameters(planned: Planned) -> int:
    """Elements of the whole model; what several pipeline stages hold, as a tied embedding, is counted in each."""
    return sum(
        len(of_stage.stage.numbers) * load.call.copies * math.prod(p.shape)
        for of_stage in planned.stages
        for load in of_stage.loads
        for p in load.call.parameters
    )


def memory_of_a_rank(planned: Planned) -> memory.Memory:
    return memory.largest(planned.stages, planned.model.engine)


def share(planned: Planned) -> dict[str, float] | None:
    """A step of the whole training in seconds with AdamW, what Muon adds to it, and the share of this."""
    if planned.training is None:
        return None
    whole, step = planned.training.seconds(planned.ranks), step_seconds(planned, planned.stages)
    added = step["muon_step"] - step["adamw_step"]
    return {"with_adamw": whole, "muon_adds": added, "share": added / whole}


def costliest(planned: Planned) -> list[str]:
    """The parameters of a call whose matrices cost most; stages with the same ones share a line."""
    flops = planned.model.newton_schulz.on(META).flops
    found: dict[str, list[int]] = {}
    for of_stage in planned.stages:
        for load in of_stage.loads:
            most = [m for m in load.call.matrices if flops(m.rows, m.cols) == load.costliest]
            named = by_pattern((m.parameter, f"{m.rows}x{m.cols}") for m in {m.parameter: m for m in most}.values())
            if most:
                names = ", ".join(f"{name} ({shape})" for name, shape, _ in named)
                line = f"{load.call.label}, {si(load.costliest)}FLOP each: {names}"
                found.setdefault(line, []).extend(of_stage.stage.numbers)
    several = len(planned.stages) > 1
    return [f"stage {stages_name(numbers)}, {line}" if several else line for line, numbers in found.items()]


def step_seconds(planned: Planned, stages: Sequence[StageLoad]) -> dict[str, float]:
    """Of the slowest stage: each part, and AdamW's and Muon's step, the parts one after the other.

    The host launches kernels while the GPU computes: "launches" is what Muon's part takes at least.
    """
    return max((_step(planned, of_stage) for of_stage in stages), key=lambda step: step["muon_step"])


def _step(planned: Planned, of_stage: StageLoad) -> dict[str, float]:
    parts = of_stage.seconds(planned.rates, planned.model.traffic)
    muon = max(sum(parts[key] for key in DEVICE), parts["launches"])
    return {**parts, "adamw_step": parts["engine"] + parts["adamw"], "muon_step": parts["engine"] + muon}


def _groups(of_stage: StageLoad, load: Load) -> int:
    """How many groups of ranks of one stage make this call, each for itself."""
    return of_stage.stage.ranks // load.call.ranks


def stages_name(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def reasons(planned: Planned) -> list[str]:
    """Explains calls with poor balance or a large exchange; stages with the same reason share a line."""
    much = totals(planned)["times_engine"] > TRAFFIC
    found: dict[str, list[int]] = {}
    for of_stage in planned.stages:
        for load in of_stage.loads:
            own = load.call.ranks * load.adamw_sent(planned.model.traffic.each)
            why = [_uneven(load)] if load.balance > BALANCE else []
            why += [_much(load, planned.model.traffic.each)] if much and sum(load.sent) > (TRAFFIC - 1) * own else []
            for reason in why:
                found.setdefault(f"{load.call.label}: {reason}", []).extend(of_stage.stage.numbers)
    several = len(planned.stages) > 1
    return [f"stage {stages_name(numbers)}, {why}" if several else why for why, numbers in found.items()]


def _uneven(load: Load) -> str:
    count, ranks = len(load.call.matrices), load.call.ranks
    return (
        f"the busiest rank has {load.balance:.2f} times the bound, the larger of the mean ({si(load.mean)}FLOP) and "
        f"the costliest matrix ({si(load.costliest)}FLOP): a matrix is orthogonalized on one rank, and no better "
        f"balance was found for {count} matrices over {ranks} ranks ({count / ranks:.1f} per rank)"
    )


def _much(load: Load, each: float) -> str:
    if load.call.replicas:
        return (
            "every rank holds all weights and receives each update that it does not compute, 2 bytes per element; "
            f"AdamW's all-reduce sends {each:g}. ZeRO-1 sends less for both optimizers"
        )
    moved = sum(load.sent) / sum(m.numel for m in load.call.matrices)
    repeated = load.call.tp > 1 and any(len(p.ranks) == 1 for p in load.call.parameters)
    return (
        f"the exchange sends {moved:.2f} bytes per matrix element in total (2 to the owner, 2 back"
        f"{'; back to every TP rank for parameters that TP replicates' if repeated else ''}); AdamW's own traffic is "
        f"{each:g} bytes per element on each of the {load.call.dp} DP ranks but one, so the exchange is a large share "
        "of it only where DP is small"
    )


def text(planned: Planned) -> str:
    """Plain text, a row for each call of each kind of stage."""
    model, found = planned.model, totals(planned)
    state = max(max(s.by_rank(lambda load: load.state)) for s in planned.stages)
    adamw = max(max(s.by_rank(lambda load: load.adamw_state)) for s in planned.stages)
    busiest = max((sum(max(load.flops) for load in s.loads), s.balance) for s in planned.stages)
    above = [
        f"{model.title}: {si(parameters(planned)).strip()} parameters",
        f"{_several(planned.ranks, 'rank')} = {_several(planned.nodes, 'node')} x {_several(planned.gpus, 'GPU')}: "
        f"{_sizes(planned)}",
        model.settings,
        *(f"note: {note}" for note in model.notes),
    ]
    below = [
        f"Newton-Schulz: {si(found['newton_schulz_flops'])}FLOP a step over all ranks; the busiest ranks "
        f"{si(busiest[0])}FLOP, {busiest[1]:.2f} of the bound: call by call, the larger of mean and costliest matrix",
        *(f"  the costliest of {line}" for line in costliest(planned)),
        f"state: at most {si(state)}B a rank (AdamW: {si(adamw)}B)",
        *_memory(planned),
        f"exchange: {si(found['exchange_bytes'])}B a step over all ranks, on top of {model.traffic.each} bytes an "
        "element of the engine's own:",
        f"  {found['times_engine']:.4f} times what {model.baseline} sends",
        f"  {found['times_paper']:.4f} times in the paper's count, 4 + 4 bytes an element; its bound is "
        f"(1, {PAPER_BOUND}], 4 + 2 + 4 against 4 + 4",
        *_times(planned),
        *_share(planned),
        LEGEND,
        *(f"why: {reason}" for reason in reasons(planned)),
    ]
    lines = [*_wrapped(above), "", *(f"  {row}" for row in _columns(planned)), "", *_wrapped(below)]
    return "\n".join(["muon_plugin planner ".ljust(WIDTH, "-"), *lines, "-" * WIDTH])


def _wrapped(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        own = "  " + " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(line.lstrip(), WIDTH, initial_indent=own, subsequent_indent=own + "  ")


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number > 1)}"


def _sizes(planned: Planned) -> str:
    sizes = planned.model.sizes(planned.ranks)
    found = [f"{key.upper()} {sizes[key]}" for key in ("tp", "pp", "ep", "cp") if sizes[key] > 1]
    found.append(f"DP {sizes['dp']}" + " (with CP)" * (sizes["cp"] > 1))
    return ", ".join(found + [f"the experts' DP {sizes['edp']}"] * (sizes["ep"] > 1))


def _times(planned: Planned) -> list[str]:
    slowest = max(planned.stages, key=lambda of_stage: _step(planned, of_stage)["muon_step"])
    rates, of, counts = planned.rates, _step(planned, slowest), slowest.counts
    ms = {key: f"{value * 1e3:.1f} ms" if value < 10 else f"{value:.1f} s" for key, value in of.items()}
    muon = " + ".join(f"{name} {ms[key]}" for key, name in DEVICE.items())
    if of["launches"] > sum(of[key] for key in DEVICE):
        muon = f"the host's launches {ms['launches']}, which take longer than {muon}"
    return [
        f"counted on the ranks of the slowest stage that have parts of most matrices: {counts.kernels:,} kernels, "
        f"{counts.bytes_each:.0f} bytes of elementwise traffic for each element of a matrix, {counts.messages:,} "
        f"messages, {counts.collectives:,} calls that communicate",
        "a step of the slowest stage, nothing overlapped:",
        f"  AdamW {ms['adamw_step']} = engine's traffic {ms['engine']} + elementwise {ms['adamw']}",
        f"  Muon  {ms['muon_step']} = engine's traffic {ms['engine']} + {muon}",
        f"  at these rates of a rank: traffic and exchange {rates.gb_per_s:g} GB/s and {rates.batch_us:g} us a call, "
        f"elementwise {rates.memory_gb_per_s:g} GB/s, Newton-Schulz {rates.tflops:g} TFLOP/s, launches "
        f"{rates.launch_us:g} us a kernel",
    ]


def _memory(planned: Planned) -> Iterator[str]:
    of = memory_of_a_rank(planned)
    parts = {
        "weights": of.weights,
        "gradients": of.gradients,
        "masters": of.masters,
        "optimizer state": of.state,
        "the engine's buffers": of.buffers,
        "copies in fp32": of.copies,
        "Muon's step": of.step,
    }
    shown = " + ".join(f"{name} {si(size)}B" for name, size in parts.items() if size)
    over = "" if of.total <= planned.gpu_bytes else ", MORE THAN IT HAS"
    yield (
        f"memory of a rank, without activations: {si(of.total)}B of the GPU's {si(planned.gpu_bytes)}B{over} = {shown}"
    )
    if of.away:
        yield f"  and {si(of.away)}B in CPU memory or on NVMe, whose way there and back is not in the times below"


def _share(planned: Planned) -> Iterator[str]:
    found = share(planned)
    if found is not None and planned.training is not None:
        yield (
            f"a training step of {si(planned.training.tokens).strip()} tokens takes {found['with_adamw']:.2f} s with "
            f"AdamW; Muon adds {found['muon_adds'] * 1e3:.1f} ms, {found['share']:.2%}"
        )


#: Units of the whole table.
LEGEND = "units: k 1e3, M 1e6, G 1e9, T 1e12, P 1e15; B bytes; FLOP: a multiplication or an addition"
WIDTH = 120
HEADER = (
    *("stage", "call", "groups x ranks", "matrices", "FLOP", "busiest", "/ mean", "/ bound"),
    *("sent B", "busiest", "state B", "AdamW's"),
)


def _columns(planned: Planned) -> list[str]:
    rows = [HEADER]
    for of_stage in planned.stages:
        for load in of_stage.loads:
            rows.append(
                (
                    stages_name(of_stage.stage.numbers),
                    load.call.label,
                    f"{_groups(of_stage, load):,} x {load.call.ranks:,}",
                    f"{len(load.call.matrices):,}",
                    si(load.total),
                    si(max(load.flops)),
                    f"{max(load.flops) / load.mean:.2f}" if load.total else "",
                    f"{load.balance:.2f}" if load.total else "",
                    si(sum(load.sent)),
                    si(max(load.sent)),
                    si(max(load.state)),
                    si(max(load.adamw_state)),
                )
            )
    widths = [max(len(row[i].rstrip()) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [cell.rstrip() for cell in row]
        left, right = zip(cells[:2], widths[:2]), zip(cells[2:], widths[2:])
        lines.append("  ".join([*(c.ljust(w) for c, w in left), *(c.rjust(w) for c, w in right)]).rstrip())
    return lines


def as_json(planned: Planned) -> dict[str, Any]:
    """Everything of the table and the plot, with the counts of every rank of every kind of stage."""
    return {
        "model": planned.model.title,
        "parameters": parameters(planned),
        "ranks": planned.ranks,
        "layout": dict(planned.model.sizes(planned.ranks)),
        "settings": planned.model.settings,
        "notes": list(planned.model.notes),
        "stages": [
            {
                "numbers": list(of_stage.stage.numbers),
                "calls": [_call_json(of_stage, load) for load in of_stage.loads],
                "by_rank": {
                    "flops": of_stage.by_rank(lambda load: load.flops),
                    "bytes_sent": of_stage.by_rank(lambda load: load.sent),
                    "state_bytes": of_stage.by_rank(lambda load: load.state),
                    "adamw_state_bytes": of_stage.by_rank(lambda load: load.adamw_state),
                },
            }
            for of_stage in planned.stages
        ],
        "totals": totals(planned),
        "memory_bytes_a_rank": asdict(of_rank := memory_of_a_rank(planned)) | {"total": of_rank.total},
        "costliest_matrices": costliest(planned),
        "training_step": share(planned),
        "step_seconds": step_seconds(planned, planned.stages),
        "step_seconds_by_ranks": {ranks: step_seconds(planned, stages) for ranks, stages in planned.sweep.items()},
        "reasons": reasons(planned),
    }


def _call_json(of_stage: StageLoad, load: Load) -> dict[str, Any]:
    return {
        "call": load.call.label,
        "groups": _groups(of_stage, load),
        "ranks": load.call.ranks,
        "dp": load.call.dp,
        "matrices": len(load.call.matrices),
        "flops": load.total,
        "busiest_flops": max(load.flops),
        "costliest_matrix_flops": load.costliest,
        "busiest_over_bound": load.balance if load.total else None,
        "bytes_sent": sum(load.sent),
        "busiest_bytes_sent": max(load.sent),
        "state_bytes_a_rank": max(load.state),
        "adamw_state_bytes_a_rank": max(load.adamw_state),
        "counted_on_a_rank": asdict(load.counts),
    }
