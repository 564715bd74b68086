"""The cost of a call on each rank, and how long a step takes at given rates.

FLOPs, bytes and state are counted with the plan that a real run would make, kernels, elementwise traffic, messages and
extra memory by running one rank's step on the meta device (`counts`); times are these counts over the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from ..core.holders import Even, Index, Pieces
from ..core.layout import Block, Strided, by_parameter, in_matrices
from ..core.orthogonalize import NewtonSchulz
from ..core.plan import BYTES, make_plan
from .calls import PlannedCall, Stage, numel
from .counts import Counts, busiest, count

#: Bytes that AdamW's step reads and writes in a rank's memory for each element of its shards: gradient, two moments
#: and the weight, the last three twice, fp32.
ADAMW_MEMORY = 28
#: Bytes of an element of Muon's momentum.
MUON_STATE = 4


@dataclass(frozen=True)
class Rates:
    """What a rank can do; the defaults are about what an H100 with a 400 Gb/s network card does.

    Attributes:
        tflops: of Newton-Schulz's bf16 products, 1e12 a second (40% of an H100's peak).
        gb_per_s: over the network, each way, 1e9 bytes a second (80% of a 400 Gb/s card).
        memory_gb_per_s: of the elementwise updates, 1e9 bytes a second (75% of an H100's peak).
        launch_us: host time of a kernel, 1e-6 seconds. The host runs ahead of the GPU, so it counts only where all
            kernels take the host longer than the GPU.
        batch_us: latency of a collective call, or of messages that are posted together, 1e-6 seconds.
    """

    tflops: float = 400.0
    gb_per_s: float = 40.0
    memory_gb_per_s: float = 2500.0
    launch_us: float = 5.0
    batch_us: float = 30.0


@dataclass(frozen=True)
class Traffic:
    """Bytes per element that the engine itself sends, under AdamW as under Muon.

    Attributes:
        gradient: bytes per element of the reduce-scatter of gradients (stage 0: of the all-reduce).
        weight: bytes per element of one all-gather of weights.
        gathers: all-gathers per step: one; two in ZeRO-3 (forward and backward); none in stage 0.
    """

    gradient: int
    weight: int
    gathers: int = 1

    @property
    def each(self) -> int:
        return self.gradient + self.gathers * self.weight


@dataclass(frozen=True)
class Load:
    """The cost of one step of a call, by rank (in the order of `PlannedCall.position`).

    Attributes:
        call: the call.
        flops: FLOPs of Newton-Schulz on each rank.
        sent: bytes that each rank sends in the exchange.
        state, adamw_state: bytes of optimizer state on each rank, and what they would be with AdamW for everything.
        costliest: FLOPs of the costliest matrix.
        held: elements of matrices, and of the rest, on the rank that holds most.
        counting: counts the step of the rank with parts of most matrices.
    """

    call: PlannedCall
    flops: Sequence[int]
    sent: Sequence[int]
    state: Sequence[int]
    adamw_state: Sequence[int]
    costliest: int
    held: tuple[int, int] = (0, 0)
    counting: Callable[[], Counts] = field(default=Counts, compare=False)

    @cached_property
    def total(self) -> int:
        return sum(self.flops)

    @cached_property
    def counts(self) -> Counts:
        return self.counting()

    @property
    def mean(self) -> float:
        return self.total / len(self.flops)

    @property
    def balance(self) -> float:
        """The busiest rank's FLOPs over their lower bound: the larger of the mean and the costliest matrix."""
        return max(self.flops) / max(self.mean, self.costliest, 1)

    def adamw_sent(self, each: float) -> float:
        """Bytes per rank of the engine's own ring collectives, at `each` bytes per element."""
        return self.call.elements * each * (self.call.dp - 1) / self.call.dp

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Muon's Newton-Schulz, exchange and elementwise part, of the busiest ranks, and the host's launches."""
        elements = sum(m.numel for m in self.call.matrices)
        # Broadcasts are counted at their source; a ring or tree passes each update on, once a rank.
        wire = BYTES * elements * (self.call.dp > 1) if self.call.replicas else max(self.sent)
        return {
            "newton_schulz": max(self.flops) / rates.tflops / 1e12,
            "exchange": wire / rates.gb_per_s / 1e9 + self.counts.collectives * rates.batch_us / 1e6,
            "elementwise": (self.counts.elementwise + ADAMW_MEMORY * self.held[1]) / rates.memory_gb_per_s / 1e9,
            "launches": self.counts.kernels * rates.launch_us / 1e6,
        }

    def adamw_seconds(self, rates: Rates) -> float:
        return ADAMW_MEMORY * sum(self.held) / rates.memory_gb_per_s / 1e9


@dataclass(frozen=True)
class StageLoad:
    """The cost of one step on the ranks of identical pipeline stages."""

    stage: Stage
    loads: tuple[Load, ...]

    @property
    def balance(self) -> float:
        """The calls one after the other: the busiest ranks' FLOPs over what no plan can be below."""
        bounds = sum(max(load.mean, load.costliest) for load in self.loads)
        return sum(max(load.flops) for load in self.loads) / max(bounds, 1)

    def by_rank(self, what: Callable[[Load], Sequence[int]]) -> list[int]:
        """The sum over the calls, for each rank of one of the stages."""
        found = [0] * self.stage.ranks
        for load in self.loads:
            amounts, position = what(load), load.call.position
            for local in range(self.stage.ranks):
                found[local] += amounts[position(local)]
        return found

    def seconds(self, rates: Rates, traffic: Traffic) -> dict[str, float]:
        """A step's parts: the engine's own, AdamW's elementwise part, and Muon's."""
        found = {
            "engine": sum(load.adamw_sent(traffic.each) for load in self.loads) / rates.gb_per_s / 1e9,
            "adamw": sum(load.adamw_seconds(rates) for load in self.loads),
        }
        for load in self.loads:
            for key, value in load.seconds(rates).items():
                found[key] = found.get(key, 0.0) + value
        return found

    @cached_property
    def counts(self) -> Counts:
        """Of the calls' counted ranks, one after the other."""
        return sum((load.counts for load in self.loads), Counts())


def plan_stages(
    stages: Sequence[Stage],
    newton_schulz: NewtonSchulz,
    scalars: int,
    state: tuple[int, int] | None = None,
) -> list[StageLoad]:
    """Plans every call.

    Args:
        stages: one for each kind of pipeline stage.
        newton_schulz: the iteration, on the meta device, which stands for CUDA.
        scalars: bf16 numbers that are sent with each update (two for an fp32 scale, Eq. 6).
        state: bytes of an element of a matrix, and of any other; None: fp32 momentum, and AdamW's moments as the call
            has them.
    """
    return [
        StageLoad(stage, tuple(plan_call(call, newton_schulz, scalars, state) for call in stage.calls))
        for stage in stages
    ]


def plan_call(
    call: PlannedCall,
    newton_schulz: NewtonSchulz,
    scalars: int,
    state: tuple[int, int] | None = None,
) -> Load:
    """The counts of one call, as the plan of a real run has them."""
    held = _most_held(call)
    if not call.matrices:
        return Load(call, [0] * call.ranks, [0] * call.ranks, *_state(call, state), 0, held)
    costliest = max(newton_schulz.flops(m.rows, m.cols) for m in call.matrices)
    plan = make_plan(call.matrices, index_of(call), newton_schulz.flops, scalars)
    momentum = torch.bfloat16 if state is not None and state[0] == 2 else torch.float32
    counting = partial(count, call, plan, busiest(plan), newton_schulz, scalars, momentum)
    return Load(call, plan.flops, plan.bytes_sent, *_state(call, state), costliest, held, counting)


def index_of(call: PlannedCall) -> Index:
    """What every rank holds, TP ranks of a DP rank side by side, as a real run publishes it."""
    if call.tp == 1 and (call.replicas or call.evenly):
        parts = call.evenly or [numel(p) for p in call.parameters]
        rules = {p.name: Even(part, 0 if call.replicas else part) for p, part in zip(call.parameters, parts)}
        return Index(call.ranks, rules, {})
    of_parameter = by_parameter(call.matrices)

    def published(rank: int, tp: int) -> Pieces:
        found: dict[int, list[Strided]] = {}
        for span in call.held(rank):
            partition = call.parameters[span.number]
            numbers = of_parameter.get(partition.name)
            if numbers is None:
                continue
            held = Block(Strided(span.offset, span.length), Strided(span.start, span.length))
            for block in partition.in_whole(tp, held):
                for number, blocks in in_matrices(block, numbers, call.matrices):
                    found.setdefault(number, []).extend(b.inside for b in blocks)
        return [(number, tuple(inside)) for number, inside in found.items()]

    if call.replicas:
        return Index.of_lists([published(0, tp) for tp in range(call.tp)] * call.dp)
    return Index.of_lists([published(rank, tp) for rank in range(call.dp) for tp in range(call.tp)])


def _held_by(call: PlannedCall) -> list[tuple[int, int]]:
    """Elements of matrices and of the rest on each DP rank, without padding."""
    muon = {m.parameter for m in call.matrices}
    mine = [p.name in muon for p in call.parameters]
    found = []
    for rank in range(call.dp):
        sums = [0, 0]
        for span in call.held(rank):
            sums[not mine[span.number]] += span.length
        found.append((sums[0], sums[1]))
    return found


def _state(call: PlannedCall, state: tuple[int, int] | None) -> tuple[list[int], list[int]]:
    adamw = 2 * call.moment_bytes
    muon, rest = state or (MUON_STATE, adamw)
    if call.padded is not None:  # a group is of one kind, and every rank's part has one size
        each = muon if call.matrices else rest
        return [each * call.padded] * call.ranks, [adamw * call.padded] * call.ranks
    held = [of_rank for of_rank in _held_by(call) for _ in range(call.tp)]
    return [muon * m + rest * r for m, r in held], [adamw * (m + r) for m, r in held]


def _most_held(call: PlannedCall) -> tuple[int, int]:
    if call.padded is not None:
        return (call.padded, 0) if call.matrices else (0, call.padded)
    return max(_held_by(call), key=lambda held: (sum(held), held[1]))  # of equal parts, the one with most state
