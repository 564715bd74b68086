"""The whole memory of a rank's GPU, but for activations: what the engine holds beside the optimizer's state.

Weights and gradients in the engine's buffers, fp32 masters, buffers for communication; under ZeRO as in "ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models" (section 3), under Megatron as in its page on the distributed
optimizer. Padding of the engine's buffers is left out, but for ZeRO's masters and state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

from .cost import Load, StageLoad


@dataclass(frozen=True)
class Engine:
    """What an engine holds for each element on a rank.

    Attributes:
        weights, gradients, masters: bytes of an element.
        weights_cut, gradients_cut: whether data parallel ranks share them out (ZeRO-3; ZeRO-2 and 3). Masters are cut
            wherever the optimizer's state is.
        buffer: elements of the engine's own buffers for communication, at `gradients` bytes each.
        weights_away, masters_away, state_away: the shares of these that are not on the GPU between steps, but in CPU
            memory or on NVMe.
        momentum_away: bytes of an element of the momentum, if that alone is in CPU memory; otherwise 0.
        copies: bytes of an element of a matrix, and of any other, that a step holds in fp32 beside what is kept of it.
    """

    weights: int = 2
    gradients: int = 2
    masters: int = 4
    weights_cut: bool = False
    gradients_cut: bool = False
    buffer: int = 0
    weights_away: float = 0.0
    masters_away: float = 0.0
    state_away: float = 0.0
    momentum_away: int = 0
    copies: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, masters, state: between steps, on the GPU.
        buffers: of the engine, for communication.
        copies: of state and masters in fp32, during a step.
        step: what Muon's step needs at the most beside these.
        away: what is in CPU memory or on NVMe.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    state: int = 0
    buffers: int = 0
    copies: int = 0
    step: int = 0
    away: int = 0

    @property
    def total(self) -> int:
        """On the GPU."""
        return sum(asdict(self).values()) - self.away

    def __add__(self, other: Memory) -> Memory:
        """Of two calls: one needs its working memory after the other, but all copies are made at once."""
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Memory(**{**both, "step": max(self.step, other.step), "buffers": max(self.buffers, other.buffers)})


def of_stage(stage: StageLoad, engine: Engine) -> Memory:
    """Of the rank of a stage that holds most in each call."""
    return sum((_of_call(load, engine) for load in stage.loads), Memory())


def largest(stages: Iterable[StageLoad], engine: Engine) -> Memory:
    """Of the stage whose ranks need most."""
    return max((of_stage(stage, engine) for stage in stages), key=lambda memory: memory.total)


def _of_call(load: Load, engine: Engine) -> Memory:
    elements, mine = load.call.elements, sum(load.held)  # of a TP rank; of its part
    weights = engine.weights * (mine if engine.weights_cut else elements)
    masters, state = engine.masters * mine, max(load.state)
    weights_away, masters_away = round(engine.weights_away * weights), round(engine.masters_away * masters)
    state_away = min(state, max(round(engine.state_away * state), engine.momentum_away * load.held[0]))
    return Memory(
        weights=weights - weights_away,
        gradients=engine.gradients * (mine if engine.gradients_cut else elements),
        masters=masters - masters_away,
        state=state - state_away,
        buffers=engine.gradients * min(engine.buffer, elements),
        copies=round(sum(each * held for each, held in zip(engine.copies, load.held))),
        step=load.counts.peak if load.call.matrices else 0,
        away=weights_away + masters_away + state_away,
    )
