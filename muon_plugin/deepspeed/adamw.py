"""DeepSpeed's FusedAdam as the AdamW for what is not a matrix. Imports DeepSpeed where it is built, not before."""

from __future__ import annotations

from torch.optim import Optimizer

from ..core import adamw


def build(groups: adamw.Groups) -> Optimizer:
    """A FusedAdam in AdamW mode.

    On CPU its bits depend on where a shard is cut: its vector kernels round their tail elements differently (17 of
    200,003 elements over 63 cuts).

    Raises:
        ImportError: where it cannot be used for these groups.
    """
    if any(len(group["params"]) > 1 for group in groups):
        # It counts steps on one tensor of a group: wrong where tensors differ in dtype, or one has no gradient.
        raise ImportError("DeepSpeed's FusedAdam is used for one flat tensor a group, as ZeRO has them")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.adam import FusedAdam  # compiles its kernel where no wheel has it

    ours, theirs = groups[0]["params"][0].device.type, get_accelerator().device_name()
    if ours != theirs:
        raise ImportError(f"DeepSpeed's accelerator is {theirs} (DS_ACCELERATOR), the parameters are on {ours}")
    return FusedAdam(groups, adam_w_mode=True)  # type: ignore[no-any-return]


adamw.offer("deepspeed", build, integer_steps=True)
