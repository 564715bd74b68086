"""The optimizer on NVMe, between which and the CPU DeepSpeed swaps the masters and the state of ZeRO-3's sub-groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .host import BEFORE


def swaps(engine: Any) -> bool:
    return bool(engine.zero_nvme_offload_optimizer())


def empty_swapped(engine: Any) -> None:
    """Empties the tensors that are on NVMe, as the swapper does that is not pipelined.

    The pipelined one leaves them with the buffers that it wrote from, which it reuses. State of such a tensor would be
    made at start, and the swapper would look for its file before it wrote one; and a checkpoint would hold what is in
    the buffers.
    """
    for info in engine.optimizer.optimizer_swapper.swap_params_info.values():
        info.release_memory()


def step_swapped(engine: Any, take: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """The engine's step, after which they are empty again."""
    take(*args, **kwargs)
    empty_swapped(engine)


def check_loading(engine: Any) -> None:
    """DeepSpeed copies the files back, without loading what is in memory; state is not read from them.

    Raises:
        ValueError: where the optimizer is on NVMe.
    """
    if swaps(engine):
        raise ValueError(
            "load_checkpoint with zero_optimization.offload_optimizer.device='nvme' restores neither the model's "
            f"weights nor the optimizer state, with any optimizer; allowed: offload to the CPU, or none, or {BEFORE}"
        )


def notes(engine: Any) -> list[str]:
    """What the start-up table says of checkpoints that cannot be resumed."""
    told = (
        "offload to NVMe: DeepSpeed cannot resume the checkpoints that it saves, with any optimizer; save the weights, "
        "too (save_16bit_model)"
    )
    return [told] if swaps(engine) else []
