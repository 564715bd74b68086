"""The optimizer on NVMe, between which and the CPU DeepSpeed swaps the masters and the state of ZeRO-3's sub-groups.

A sub-group whose shard is too small for that stays in memory. The file of a tensor is named by the parameters of its
sub-group, which DeepSpeed numbers as a process makes them, and by the name of the state.

A checkpoint holds a copy of the files. DeepSpeed copies them back, and reads the masters among them. It restores
neither the state, nor what was in memory, with any optimizer, and without a word; here both are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT
from deepspeed.checkpoint.ds_to_universal import dp_index_to_str
from torch import Tensor

from ..core.agreement import together
from . import ranks
from .convert import load
from .host import BEFORE

#: The folder of a checkpoint that has the files, and what DeepSpeed's ZeRO saves beside the optimizer's state.
FILES = "offloaded_tensors"
SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")
SETTING = "zero_optimization.offload_optimizer.device='nvme'"


def swaps(engine: Any) -> bool:
    return bool(engine.zero_nvme_offload_optimizer())


def keep_empty(engine: Any) -> None:
    """From now on tensors that are on NVMe are empty between steps and in checkpoints; they are emptied now.

    The swapper that is not pipelined leaves them so. The pipelined one leaves them with the buffers that it wrote from,
    which it reuses. State of such a tensor would be made at start, and the swapper would look for its file before it
    wrote one; and a checkpoint would hold what is in the buffers as weights.
    """
    empty(engine)
    zero = engine.optimizer
    save = zero.state_dict

    def saved() -> Any:
        empty(engine)  # they are not after safe_set_full_fp32_param and its like
        return save()

    zero.state_dict = saved


def empty(engine: Any) -> None:
    swapper = engine.optimizer.optimizer_swapper
    for kind, operation in getattr(swapper, "swap_ops", {}).items():
        if operation is not None and not operation.read_op:  # a write that has not ended
            swapper._complete_swap_out(kind)
    for info in swapper.swap_params_info.values():
        info.release_memory()


def step_swapped(engine: Any, take: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """The engine's step, after which they are empty again."""
    take(*args, **kwargs)
    empty(engine)


def check_files(engine: Any, folder: Path | None) -> None:
    """Refuses a checkpoint whose files are not those of this run.

    Args:
        folder: of the checkpoint; None where there is none.

    Raises:
        ValueError: where one of both has the optimizer on NVMe, where the optimizer is another one or has other groups,
            and where files are missing.
    """
    if folder is None:
        return
    saved, wanted = (folder / FILES).is_dir(), swaps(engine)
    if saved != wanted:
        with_it, without = "with" if saved else "without", "has" if wanted else "has not"
        advice = "the same device (save_16bit_model saves the weights for others)" if saved else f"none, or {BEFORE}"
        raise ValueError(
            f"{folder} was saved {with_it} {SETTING}, which this run {without}; DeepSpeed loads it only where both are "
            f"the same; allowed: {advice}"
        )
    if wanted:
        engine.basic_optimizer.check_saved(_saved(engine, folder)[OPTIMIZER_STATE_DICT]["param_groups"])
        for info in engine.optimizer.optimizer_swapper.swap_params_info.values():
            _found(_files(engine, folder) / Path(info.tensors[0].swap_path).name, info)


def restore(engine: Any, folder: Path) -> None:
    """What DeepSpeed left out, after it has copied the files and read the masters. Collective."""
    zero = engine.optimizer
    together(lambda: _restore_state(engine, folder), ranks.of(engine))
    zero.checkpoint_event_prologue()
    for number in _in_memory(zero):  # of the 16-bit weights as well
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()
    empty(engine)


def _restore_state(engine: Any, folder: Path) -> None:
    zero = engine.optimizer
    saved = _saved(engine, folder)
    empty(engine)
    zero.optimizer_swapper.purge_state()
    zero._set_fp32_optimizer_param_groups()
    try:
        zero.optimizer.load_state_dict(saved[OPTIMIZER_STATE_DICT])
    finally:
        zero._clear_fp32_optimizer_param_groups()
    for key in SCALE:
        setattr(zero, key, saved[key])
    for number in _in_memory(zero):
        zero.fp32_partitioned_groups_flat[number].data.copy_(saved[FP32_FLAT_GROUPS][number])
    for info in zero.optimizer_swapper.swap_params_info.values():
        if state := _swapped_state(zero.optimizer, info, _files(engine, folder)):
            info.add_state_tensors(state)


def _saved(engine: Any, folder: Path) -> Any:
    """What ZeRO saved of this rank: tensors that were on NVMe are empty."""
    return load(Path(engine._get_zero_ckpt_name(str(folder.parent), folder.name)))[OPTIMIZER_STATE_DICT]


def _swapped_state(muon: Any, info: Any, files: Path) -> list[Tensor]:
    """Makes the state of a master on NVMe of empty tensors, which the swapper fills, and returns them."""
    (master,) = info.get_compute_tensors()
    saved = muon.state.get(master)
    if not saved:  # by a run before its first step
        return []
    state = muon.halves.of(master).new_state(master)
    tensors: dict[str, Any] = {
        name: value for name, value in state.items() if torch.is_tensor(value) and not value.numel()
    }
    for name, value in tensors.items():
        number = f"{name}-{info.param_id}"  # as the swapper names them
        value.ds_id = number
        _found(files / f"{number}.tensor.swp", info)
    muon.state[master] = {**state, **{name: saved[name] for name in state.keys() & saved.keys() - tensors.keys()}}
    return [*tensors.values()]


def _found(file: Path, info: Any) -> None:
    if not file.is_file() or file.stat().st_size < info.numel() * info.dtype().itemsize:
        raise ValueError(
            f"{file.parent} has no {file.name} of {info.numel()} elements. DeepSpeed numbers parameters as a process "
            "makes them; allowed: a new process, which makes the same models in the same order"
        )


def _in_memory(zero: Any) -> Iterator[int]:
    return (i for i in range(len(zero.fp32_partitioned_groups_flat)) if not zero._swappable_optimizer_subgroup(i))


def _files(engine: Any, folder: Path) -> Path:
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    return folder / FILES / f"rank{dp_index_to_str(rank)}"


def notes(engine: Any) -> list[str]:
    """What the start-up table says of checkpoints."""
    told = (
        "offload to NVMe: its checkpoints resume with the same ranks and offload alone, and cannot be converted; for "
        "all else save the weights, too (save_16bit_model)"
    )
    return [told] if swaps(engine) else []
