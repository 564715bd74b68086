"""What the planner found, for the table, the plot and the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cost import Rates, StageLoad
from .models import Model


@dataclass(frozen=True)
class Training:
    """A whole training step, which Muon's is a part of.

    Attributes:
        tokens: of one step, over all ranks.
        rate: tokens a second that a rank trains on with AdamW.
    """

    tokens: float
    rate: float

    def seconds(self, ranks: int) -> float:
        return self.tokens / self.rate / ranks


@dataclass(frozen=True)
class Planned:
    """A model planned for a number of ranks.

    Attributes:
        model: what was planned.
        nodes, gpus: nodes of the job, GPUs a node.
        stages: what each kind of pipeline stage costs.
        rates: for the times.
        sweep: for the plot and the JSON: number of ranks -> what its stages cost.
        as_json: print JSON.
        gpu_bytes: memory of a GPU.
        training: a step of the whole training with AdamW, if it was given.
    """

    model: Model
    nodes: int
    gpus: int
    stages: Sequence[StageLoad]
    rates: Rates
    sweep: Mapping[int, Sequence[StageLoad]]
    as_json: bool
    gpu_bytes: float = 80e9
    training: Training | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus
