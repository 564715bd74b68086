"""Moonlight's three stages as Megatron's scheduler.

The rest of Moonlight is Megatron's own (0.19): ``--moe-router-score-function sigmoid``,
``--moe-router-enable-expert-bias``, ``--moe-router-topk-scaling-factor`` (`muon_plugin.moonlight.gate_scaling_factor`);
the growing batch is ``--step-batch-size-schedule "0:2048 200B:4096"``. Its bias rule leaves out the mean, which moves
all biases of a router alike and so never changes which experts are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..moonlight import Stages

__all__ = ["three_stages"]


def three_stages(scheduler: Any, stages: Stages, tokens: int, configs: Sequence[Any] = ()) -> None:
    """Makes an ``OptimizerParamScheduler`` follow `stages`; its own checkpoints resume it.

    Args:
        scheduler: built with ``max_lr`` for `Stages.peak`; groups with a ``max_lr`` of their own keep its proportion.
        stages: learning rates over the tokens seen.
        tokens: number of tokens in one unit of what ``scheduler.step`` counts: the sequence length, where it counts
            samples.
        configs: of the model chunks, whose ``moe_router_bias_update_rate`` becomes 0 in the cooldown.

    Raises:
        ValueError: if `tokens` is below 1.

    Examples:
        With the scheduler that ``megatron.training`` has built, which counts samples of 8,192 tokens::

            three_stages(opt_param_scheduler, Stages(), 8192, [chunk.config for chunk in model])
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: must be at least 1, the tokens of one unit of scheduler.step")
    step = scheduler.step

    def get_lr(group: dict[str, Any]) -> float:
        highest = group.get("max_lr")
        highest = scheduler.max_lr if highest is None else highest
        return highest * stages.lr(scheduler.num_steps * tokens) / stages.peak

    def step_too(increment: int) -> None:
        step(increment)
        for config in configs:
            config.moe_router_bias_update_rate = stages.bias_rate(scheduler.num_steps * tokens)

    scheduler.get_lr = get_lr
    scheduler.step = step_too
    step_too(0)
