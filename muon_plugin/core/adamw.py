"""AdamW for the parameters that are not matrices: a well-kept implementation, chosen once.

On CPU the default is torch's plain AdamW, whose bits do not depend on where a shard is cut. The fused ones there
(DeepSpeed's, torch's) do: vector kernels round their tail elements differently (17 of 200,003 elements over 63 cuts
with DeepSpeed's, 2 with torch's).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Groups = list[dict[str, Any]]


def _torch(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups)


def _torch_fused(groups: Groups) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def _deepspeed(groups: Groups) -> Optimizer:
    if any(len(group["params"]) > 1 for group in groups):
        # It counts steps on one tensor of a group: wrong where tensors differ in dtype, or one has no gradient.
        raise ImportError("DeepSpeed's FusedAdam is used for one flat tensor a group, as ZeRO has them")
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.adam import FusedAdam  # compiles its kernel where no wheel has it

    ours, theirs = groups[0]["params"][0].device.type, get_accelerator().device_name()
    if ours != theirs:
        raise ImportError(f"DeepSpeed's accelerator is {theirs} (DS_ACCELERATOR), the parameters are on {ours}")
    return FusedAdam(groups, adam_w_mode=True)


def _apex(groups: Groups) -> Optimizer:
    import apex

    if not hasattr(apex, "optimizers"):
        warnings.warn(
            "the installed package 'apex' is not NVIDIA's: PyPI's apex is another project. The next AdamW is used. "
            "To get NVIDIA's, uninstall it and build apex from its source repository",
            stacklevel=2,
        )
        raise ImportError("PyPI's apex is not NVIDIA's apex")
    if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
        raise ImportError("apex's FusedAdam is used for fp32 parameters; for others its kernel wants fp32 state")
    return apex.optimizers.FusedAdam(groups, adam_w_mode=True)


_BUILDERS: dict[str, Callable[[Groups], Optimizer]] = {
    "deepspeed": _deepspeed,
    "apex": _apex,
    "torch_fused": _torch_fused,
    "torch": _torch,
}
IMPLEMENTATIONS = ("auto", *_BUILDERS)


def build(groups: Groups, which: str) -> tuple[Optimizer, str]:
    """An AdamW over these parameter groups, and what to call it in the log.

    Args:
        groups: with "params", "lr", "betas", "eps", "weight_decay".
        which: "auto" (on CUDA the first of DeepSpeed's FusedAdam, apex's, torch's fused; elsewhere torch's plain one)
            or one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: if the one that was asked for cannot be had.
    """
    on_cuda = _is_cuda(groups)
    order = [which] if which != "auto" else list(_BUILDERS) if on_cuda else ["torch"]
    for name in order:
        try:
            optimizer = _BUILDERS[name](groups)
        except Exception as error:  # a missing package, a kernel that does not build
            if which != "auto":
                raise ValueError(
                    f"adamw={which!r} cannot be used here: {type(error).__name__}: {error}; "
                    f"allowed: {', '.join(IMPLEMENTATIONS)}"
                ) from error
            continue
        inexact = not on_cuda and name != "torch"
        return optimizer, name + (" (not bit-exact over layouts on CPU)" if inexact else "")
    raise RuntimeError("unreachable: torch's AdamW can always be built")


def _is_cuda(groups: Groups) -> bool:
    return bool(groups[0]["params"][0].is_cuda)


def own_options(optimizer: Optimizer) -> dict[str, Any]:
    """What this implementation keeps in a group beside the settings that are ours."""
    return {
        key: value for key, value in optimizer.defaults.items() if key not in ("lr", "betas", "eps", "weight_decay")
    }


def new_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The state that `optimizer` would create lazily in its first step, in its own format."""
    state: dict[str, Any] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    if isinstance(optimizer, torch.optim.AdamW):
        fused = bool(optimizer.defaults.get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    elif type(optimizer).__module__.startswith("deepspeed"):
        state["step"] = 0  # apex keeps it in the group instead
    return state


def adopt(optimizer: Optimizer, group: dict[str, Any], tensors: Sequence[Tensor], state: Any) -> None:
    """Brings a restored group and its tensors' state to the format of `optimizer`, which may not be what saved them."""
    group.update(own_options(optimizer))
    steps = [state[p]["step"] for p in tensors if "step" in state[p]] or [group.pop("step", 0)]
    step = max(float(s) for s in steps)  # DeepSpeed's FusedAdam counts on one tensor of a group only
    for p in tensors:
        fresh = new_state(optimizer, p.reshape(-1)[:0])
        if "step" not in fresh:
            group["step"] = int(step)
            state[p].pop("step", None)
        else:
            state[p]["step"] = fresh["step"].fill_(step) if isinstance(fresh["step"], Tensor) else int(step)
