"""The plan as text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..report import si
from .cost import Load, StageLoad

if TYPE_CHECKING:
    from .command import Planned

#: The paper's count: fp32 gradients reduce-scattered, fp32 weights all-gathered; its bound for Muon: bf16 gathered too.
PAPER_BYTES, PAPER_BOUND = 8, 1.25
#: What is worth a reason.
BALANCE, TRAFFIC = 1.05, 1.02


def totals(planned: Planned) -> dict[str, float]:
    """Of the whole job and of a step: FLOPs, bytes of the exchange, of AdamW's own traffic, and in the paper's count."""
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


def step_seconds(planned: Planned, stages: Sequence[StageLoad]) -> dict[str, float]:
    """Of the slowest stage: each part, and AdamW's and Muon's step, the parts one after the other."""
    steps = []
    for of_stage in stages:
        parts = of_stage.seconds(planned.rates, planned.model.traffic)
        muon = sum(value for key, value in parts.items() if key != "adamw")
        steps.append({**parts, "adamw_step": parts["engine"] + parts["adamw"], "muon_step": muon})
    return max(steps, key=lambda step: step["muon_step"])


def _groups(of_stage: StageLoad, load: Load) -> int:
    """How many groups of ranks of one stage make this call, each for itself."""
    return of_stage.stage.ranks // load.call.ranks


def _stages_name(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def reasons(planned: Planned) -> Iterator[str]:
    """Why a call is less even, or the exchange more, than one would wish."""
    for of_stage in planned.stages:
        for load in of_stage.loads:
            count, ranks = len(load.call.matrices), load.call.ranks
            if load.balance > BALANCE:
                yield (
                    f"stage {_stages_name(of_stage.stage.numbers)}, {load.call.label}: the busiest rank has "
                    f"{load.balance:.2f} of the larger of mean and costliest matrix: a matrix is computed whole, on one "
                    f"rank, and these {count} ({count / ranks:.1f} a rank, {si(load.costliest)}FLOP the costliest, "
                    f"{si(load.mean)}FLOP the mean) do not divide evenly over {ranks} ranks"
                )
    found = totals(planned)
    if found["times_engine"] <= TRAFFIC:
        return
    each = planned.model.traffic.each
    for of_stage in planned.stages:
        for load in of_stage.loads:
            own, sent = load.call.ranks * load.adamw_sent(each), sum(load.sent)
            if sent <= (TRAFFIC - 1) * own:
                continue
            numel = sum(m.numel for m in load.call.matrices)
            where = f"stage {_stages_name(of_stage.stage.numbers)}, {load.call.label}: "
            if load.call.replicas:
                yield where + (
                    "every rank holds everything, and gets every update that it does not compute: 2 bytes an element; "
                    f"AdamW's all-reduce sends {each:g}. ZeRO-1 sends less for both"
                )
            else:
                yield where + (
                    f"{sent / numel:.2f} bytes an element of the matrices move (4 at most: to its owner and back), and "
                    f"AdamW's own traffic is {each:g} bytes on each of DP {load.call.dp} ranks but one: more ranks in DP "
                    "make the exchange a smaller part"
                )


def text(planned: Planned) -> str:
    """Plain text, a row for each call of each kind of stage."""
    model, sizes = planned.model, planned.model.layout(planned.ranks)
    layout = ", ".join(f"{key.upper()} {sizes[key]}" for key in ("tp", "pp", "ep", "cp") if sizes[key] > 1)
    found, seconds = totals(planned), step_seconds(planned, planned.stages)
    state = [max(s.by_rank(lambda load: load.state)) for s in planned.stages]
    adamw = [max(s.by_rank(lambda load: load.adamw_state)) for s in planned.stages]
    lines = [
        f"{model.title}: {planned.ranks:,} ranks = {planned.nodes:,} nodes x {planned.gpus} GPUs"
        f"{': ' + layout if layout else ''}, DP {sizes['dp']}" + (f", experts' DP {sizes['edp']}" if sizes["ep"] > 1 else ""),
        model.settings,
        *(f"note: {note}" for note in model.notes),
        "",
        *_columns(planned),
        "",
        f"Newton-Schulz: {si(found['newton_schulz_flops'])}FLOP a step over all ranks",
        f"state: at most {si(max(state))}B a rank (AdamW: {si(max(adamw))}B)",
        f"exchange: {si(found['exchange_bytes'])}B a step over all ranks; with {model.baseline}'s own traffic "
        f"({model.traffic.each} bytes an element), {found['times_engine']:.4f} times AdamW's",
        f"in the paper's count (4 + 4 bytes an element), {found['times_paper']:.4f} times; the paper's bound is "
        f"(1, {PAPER_BOUND}]: 4 + 2 + 4 against 4 + 4",
        f"a step at {planned.rates.tflops:g} TFLOP/s, {planned.rates.gb_per_s:g} GB/s network and "
        f"{planned.rates.memory_gb_per_s:g} GB/s memory a rank, nothing overlapped, the slowest stage:",
        f"  AdamW {_ms(seconds['adamw_step'])} = engine's traffic {_ms(seconds['engine'])} + elementwise "
        f"{_ms(seconds['adamw'])}",
        f"  Muon  {_ms(seconds['muon_step'])} = engine's traffic {_ms(seconds['engine'])} + elementwise "
        f"{_ms(seconds['elementwise'])} + Newton-Schulz {_ms(seconds['newton_schulz'])} + exchange "
        f"{_ms(seconds['exchange'])}",
        *(f"why: {reason}" for reason in reasons(planned)),
    ]
    width = 110
    return "\n".join(["muon_plugin planner ".ljust(width, "-"), *("  " + line if line else "" for line in lines), "-" * width])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


HEADER = ("stage", "call", "groups x ranks", "matrices", "NS FLOP", "busiest", "/ mean", "/ bound", "sent B", "busiest", "state B", "AdamW's")


def _columns(planned: Planned) -> list[str]:
    rows = [HEADER]
    for of_stage in planned.stages:
        for load in of_stage.loads:
            rows.append(
                (
                    _stages_name(of_stage.stage.numbers),
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
    return [
        "  ".join(c.rstrip().ljust(w) if i < 2 else c.rstrip().rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def as_json(planned: Planned) -> dict[str, Any]:
    """Everything of the table and the plot, with the counts of every rank of every kind of stage."""
    return {
        "model": planned.model.title,
        "ranks": planned.ranks,
        "layout": dict(planned.model.layout(planned.ranks)),
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
        "step_seconds": step_seconds(planned, planned.stages),
        "step_seconds_by_ranks": {ranks: step_seconds(planned, stages) for ranks, stages in planned.sweep.items()},
        "reasons": list(reasons(planned)),
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
    }
