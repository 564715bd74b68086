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
        masters_on_cpu, momentum_on_cpu: masters and state, or the momentum of matrices, are kept in CPU memory.
        momentum: bytes of an element of the momentum.
    """

    weights: int = 2
    gradients: int = 2
    masters: int = 4
    weights_cut: bool = False
    gradients_cut: bool = False
    buffer: int = 0
    masters_on_cpu: bool = False
    momentum_on_cpu: bool = False
    momentum: int = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights, gradients, masters, state: between steps, on the GPU.
        buffers: of the engine, for communication.
        step: what Muon's step needs at the most beside these.
        on_cpu: what is in CPU memory.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    state: int = 0
    buffers: int = 0
    step: int = 0
    on_cpu: int = 0

    @property
    def total(self) -> int:
        """On the GPU."""
        return sum(asdict(self).values()) - self.on_cpu

    def __add__(self, other: Memory) -> Memory:
        """Of two calls: one needs its working memory after the other."""
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
    masters, state, away = engine.masters * mine, max(load.state), 0
    if engine.masters_on_cpu:
        masters, state, away = 0, 0, masters + state
    elif engine.momentum_on_cpu:
        away = min(engine.momentum * load.held[0], state)
        state -= away
    return Memory(
        weights=engine.weights * (mine if engine.weights_cut else elements),
        gradients=engine.gradients * (mine if engine.gradients_cut else elements),
        masters=masters,
        state=state,
        buffers=engine.gradients * min(engine.buffer, elements),
        step=load.counts.peak if load.call.matrices else 0,
        on_cpu=away,
    )
